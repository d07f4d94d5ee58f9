"""torchao's PAT, the package itself: `PruneOptimizer` keeps ever fewer singular values of each weight, then holds that rank while training goes on.

All layers but the first and the last keep the same share of their full rank, the largest that fits the budget; at the end they are cut to it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..data import Dataset
from ..errors import missing_extra
from ..recipe import Recipe
from ..training import Report, fit, make_optimizer, steps_per_epoch
from .base import Method, Trained, build
from .fixed_rank import factorise_all, shares_of_rank

HEAL = 0.35  # setting: the share of the run by which the ranks have fallen
WARM_UP, EVERY = 0.1, 10  # the share before they begin to; steps between decompositions


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
    try:
        from torchao.prototype.pat.optim import PruneOptimizer
    except ImportError:
        raise missing_extra("torchao", "rivals", "the method pat") from None
    model = build(data, recipe, seed)
    ranks = shares_of_rank(model, recipe)
    inner = make_optimizer(model, recipe)
    decayed = inner.param_groups[0]
    shared = {k: v for k, v in decayed.items() if k != "params"}
    for name, (unfolding, rank) in ranks.items():
        weight = model.get_submodule(name).weight
        decayed["params"] = [p for p in decayed["params"] if p is not weight]
        config = {"prox_type": "MinRankConstraint", "group_type": "SVDGrouper", "prox_freq": EVERY, "min_sparsity_schedule": True}
        inner.add_param_group(
            {**shared, **config, "params": [weight], "min_sparsity": (unfolding.full_rank - rank - 0.5) / unfolding.full_rank}
        )  # PAT rounds up
    total = recipe.epochs * steps_per_epoch(data, recipe)
    heal = round((recipe.setting or HEAL) * total)
    optimizer: Any = PruneOptimizer(inner, warmup_steps=round(WARM_UP * total), healing_start_step=heal)
    curve = fit(model, data, recipe, seed, optimizer, report=report)
    factorise_all(model, ranks)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(model, curve, notes=[f"ranks {[r for _, r in ranks.values()]}"])


PAT = Method("torchao PAT, ranks", train, (HEAL, 0.2, 0.5), resumes=False)
