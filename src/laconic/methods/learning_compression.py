r"""LC rank learning (Idelbayev & Carreira-Perpinan 2020): weights are pulled ever harder towards the nearest network that fits the budget.

.. math:: \min_W L(W) + \tfrac{\mu}{2} \sum_l \|W_l - \Delta_l\|_F^2, \qquad \Delta = \operatorname{argmin}_{\text{cost} \le \text{budget}} \|W - \Delta\|^2

The pull is decoupled from the loss, as AdamW's decay is. In the paper the ranks of the C step come from a price for each unit; here from the budget, by the
same global rule as everywhere, so that the end is the same size. At the end the weights are replaced by :math:`\Delta`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..budget import Budget, ranks_for_budget
from ..compaction import spectra
from ..data import Dataset
from ..plan import make_plan
from ..recipe import Recipe
from ..structures import LowRank
from ..training import Report, Restart, fit, make_optimizer, steps_per_epoch
from . import svd
from .base import Method, Trained, build, example

FIRST, ROUNDS, GROWTH = 1.0, 30, 1.15  # setting: mu in the first C step, on the scale of a weight decay; C steps; growth of mu


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """It cannot resume: the run starts afresh."""
    del restart
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    plan = make_plan(model, [LowRank(matricization=recipe.matricization, inputs=False)], example(data))
    budget = Budget(params=recipe.params)
    every = max(1, recipe.epochs * steps_per_epoch(data, recipe) // ROUNDS)
    targets: dict[Tensor, Tensor] = {}
    done = itertools.count(1)
    mu = (recipe.setting or FIRST) / GROWTH

    @torch.no_grad()
    def pull(*_: object) -> None:
        nonlocal mu
        step = next(done)
        if step % every == 0:
            mu *= GROWTH
            ranks = ranks_for_budget(plan, spectra(plan), budget)
            for site in plan.sites:
                rank = ranks[site.name]
                u, s, vh = torch.linalg.svd(site.matrix, full_matrices=False)
                kept = s.shape[-1] if rank is None else rank
                targets[site.weights[0]] = site.unfolding.fold((u[..., :kept] * s[..., None, :kept]) @ vh[..., :kept, :])
        share = min(1.0, optimizer.param_groups[0]["lr"] * mu)
        for weight, target in targets.items():
            weight.lerp_(target, share)

    optimizer.register_step_post_hook(pull)
    return svd.cut(Trained(model, fit(model, data, recipe, seed, optimizer, report=report)), data, recipe)


LC = Method("LC rank learning", train, (FIRST, 0.2, 5.0))
