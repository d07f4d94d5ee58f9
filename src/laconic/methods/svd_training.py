r"""SVD training (Yang et al. 2020): each weight is trained as :math:`U \operatorname{diag}(s) V^T`, with a Hoyer penalty on s.

.. math:: L + \sum_l \frac{\|U^T U - I\|^2 + \|V^T V - I\|^2}{r^2} + \lambda \frac{\|s\|_1}{\|s\|_2}

Then the smallest s go, here to the budget by the same global rule as everywhere, and the smaller network trains on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..data import Dataset
from ..matricize import Layer, Unfolding, choose_unfolding, unfoldings
from ..recipe import Recipe
from ..report import CompactReport
from ..training import Report, cross_entropy
from . import svd
from .base import Method, Trained, build, cut_and_train_on

HOYER = 0.1  # setting: lambda
ORTHOGONAL, CUT = 1.0, 0.5  # strength of the orthogonality; the share of the run after which the network is cut


class ThreeFactors(nn.Module):
    """A weight as `U diag(s) V^T`."""

    def __init__(self, unfolding: Unfolding):
        super().__init__()
        self.unfolding = unfolding

    def forward(self, u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
        return self.unfolding.fold((u * s[..., None, :]) @ vh)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(self.unfolding.unfold(weight), full_matrices=False)
        return u.contiguous(), s, vh.contiguous()


def penalty(u: Tensor, s: Tensor, vh: Tensor, hoyer: float) -> Tensor:
    """Of one weight."""
    eye = torch.eye(s.shape[-1], device=s.device)
    skew = (u.mT @ u - eye).square().sum() + (vh @ vh.mT - eye).square().sum()
    value: Tensor = ORTHOGONAL * skew / s.shape[-1] ** 2 + hoyer * (s.abs().sum(-1) / s.norm(dim=-1).clamp_min(1e-12)).sum()
    return value


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
    model = build(data, recipe, seed)
    layers: list[Layer] = [m for m in model.modules() if unfoldings(m)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", ThreeFactors(choose_unfolding(layer, recipe.matricization)))
    whole = list(layers)  # empty once they are cut

    def loss(outputs: Tensor, _: Tensor, y: Tensor) -> Tensor:
        value = cross_entropy(outputs, y, recipe.label_smoothing)
        for layer in whole:
            held = layer.parametrizations.weight
            value = value + penalty(held.original0, held.original1, held.original2, recipe.setting or HOYER)
        return value

    def cut() -> CompactReport:
        while whole:
            parametrize.remove_parametrizations(whole.pop(), "weight")
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return svd.by_product(model, data, recipe)

    return Trained(model, *cut_and_train_on(model, data, recipe, seed, CUT, cut, report, loss=loss))


SVD_TRAINING = Method("SVD training with Hoyer, cut, trained on", train, (HOYER, 0.01, 0.3), resumes=False)
