r"""Tucker-2 and CP (tensorly): train dense, decompose every convolution between the first layer and the last, train on.

- Tucker-2 (Kim et al. 2016): :math:`W_{oikl} \approx \sum_{ab} U_{oa} V_{ib} G_{abkl}` becomes 1 x 1, k x l, 1 x 1.
- CP (Lebedev et al. 2015): :math:`W_{oikl} \approx \sum_r A_{or} B_{ir} C_{kr} D_{lr}` becomes 1 x 1, k x 1 and 1 x l for each channel, 1 x 1.

A linear layer is a matrix, for which both are its truncated SVD. All layers keep the same share: of their two widths (Tucker-2), of
their parameters (CP), of their full rank (linear ones); the largest that fits the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Dataset
from ..errors import InvalidValueError, missing_extra
from ..matricize import choose_unfolding
from ..measure import count_params
from ..recipe import Recipe
from ..surgery.factorize import factorize
from ..surgery.record import put
from ..training import Report
from .base import Method, Trained, build, cut_and_train_on, cut_share, one_share
from .fixed_rank import inner_layers

CUT = 0.35  # setting: the share of the run after which the layers are decomposed


@dataclass(frozen=True, slots=True)
class Small:
    """What may stand in a layer's place: how many parameters at a share, and the layers."""

    cost: Callable[[float], int]
    make: Callable[[float], nn.Sequential]


def svd(layer: Any) -> Small:
    unfolding = choose_unfolding(layer, "out,in*kh*kw")

    def rank(share: float) -> int:
        return max(1, round(share * unfolding.full_rank))

    return Small(lambda share: rank(share) * unfolding.unit_params, lambda share: factorize(layer, unfolding, rank(share)))


def tucker(conv: nn.Conv2d) -> Small:
    o, i, kh, kw = conv.weight.shape

    def ranks(share: float) -> list[int]:
        return [max(1, round(share * o)), max(1, round(share * i))]

    def cost(share: float) -> int:
        a, b = ranks(share)
        return o * a + i * b + a * b * kh * kw

    def make(share: float) -> nn.Sequential:
        from tensorly.decomposition import partial_tucker

        (core, (left, right)), _ = partial_tucker(conv.weight.detach(), rank=ranks(share), modes=[0, 1], init="svd")
        return chain(conv, [(right.mT[:, :, None, None], 1), (core, 1), (left[:, :, None, None], 1)], spatial=[1])

    return Small(cost, make)


def cp(conv: nn.Conv2d) -> Small:
    o, i, kh, kw = conv.weight.shape

    def rank(share: float) -> int:
        return max(1, round(share * conv.weight.numel() / (o + i + kh + kw)))

    def make(share: float) -> nn.Sequential:
        from tensorly.decomposition import parafac

        r = rank(share)
        start = "svd" if r <= min(o, i) else "random"
        weights, factors = parafac(
            conv.weight.detach(), rank=r, init=start, n_iter_max=100, tol=1e-6, normalize_factors=True, random_state=0
        )
        a, b, c, d = (f * weights.abs().pow(0.25) for f in factors)  # of equal length, for training
        a = a * weights.sign()
        parts = [(b.mT[:, :, None, None], 1), (c.mT[:, None, :, None], r), (d.mT[:, None, None, :], r), (a[:, :, None, None], 1)]
        return chain(conv, parts, spatial=[1, 2])

    return Small(lambda share: rank(share) * (o + i + kh + kw), make)


def chain(conv: nn.Conv2d, parts: Sequence[tuple[Tensor, int]], spatial: Sequence[int]) -> nn.Sequential:
    """Convolutions with these weights and groups one after the other; stride and padding go to those that are `spatial`, axis by axis."""
    layers: list[nn.Module] = []
    for n, (weight, groups) in enumerate(parts):
        kernel: Any = tuple(weight.shape[2:])
        axes = [len(spatial) == 1 or axis == spatial.index(n) for axis in (0, 1)] if n in spatial else [False, False]
        stride: Any = tuple(s if mine else 1 for s, mine in zip(conv.stride, axes, strict=True))
        padding: Any = conv.padding
        if not isinstance(padding, str):
            padding = tuple(p if mine else 0 for p, mine in zip(padding, axes, strict=True))
        last = n == len(parts) - 1
        layer = nn.Conv2d(
            weight.shape[1] * groups, weight.shape[0], kernel, stride, padding, groups=groups, bias=last and conv.bias is not None,
            device=weight.device,
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(weight)
            if last and conv.bias is not None and layer.bias is not None:
                layer.bias.copy_(conv.bias)
        layers.append(layer)
    return nn.Sequential(*layers)


def decompose(model: nn.Module, recipe: Recipe, convolution: Callable[[nn.Conv2d], Small]) -> float:
    """All layers but the first and the last, in place; the share that they keep."""
    options: dict[str, Small] = {}
    fixed = count_params(model)
    for name, layer in inner_layers(model):
        square = isinstance(layer, nn.Conv2d) and min(layer.kernel_size) > 1
        if square and (layer.groups > 1 or set(layer.dilation) != {1} or layer.padding_mode != "zeros"):
            raise InvalidValueError(f"{name}: groups, dilation and padding other than zeros are not decomposed here")
        options[name] = convolution(layer) if square else svd(layer)
        fixed -= layer.weight.numel()
    share = one_share(recipe, int(recipe.params * count_params(model)), fixed, [o.cost for o in options.values()])
    for name, option in options.items():
        put(model, name, option.make(share))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return share


def trained_on(label: str, convolution: Callable[[nn.Conv2d], Small]) -> Method:
    def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
        try:
            import tensorly
        except ImportError:
            raise missing_extra("tensorly", "rivals", "the methods tucker and cp") from None
        tensorly.set_backend("pytorch")
        model = build(data, recipe, seed)
        at = cut_share(recipe, CUT)
        curve, share = cut_and_train_on(model, data, recipe, seed, at, lambda: decompose(model, recipe, convolution), report)
        return Trained(
            model, curve, notes=[f"tensorly {tensorly.__version__}, share {share:g} of each layer, decomposed at {at:g} of the run"]
        )

    return Method(label, train, (CUT, 0.2, 0.5), resumes=False)


TUCKER = trained_on("dense, Tucker-2, trained on", tucker)
CP = trained_on("dense, CP, trained on", cp)
