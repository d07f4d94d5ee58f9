r"""Pressure without decompositions, dense to the end, then cut by the same global rule: spectral weight decay, SLORR.

With the polar factor :math:`P = U V^T` of a weight :math:`W = U S V^T`, from a few products (Newton-Schulz), after each step

- spectral weight decay (2026), and SLORR's nuclear norm: :math:`W \leftarrow W - \eta \lambda P`;
- SLORR's Hoyer ratio (2026), of :math:`(\|W\|_* / \|W\|_F)^2`:
  :math:`W \leftarrow W - \eta \lambda\, 2 \rho\, (P / \|W\|_F - \rho\, W / \|W\|_F^2)` with :math:`\rho = \langle W, P \rangle / \|W\|_F`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data import Dataset
from ..matricize import Layer, Unfolding, choose_unfolding, unfoldings
from ..recipe import Recipe
from ..training import Report, Restart, fit, make_optimizer
from . import svd
from .base import Method, Trained, build

Direction = Callable[[Tensor, Tensor], Tensor]
QUINTIC = (3.4445, -4.7750, 2.0315)  # of Muon: singular values end between 0.7 and 1.2
SPECTRAL_DECAY, HOYER = (0.3, 0.1, 1.0), (0.1, 0.03, 0.3)  # settings: the strength lambda, on the scale of a weight decay


def polar(x: Tensor, iterations: int = 5) -> Tensor:
    """The polar factor, nearly: all singular values that are not tiny become about 1."""
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    y = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(1e-12)
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if wide is not x else y


def nuclear(x: Tensor, factor: Tensor) -> Tensor:
    """The (sub)gradient of the nuclear norm."""
    del x
    return factor


def hoyer(x: Tensor, factor: Tensor) -> Tensor:
    """The gradient of the squared ratio of the nuclear and the Frobenius norm."""
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-12)
    ratio = (x * factor).sum((-2, -1), keepdim=True) / norm
    return 2 * ratio * (factor / norm - ratio * x / norm.square())


def pressed(label: str, direction: Direction, strengths: Sequence[float]) -> Method:
    def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
        model = build(data, recipe, seed)
        optimizer = make_optimizer(model, recipe)
        layers: list[tuple[Layer, Unfolding]] = [(m, choose_unfolding(m, recipe.matricization)) for m in model.modules() if unfoldings(m)]

        @torch.no_grad()
        def press(*_: object) -> None:
            rate = optimizer.param_groups[0]["lr"] * (recipe.setting or strengths[0])
            for module, unfolding in layers:
                x = unfolding.unfold(module.weight)
                module.weight.sub_(rate * unfolding.fold(direction(x, polar(x))))

        optimizer.register_step_post_hook(press)
        curve = fit(model, data, recipe, seed, optimizer, report=report, restart=restart)
        return svd.cut(Trained(model, curve), data, recipe)

    return Method(label, train, strengths)


SPECTRAL_WEIGHT_DECAY = pressed("spectral weight decay, then SVD", nuclear, SPECTRAL_DECAY)
SLORR_HOYER = pressed("SLORR-Hoyer, then SVD", hoyer, HOYER)
