"""The network as it is."""

from __future__ import annotations

from ..data import Dataset
from ..recipe import Recipe
from ..training import Report, Restart, fit, make_optimizer
from .base import Method, Trained, build


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    model = build(data, recipe, seed)
    return Trained(model, fit(model, data, recipe, seed, make_optimizer(model, recipe), report=report, restart=restart))


DENSE = Method("dense", train)
