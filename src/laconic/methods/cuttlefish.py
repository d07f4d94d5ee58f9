r"""Cuttlefish's rank rule (Wang et al. 2023): train dense until the stable ranks stand still, then cut each layer to its own.

.. math:: \rho(W) = \|W\|_F^2 / \sigma_1^2, \qquad \text{rank} \propto \rho(W_t)\, \frac{\text{full rank}}{\rho(W_0)}

scaled by one factor for all layers so that the network fits the budget (the paper's factor is 1 and its size what comes out). Standing still is judged by
the net change over five looks (the paper: the mean size of the gradient of a smoothed curve). After the cut
the products of the factors decay. The first layer and the last stay whole, as in Pufferfish (the paper times how many of the first to leave).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..data import Dataset
from ..matricize import Unfolding, choose_unfolding
from ..measure import count_params
from ..recipe import Recipe
from ..training import Report, fit, make_optimizer, steps_per_epoch
from .base import Method, Trained, build, one_share, start_afresh
from .fixed_rank import decay_products, factorise_all, inner_layers

STILL = 0.3  # setting: change of a scaled stable rank, in ranks per epoch of the paper's 300, below which it stands still
LOOKS, SMOOTH, PAPER_EPOCHS = 60, 5, 300  # how often the ranks are looked at during the run; a trend is that of so many looks
LATEST = 0.5  # share of the run by which it is cut in any case
FROBENIUS_DECAY = 0.05  # on the scale of a weight decay


def stable_rank(matrix: Tensor) -> float:
    """Of a matrix [g, m, n]: the mean of its groups."""
    values = torch.linalg.svdvals(matrix)
    return float((values.square().sum(-1) / values[..., 0].square().clamp_min(1e-30)).mean())


def stands_still(past: list[float], still: float) -> bool:
    """Whether the trend over the last looks is below `still` per paper's epoch."""
    if len(past) <= SMOOTH:
        return False
    return abs(past[-1] - past[-1 - SMOOTH]) / SMOOTH * LOOKS / PAPER_EPOCHS <= still


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    total = recipe.epochs * steps_per_epoch(data, recipe)
    every = max(1, total // LOOKS)
    layers: dict[str, tuple[Unfolding, Tensor]] = {n: (choose_unfolding(m, recipe.matricization), m.weight) for n, m in inner_layers(model)}
    first = {name: stable_rank(u.unfold(w.detach())) for name, (u, w) in layers.items()}
    past: dict[str, list[float]] = {name: [] for name in layers}
    done, notes = itertools.count(1), list[str]()

    def look(*_: object) -> None:
        step = next(done)
        if notes or step % every:
            return
        for name, (u, w) in layers.items():
            past[name].append(stable_rank(u.unfold(w.detach())) * u.full_rank / first[name])
        if step >= LATEST * total or all(stands_still(p, recipe.setting or STILL) for p in past.values()):
            cut(step)

    def cut(step: int) -> None:
        def rank(name: str, share: float) -> int:
            return max(1, min(layers[name][0].full_rank, round(share * past[name][-1])))

        whole = count_params(model)
        costs = [lambda share, n=name, u=u: rank(n, share) * u.unit_params for name, (u, _) in layers.items()]
        fixed = whole - sum(u.dense_params for u, _ in layers.values())
        share = one_share(recipe, int(recipe.params * whole), fixed, costs)
        pairs = factorise_all(model, {name: (u, rank(name, share)) for name, (u, _) in layers.items()})
        start_afresh(optimizer, model, recipe)
        decay_products(optimizer, pairs, FROBENIUS_DECAY)
        notes.append(f"cut at step {step} to {share:g} times the scaled stable ranks")

    optimizer.register_step_post_hook(look)
    return Trained(model, fit(model, data, recipe, seed, optimizer, report=report), notes=notes)


CUTTLEFISH = Method("Cuttlefish's ranks", train, (STILL, 0.03, 0.1), resumes=False)
