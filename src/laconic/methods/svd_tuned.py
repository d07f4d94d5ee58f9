"""Train dense, cut once by the same global rule, train on: laconic without any pressure, and without cuts on the way.

Into pairs, as one SVD gives, or also into three layers where that is better, as laconic does.
"""

from __future__ import annotations

from functools import partial

from ..budget import Budget
from ..compressor import Compressor
from ..data import Dataset
from ..recipe import Recipe
from ..schedule import Schedule
from ..structures import LowRank
from ..training import Report, Restart, fit, make_optimizer, steps_per_epoch
from .base import Method, Trained, build, cut_share, example

CUT = 0.2  # setting: the share of the run after which the network is cut


def train(
    data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None, inputs: bool = False
) -> Trained:
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    total = recipe.epochs * steps_per_epoch(data, recipe)
    compressor = Compressor(
        model, optimizer, LowRank(strength=0.0, matricization=recipe.matricization, inputs=inputs), budget=Budget(params=recipe.params), total_steps=total,
        example_inputs=example(data), every=total, schedule=Schedule(warmup=0.0, settle=cut_share(recipe, CUT)),
    )  # fmt: skip
    curve = fit(model, data, recipe, seed, optimizer, report=report, compressor=compressor, restart=restart)
    return Trained(model, curve, compressor.compact(), total_steps=total)


SVD_TUNED = Method("dense, cut by SVD, trained on", train, (CUT, 0.35, 0.5))
CUT_ONCE = Method("laconic without pressure, cut once", partial(train, inputs=True), (CUT, 0.35, 0.5))
