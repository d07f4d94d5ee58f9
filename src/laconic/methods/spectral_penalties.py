r"""Pressure without decompositions, then cut by the same global rule, after training or in mid-run: spectral weight decay, SLORR.

With the polar factor :math:`P = U V^T` of a weight :math:`W = U S V^T`, from a few products, after each step

- spectral weight decay (2026; five steps of Muon's iteration), and SLORR's nuclear norm (2026; six steps of Polar Express, Amsel et al. 2025):
  :math:`W \leftarrow W - \eta \lambda P`;
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
from ..report import CompactReport
from ..training import Report, Restart, fit, make_optimizer, steps_per_epoch
from . import svd
from .base import Method, Trained, after_step, build, start_afresh

Direction = Callable[[Tensor, Tensor], Tensor]
Polynomials = Sequence[tuple[float, float, float]]  # a x + b x^3 + c x^5, one for each step
# settings: the strength lambda, on the scale of a weight decay
SPECTRAL_DECAY, SLORR, SLORR_TRAINED_ON = (1.0, 0.3, 3.0), (3.0, 1.0, 10.0), (0.1, 0.03, 0.3)
QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5  # of Muon: singular values end between 0.7 and 1.2
POLAR_EXPRESS = (  # the best polynomials for singular values from 0.001 on, one after the other
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)


def polar(x: Tensor, polynomials: Polynomials = QUINTIC) -> Tensor:
    """The polar factor, nearly: all singular values that are not tiny become about 1."""
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    y = wide / (1.01 * torch.linalg.matrix_norm(wide, keepdim=True)).clamp_min(1e-12)
    for a, b, c in polynomials:
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


def pressed(label: str, direction: Direction, strengths: Sequence[float], polynomials: Polynomials, cut_at: float = 1.0) -> Method:
    """Under pressure until this share of the run, then cut; where it is below 1 the optimizer starts afresh there, and the run cannot resume."""

    def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
        model = build(data, recipe, seed)
        optimizer = make_optimizer(model, recipe)
        layers: list[tuple[Layer, Unfolding]] = [(m, choose_unfolding(m, recipe.matricization)) for m in model.modules() if unfoldings(m)]
        done: list[CompactReport] = []

        @torch.no_grad()
        def press(*_: object) -> None:
            rate = optimizer.param_groups[0]["lr"] * (recipe.setting or strengths[0])
            for module, unfolding in () if done else layers:
                x = unfolding.unfold(module.weight)
                module.weight.sub_(rate * unfolding.fold(direction(x, polar(x, polynomials))))

        def cut() -> None:
            done.append(svd.by_product(model, data, recipe))
            start_afresh(optimizer, model, recipe)

        optimizer.register_step_post_hook(press)
        if cut_at == 1:
            return svd.cut(Trained(model, fit(model, data, recipe, seed, optimizer, report=report, restart=restart)), data, recipe)
        after_step(optimizer, round(cut_at * recipe.epochs * steps_per_epoch(data, recipe)), cut)
        return Trained(model, fit(model, data, recipe, seed, optimizer, report=report), done[0])

    return Method(label, train, strengths, resumes=cut_at == 1)


SPECTRAL_WEIGHT_DECAY = pressed("spectral weight decay, then SVD", nuclear, SPECTRAL_DECAY, QUINTIC)
SLORR_NUC = pressed("SLORR-Nuc, then SVD", nuclear, SLORR, POLAR_EXPRESS)
SLORR_HOYER = pressed("SLORR-Hoyer, then SVD", hoyer, SLORR, POLAR_EXPRESS)
SLORR_HOYER_TUNED = pressed("SLORR-Hoyer, cut, trained on", hoyer, SLORR_TRAINED_ON, POLAR_EXPRESS, cut_at=0.35)
