"""Post hoc: the dense network, cut after training by SVD; BatchNorm re-estimated. Three ways to choose the ranks:

- all layers together by the product rule (laconic's own);
- every layer keeps the same share of its energy, the largest that fits the budget;
- by what the layers' outputs lose instead of the weights (activation-aware, as SVD-LLM): see `activation_aware.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..budget import Budget
from ..compaction import compress, energy_ranks, spectra
from ..costs import present_costs
from ..data import Dataset
from ..errors import InfeasibleBudgetError
from ..plan import make_plan
from ..recipe import Recipe
from ..report import CompactReport
from ..structures import LowRank
from ..training import Report, Restart
from . import dense
from .base import Method, Trained, build, calibration, cut_and_train_on, cut_share, example

Cut = Callable[[nn.Module, Dataset, Recipe], CompactReport]
AT = 0.35  # setting of the one that trains on: the share of the run after which the network is cut


def by_product(model: nn.Module, data: Dataset, recipe: Recipe) -> CompactReport:
    """All layers together, in place."""
    return compress(
        model, LowRank(matricization=recipe.matricization, inputs=False), Budget(params=recipe.params),
        example_inputs=example(data), calibration=calibration(data),
    )  # fmt: skip


def by_energy(model: nn.Module, data: Dataset, recipe: Recipe, matricization: str | None = None) -> tuple[CompactReport, float]:
    """Every layer by the same share of its energy, in place; the share.

    Raises:
        InfeasibleBudgetError: with a thousandth of the energy it is still too large.
    """
    structure = LowRank(matricization=matricization or recipe.matricization, inputs=False)
    plan = make_plan(model, [structure], example(data))
    values, limit = spectra(plan), int(recipe.params * plan.params)
    low, high = 0, 1000  # thousandths of the energy: the largest that fits
    while low < high:
        middle = (low + high + 1) // 2
        fits = present_costs(plan, ["params"], energy_ranks(plan, values, middle / 1000))[0] <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    if low == 0:
        raise InfeasibleBudgetError(f"params = {recipe.params}: out of reach for one share of energy in all layers", 1.0)
    return compress(model, structure, energy=low / 1000, example_inputs=example(data), calibration=calibration(data)), low / 1000


def cut(base: Trained, data: Dataset, recipe: Recipe) -> Trained:
    """Of a trained dense network; it is changed."""
    return Trained(base.model, base.curve, by_product(base.model, data, recipe))


def post_hoc(label: str, smaller: Cut) -> Method:
    def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
        base = dense.train(data, recipe, seed, report, restart)
        return Trained(base.model, base.curve, smaller(base.model, data, recipe))

    return Method(label, train)


def trained_on(label: str, smaller: Cut, settings: tuple[float, ...]) -> Method:
    def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
        model = build(data, recipe, seed)
        return Trained(
            model,
            *cut_and_train_on(model, data, recipe, seed, cut_share(recipe, settings[0]), lambda: smaller(model, data, recipe), report),
        )

    return Method(label, train, settings, resumes=False)


SVD = post_hoc("dense, then SVD", by_product)
SVD_ENERGY = post_hoc("dense, then SVD by energy", lambda *given: by_energy(*given)[0])
SVD_ENERGY_TUNED = trained_on("dense, cut by SVD by energy, trained on", lambda *given: by_energy(*given)[0], (AT, 0.2, 0.5))
