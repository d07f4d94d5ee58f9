r"""Magnitude pruning of single weights (Han et al. 2015), all layers together, gradually (Zhu & Gupta 2017):

.. math:: \text{zeros}(t) = z\,\bigl(1 - (1 - t)^3\bigr), \qquad t \in [0, 1]

between two shares of the run, then training on. The budget counts the weights that are not zero; the layers stay as large as they were, so
neither the time nor the number of stored parameters falls.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.utils import prune

from ..data import Dataset
from ..matricize import Layer, unfoldings
from ..measure import count_params
from ..recipe import Recipe
from ..training import Report, fit, make_optimizer, steps_per_epoch
from .base import Method, Trained, build

LAST = 0.7  # setting: the share of the run at which the last weights go
FIRST, ROUNDS = 0.1, 20  # the share at which the first ones go; in how many rounds


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
    model = build(data, recipe, seed)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # all that `prune` takes
    optimizer = make_optimizer(model, recipe)
    layers: list[Layer] = [m for m in model.modules() if unfoldings(m)]
    pruned: list[tuple[nn.Module, str]] = [(layer, "weight") for layer in layers]
    weights = sum(layer.weight.numel() for layer in layers)
    whole = count_params(model)
    zeros = weights - (int(recipe.params * whole) - (whole - weights))
    total = recipe.epochs * steps_per_epoch(data, recipe)
    last = recipe.setting or LAST
    rounds = {
        round((FIRST + (last - FIRST) * k / ROUNDS) * total): round(zeros * (1 - (1 - k / ROUNDS) ** 3)) for k in range(1, ROUNDS + 1)
    }
    done, gone = itertools.count(1), 0

    def cut(*_: object) -> None:
        nonlocal gone
        wanted = rounds.get(next(done))
        if wanted is not None and wanted > gone:
            prune.global_unstructured(pruned, prune.L1Unstructured, amount=wanted - gone)
            gone = wanted

    optimizer.register_step_post_hook(cut)
    curve = fit(model, data, recipe, seed, optimizer, report=report)
    for module, name in pruned:
        prune.remove(module, name)
    return Trained(model, curve, notes=[f"{zeros:,} of {weights:,} weights are zero; the layers are as large as before"])


MAGNITUDE = Method("magnitude pruning of single weights, zeros stored", train, (LAST, 0.35, 0.5), resumes=False)
