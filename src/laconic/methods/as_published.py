"""Alvarez & Salzmann 2017: the nuclear norm, by one proximal step at the end of each epoch, then a cut by energy.

The paper sweeps the share of energy that every layer keeps; here the largest share whose network fits the budget is taken. No training after it.
"""

from __future__ import annotations

from ..compaction import compress, energy_ranks, spectra
from ..compressor import Compressor
from ..costs import present_costs
from ..data import Dataset
from ..errors import InfeasibleBudgetError
from ..matricize import SPATIAL
from ..plan import make_plan
from ..recipe import Recipe
from ..structures import LowRank
from ..training import Report, Restart, fit, make_optimizer, steps_per_epoch
from .base import Method, Trained, build, calibration, example

STRENGTH = 1.0  # of the nuclear norm, per unit of learning rate


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    strength = recipe.strength or STRENGTH
    compressor = Compressor.as_published(model, optimizer, strength, steps_per_epoch(data, recipe))
    curve = fit(model, data, recipe, seed, optimizer, report=report, compressor=compressor, restart=restart)
    compressor.detach()
    structure = LowRank(matricization=SPATIAL)
    plan = make_plan(model, [structure], example(data))
    values, limit = spectra(plan), int(recipe.params * plan.params)
    low, high = 0, 1000  # thousandths of the energy: the largest that fits
    while low < high:
        middle = (low + high + 1) // 2
        fits = present_costs(plan, ["params"], energy_ranks(plan, values, middle / 1000))[0] <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    if low == 0:
        raise InfeasibleBudgetError(f"params = {recipe.params}: out of reach for one share of energy in all layers", 1.0)
    done = compress(model, structure, energy=low / 1000, example_inputs=example(data), calibration=calibration(data))
    return Trained(model, curve, done, notes=[f"strength {strength:g}, every layer keeps {low / 10:.1f} % of its energy"])


AS_PUBLISHED = Method("Alvarez & Salzmann 2017, as published", train)
