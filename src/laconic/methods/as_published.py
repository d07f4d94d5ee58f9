"""Alvarez & Salzmann 2017: the nuclear norm, by one proximal step at the end of each epoch, then a cut by energy.

The paper sweeps the share of energy that every layer keeps; here the largest share whose network fits the budget is taken. No training after it.
"""

from __future__ import annotations

from ..compressor import Compressor
from ..data import Dataset
from ..matricize import SPATIAL
from ..recipe import Recipe
from ..training import Report, Restart, fit, make_optimizer, steps_per_epoch
from . import svd
from .base import Method, Trained, build

STRENGTH = (
    1.0  # setting: of the nuclear norm, per unit of learning rate; 3 was better on held-out images, and collapsed on all of them (0008)
)


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    strength = recipe.setting or STRENGTH
    compressor = Compressor.as_published(model, optimizer, strength, steps_per_epoch(data, recipe))
    curve = fit(model, data, recipe, seed, optimizer, report=report, compressor=compressor, restart=restart)
    compressor.detach()
    done, share = svd.by_energy(model, data, recipe, SPATIAL)
    return Trained(model, curve, done, notes=[f"strength {strength:g}, every layer keeps {share:.1%} of its energy"])


AS_PUBLISHED = Method("Alvarez & Salzmann 2017, as published", train, (STRENGTH, 0.3, 3.0))
