"""The shape that laconic found, from scratch: is it the shape, or what the large network had learnt?"""

from __future__ import annotations

from typing import Any

import torch

from ..data import Dataset
from ..recipe import Recipe
from ..training import Report, Restart, fit, make_optimizer
from . import ours
from .base import Method, Trained


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """Every layer, also of a pair, is initialised as PyTorch does. It cannot resume: the run starts afresh."""
    del restart
    found = ours.train(data, recipe, seed)
    torch.manual_seed(seed)
    for module in found.model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    curve = fit(found.model, data, recipe, seed, make_optimizer(found.model, recipe), report=report)
    return Trained(
        found.model, curve, found.report, notes=["the shape of laconic's network, from scratch; the time to find it is not counted"]
    )


FOUND = Method("laconic's shape, from scratch", train)
