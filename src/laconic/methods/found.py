"""The shape that laconic found, from scratch: is it the shape, or what the large network had learnt?"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..data import Dataset
from ..recipe import Recipe
from ..training import Report, fit, make_optimizer
from . import ours
from .base import Method, Trained


def from_scratch(label: str, **changes: Any) -> Method:
    """What laconic ends with under the recipe with these changes, initialised anew as PyTorch does, layers of pairs too."""

    def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
        found = ours.train(data, dataclasses.replace(recipe, **changes), seed)
        torch.manual_seed(seed)
        for module in found.model.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        curve = fit(found.model, data, recipe, seed, make_optimizer(found.model, recipe), report=report)
        notes = ["the shape of laconic's network, from scratch; the time to find it is not counted"]
        return Trained(found.model, curve, found.report, notes=notes)

    return Method(label, train, resumes=False)


FOUND = from_scratch("laconic's shape, from scratch")
FOUND_WIDTHS = from_scratch("dense with laconic's widths, from scratch", structures=("channels",))
