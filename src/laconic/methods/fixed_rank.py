r"""Networks of fixed rank, one share of the full rank for all layers but the first and the last: Pufferfish, spectral initialisation.

- Pufferfish (Wang et al. 2021): dense for a while, then each weight's truncated SVD, then training goes on.
- Spectral initialisation with Frobenius decay (Khodak et al. 2021): from scratch, the factors of each layer are the truncated SVD of its
  random weight, and instead of the factors' norms that of their product decays,

  .. math:: \tfrac{\lambda}{2} \|A B\|_F^2, \qquad \nabla_A = \lambda A B B^T, \quad \nabla_B = \lambda A^T A B

  decoupled from the loss as in AdamW.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from ..data import Dataset
from ..errors import InfeasibleBudgetError
from ..matricize import choose_unfolding, unfoldings
from ..measure import count_params
from ..recipe import Recipe
from ..surgery.factorize import factorize, pair_matrices, pair_weights
from ..surgery.factorize import weights as pair_parameters
from ..surgery.record import put
from ..training import Report, Restart, fit, make_optimizer, steps_per_epoch
from .base import Method, Trained, build

WARM_UP = 0.25  # share of the run that Pufferfish trains dense; the paper's 80 of 300 epochs on CIFAR-10


def factorise_all(model: nn.Module, recipe: Recipe) -> list[tuple[nn.Sequential, Any]]:
    """Replace the layers in place, at the largest share of the full rank that fits the budget; the pairs with their unfoldings."""
    layers: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if unfoldings(m)][1:-1]
    options = [(name, m, choose_unfolding(m, recipe.matricization)) for name, m in layers]
    fixed = count_params(model) - sum(u.dense_params for _, _, u in options)
    limit = int(recipe.params * count_params(model))
    chosen = None
    for share in range(1, 1001):
        ranks = [max(1, round(share / 1000 * u.full_rank)) for _, _, u in options]
        if fixed + sum(r * u.unit_params for r, (_, _, u) in zip(ranks, options, strict=True)) > limit:
            break
        chosen = ranks
    if chosen is None:
        raise InfeasibleBudgetError(f"params = {recipe.params}: out of reach with rank 1 in all layers but the first and the last", 1.0)
    pairs = []
    for rank, (name, module, unfolding) in zip(chosen, options, strict=True):
        pair = factorize(module, unfolding, rank)
        put(model, name, pair)
        pairs.append((pair, unfolding))
    return pairs


def pufferfish(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """The optimizer starts afresh at the cut, as in the paper's code. It cannot resume: the run starts afresh."""
    del restart
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    last = round(WARM_UP * recipe.epochs * steps_per_epoch(data, recipe))
    done = itertools.count(1)

    def cut(*_: Any) -> None:
        if next(done) == last:
            factorise_all(model, recipe)
            optimizer.state.clear()
            for group, fresh in zip(optimizer.param_groups, make_optimizer(model, recipe).param_groups, strict=True):
                group["params"] = fresh["params"]

    optimizer.register_step_post_hook(cut)
    return Trained(model, fit(model, data, recipe, seed, optimizer, report=report), notes=[f"factorised at step {last}"])


def spectral_init(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    del restart
    model = build(data, recipe, seed)
    pairs = factorise_all(model, recipe)
    optimizer = make_optimizer(model, recipe)
    factors = {p for pair, _ in pairs for p in pair_parameters(pair)}
    decayed = optimizer.param_groups[0]
    decayed["params"] = [p for p in decayed["params"] if p not in factors]
    optimizer.add_param_group({"params": list(factors), "weight_decay": 0.0})

    @torch.no_grad()
    def decay(*_: Any) -> None:
        rate = optimizer.param_groups[-1]["lr"] * recipe.weight_decay
        for pair, unfolding in pairs:
            a, b = pair_matrices(unfolding, *pair_parameters(pair))
            steps = pair_weights(unfolding, a @ (b @ b.mT), (a.mT @ a) @ b)
            for factor, step in zip(pair_parameters(pair), steps, strict=True):
                factor.sub_(rate * step)

    optimizer.register_step_post_hook(decay)
    return Trained(model, fit(model, data, recipe, seed, optimizer, report=report))


PUFFERFISH = Method("Pufferfish", pufferfish)
SPECTRAL_INIT = Method("spectral initialisation, Frobenius decay", spectral_init)
