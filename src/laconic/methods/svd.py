"""Post hoc: the dense network, cut after training by the same global rule; BatchNorm re-estimated, no training after it."""

from __future__ import annotations

from ..budget import Budget
from ..compaction import compress
from ..data import Dataset
from ..recipe import Recipe
from ..structures import LowRank
from ..training import Report, Restart
from . import dense
from .base import Method, Trained, calibration, example


def cut(base: Trained, data: Dataset, recipe: Recipe) -> Trained:
    """Of a trained dense network; it is changed."""
    done = compress(
        base.model, LowRank(matricization=recipe.matricization), Budget(params=recipe.params),
        example_inputs=example(data), calibration=calibration(data),
    )  # fmt: skip
    return Trained(base.model, base.curve, done)


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    return cut(dense.train(data, recipe, seed, report, restart), data, recipe)


SVD = Method("dense, then SVD", train)
