r"""LC rank learning (Idelbayev & Carreira-Perpinan 2020): weights are pulled ever harder towards the nearest network of low rank.

.. math:: \min_W L(W) + \tfrac{\mu}{2} \sum_l \|W_l - \Delta_l\|_F^2, \qquad
    \Delta_l = \operatorname{argmin}_\Delta \lambda C_l(\operatorname{rank} \Delta) + \tfrac12 \|W_l - \Delta\|_F^2

The price :math:`\lambda` of a parameter in the C steps is the smallest at which the network fits the budget (the paper gives the price, and takes the size that
comes out). The pull is decoupled from the loss, as AdamW's decay is, and does not fall with the learning rate: each of the paper's L steps starts at
the full one. Then the weights are replaced by :math:`\Delta`, and the pairs train on, for a fifth of the run as in the paper's code.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from ..allocate import Floats
from ..data import Dataset
from ..matricize import Unfolding, choose_unfolding, unfoldings
from ..measure import count_params
from ..recipe import Recipe
from ..training import Report, fit, make_optimizer, steps_per_epoch
from .base import Method, Trained, build, start_afresh
from .fixed_rank import factorise_all

FIRST, ROUNDS, GROWTH = 0.1, 30, 1.3  # setting: mu in the first C step, on the scale of a weight decay; C steps; growth of mu
CUT = 0.8  # of the run: the C steps end


def ranks_at(price: float, layers: dict[str, Unfolding], values: dict[str, Floats]) -> dict[str, int]:
    """Of each layer the rank with the least price of its parameters plus half of the squares that are cut off; its full rank: stays whole."""
    ranks = {}
    for name, u in layers.items():
        squares = np.append(np.square(values[name]), 0.0)
        options = np.arange(1, u.full_rank + 1)
        costs = np.where(options < u.full_rank, options * u.unit_params, u.dense_params)
        lost = squares[::-1].cumsum()[::-1][options]
        ranks[name] = int(options[np.argmin(price * costs + lost / 2)])
    return ranks


def size(ranks: dict[str, int], layers: dict[str, Unfolding]) -> int:
    return sum(u.dense_params if ranks[n] == u.full_rank else ranks[n] * u.unit_params for n, u in layers.items())


def ranks_within(limit: int, layers: dict[str, Unfolding], values: dict[str, Floats]) -> dict[str, int]:
    """Those at the smallest price, to a thousandth, at which all layers together have at most so many parameters."""
    low, high = 1e-12, 1e6
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if size(ranks_at(middle, layers, values), layers) <= limit else (middle, high)
    return ranks_at(high, layers, values)


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    modules = {name: m for name, m in model.named_modules() if unfoldings(m)}
    layers = {name: choose_unfolding(m, recipe.matricization) for name, m in modules.items()}
    whole = count_params(model)
    limit = int(recipe.params * whole) - whole + sum(u.dense_params for u in layers.values())
    last = round(CUT * recipe.epochs * steps_per_epoch(data, recipe))
    every = max(1, last // ROUNDS)
    targets: dict[Tensor, Tensor] = {}
    done = itertools.count(1)
    mu = (recipe.setting or FIRST) / GROWTH

    def c_step() -> dict[str, int]:
        found = {n: torch.linalg.svd(u.unfold(modules[n].weight.detach()), full_matrices=False) for n, u in layers.items()}
        values = {n: np.sqrt(s.double().square().sum(0).cpu().numpy()) for n, (_, s, _) in found.items()}
        ranks = ranks_within(limit, layers, values)
        for n, (u, s, vh) in found.items():
            r = ranks[n]
            targets[modules[n].weight] = layers[n].fold((u[..., :r] * s[..., None, :r]) @ vh[..., :r, :])
        return ranks

    @torch.no_grad()
    def pull(*_: object) -> None:
        nonlocal mu
        step = next(done)
        if step > last:
            return
        if step == last:
            ranks = c_step()
            factorise_all(model, {n: (layers[n], r) for n, r in ranks.items() if r < layers[n].full_rank})
            start_afresh(optimizer, model, recipe)
            return
        if step % every == 0:
            mu *= GROWTH
            c_step()
        for weight, target in targets.items():
            weight.lerp_(target, min(1.0, recipe.lr * mu))

    optimizer.register_step_post_hook(pull)
    return Trained(model, fit(model, data, recipe, seed, optimizer, report=report), notes=[f"cut at step {last}"])


LC = Method("LC rank learning", train, (FIRST, 0.03, 0.3), resumes=False)
