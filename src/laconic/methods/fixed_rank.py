r"""Networks of fixed rank, one share of the full rank for all layers but the first and the last: Pufferfish, spectral initialisation.

- Pufferfish (Wang et al. 2021): dense for a while, then each weight's truncated SVD, then training goes on.
- Spectral initialisation with Frobenius decay (Khodak et al. 2021): from scratch, the factors of each layer are the truncated SVD of its
  random weight, and instead of the factors' norms that of their product decays,

  .. math:: \tfrac{\lambda}{2} \|A B\|_F^2, \qquad \nabla_A = \lambda A B B^T, \quad \nabla_B = \lambda A^T A B

  decoupled from the loss as in AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..data import Dataset
from ..matricize import Unfolding, choose_unfolding, unfoldings
from ..measure import count_params
from ..recipe import Recipe
from ..surgery.factorize import factorize, pair_matrices, pair_weights
from ..surgery.factorize import weights as pair_parameters
from ..surgery.record import put
from ..training import Report, fit, make_optimizer
from .base import Method, Trained, build, cut_and_train_on, cut_share, one_share

WARM_UP = 0.1  # setting of Pufferfish: share of the run that it trains dense; the paper's is 80 of 300 epochs on CIFAR-10
FROBENIUS_DECAY = 0.5  # setting of the other: the strength lambda, on the scale of a weight decay
Pair = tuple[nn.Sequential, Unfolding]


def inner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """All layers but the first and the last, which papers of fixed ranks leave whole."""
    return [(name, m) for name, m in model.named_modules() if unfoldings(m)][1:-1]


def shares_of_rank(model: nn.Module, recipe: Recipe) -> dict[str, tuple[Unfolding, int]]:
    """The layers between the first and the last with their ranks: the largest share of the full rank that fits the budget."""
    options = {name: choose_unfolding(m, recipe.matricization) for name, m in inner_layers(model)}

    def rank(unfolding: Unfolding, share: float) -> int:
        return max(1, round(share * unfolding.full_rank))

    def cost(unfolding: Unfolding) -> Callable[[float], int]:
        return lambda share: rank(unfolding, share) * unfolding.unit_params

    whole = count_params(model)
    fixed = whole - sum(u.dense_params for u in options.values())
    share = one_share(recipe, int(recipe.params * whole), fixed, [cost(u) for u in options.values()])
    return {name: (u, rank(u, share)) for name, u in options.items()}


def factorise_all(model: nn.Module, ranks: dict[str, tuple[Unfolding, int]]) -> list[Pair]:
    """Replace these layers in place by pairs of these ranks."""
    pairs = []
    for name, (unfolding, rank) in ranks.items():
        layer: Any = model.get_submodule(name)
        pair = factorize(layer, unfolding, rank)
        put(model, name, pair)
        pairs.append((pair, unfolding))
    return pairs


def decay_products(optimizer: torch.optim.Optimizer, pairs: list[Pair], strength: float) -> None:
    """From now on Frobenius decay for these pairs, and no decay of their factors."""
    factors = {p for pair, _ in pairs for p in pair_parameters(pair)}
    decayed, free = optimizer.param_groups  # see `make_optimizer`; a scheduler would not know a new group
    decayed["params"] = [p for p in decayed["params"] if p not in factors]
    free["params"] = [*free["params"], *factors]

    @torch.no_grad()
    def decay(*_: Any) -> None:
        rate = free["lr"] * strength
        for pair, unfolding in pairs:
            a, b = pair_matrices(unfolding, *pair_parameters(pair))
            steps = pair_weights(unfolding, a @ (b @ b.mT), (a.mT @ a) @ b)
            for factor, step in zip(pair_parameters(pair), steps, strict=True):
                factor.sub_(rate * step)

    optimizer.register_step_post_hook(decay)


def pufferfish(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
    """The optimizer starts afresh at the cut, as in the paper's code."""
    model = build(data, recipe, seed)
    share = cut_share(recipe, WARM_UP)
    curve, _ = cut_and_train_on(model, data, recipe, seed, share, lambda: factorise_all(model, shares_of_rank(model, recipe)), report)
    return Trained(model, curve, notes=[f"factorised at {share:g} of the run"])


def spectral_init(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
    model = build(data, recipe, seed)
    pairs = factorise_all(model, shares_of_rank(model, recipe))
    optimizer = make_optimizer(model, recipe)
    decay_products(optimizer, pairs, recipe.setting or FROBENIUS_DECAY)
    return Trained(model, fit(model, data, recipe, seed, optimizer, report=report))


PUFFERFISH = Method("Pufferfish", pufferfish, (WARM_UP, 0.25, 0.5), resumes=False)
SPECTRAL_INIT = Method("spectral initialisation, Frobenius decay", spectral_init, (FROBENIUS_DECAY, 0.005, 0.05), resumes=False)
