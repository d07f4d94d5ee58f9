r"""Trained Rank Pruning (Xu et al. 2018): every few steps each weight is replaced by its truncated SVD, and training goes on from there.

In the step that follows, whose gradient is taken at the truncated weights, the nuclear norm's subgradient there, :math:`\lambda U_r V_r^T`, is added to it. At the end the
weights are of low rank, and are cut by the same global rule; no training after it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..allocate import energy_rule
from ..data import Dataset
from ..matricize import Layer, Unfolding, choose_unfolding, unfoldings
from ..recipe import Recipe
from ..training import Report, fit, make_optimizer
from . import svd
from .base import Method, Trained, build

NUCLEAR, EVERY, ENERGY = 1e-3, 5, 0.9  # setting: strength lambda; steps between truncations and kept energy as in the paper's script


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
    """The first layer and the last are left alone, as in the paper."""
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    layers: list[tuple[Layer, Unfolding]] = [(m, choose_unfolding(m, recipe.matricization)) for m in model.modules() if unfoldings(m)][1:-1]
    directions: dict[Tensor, Tensor] = {}
    done = itertools.count(1)

    @torch.no_grad()
    def add_subgradients(*_: object) -> None:
        for weight, direction in directions.items():
            if weight.grad is not None:
                weight.grad.add_(direction, alpha=recipe.setting or NUCLEAR)
        directions.clear()

    @torch.no_grad()
    def truncate(*_: object) -> None:
        if next(done) % EVERY:
            return
        for module, unfolding in layers:
            u, s, vh = torch.linalg.svd(unfolding.unfold(module.weight), full_matrices=False)
            rank = energy_rule(torch.linalg.vector_norm(s.double(), dim=0).cpu().numpy(), ENERGY)
            u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
            module.weight.copy_(unfolding.fold((u * s[..., None, :]) @ vh))
            directions[module.weight] = unfolding.fold(u @ vh)

    optimizer.register_step_pre_hook(add_subgradients)
    optimizer.register_step_post_hook(truncate)
    return svd.cut(Trained(model, fit(model, data, recipe, seed, optimizer, report=report)), data, recipe)


TRP = Method("TRP, then SVD", train, (NUCLEAR, 1e-4, 3e-4), resumes=False)
