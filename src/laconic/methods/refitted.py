"""Train dense (or start from trained weights), cut once, fit the layers to what they put out before (`laconic.compress(refit=True)`), train on."""

from __future__ import annotations

from ..budget import Budget
from ..compaction import compress
from ..data import Dataset
from ..recipe import Recipe
from ..report import CompactReport
from ..training import Report, make_optimizer
from .base import Method, Trained, build, cut_and_train_on, cut_share, example, sample
from .ours import compressor_for

CUT = 0.2  # setting: the share of the run after which the network is cut
FITTED = 512  # training images that the layers are fitted on


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
    stand_in = build(data, recipe, seed)
    structures = compressor_for(stand_in, make_optimizer(stand_in, recipe), data, recipe).structures
    model = build(data, recipe, seed)
    budget = Budget(params=recipe.params, macs=recipe.macs or None)

    def cut() -> CompactReport:
        batches = list(data.train_x[sample(data, FITTED)].to(data.device).split(128))
        return compress(model, structures, budget, example_inputs=example(data), calibration=batches, refit=True)

    curve, done = cut_and_train_on(model, data, recipe, seed, cut_share(recipe, CUT), cut, report)
    return Trained(model, curve, done)


REFITTED = Method("laconic, cut once and fitted", train, (CUT, 0.35, 0.5), resumes=False)
