"""One layer into two: `W = left @ right` as a pair of plain layers in an `nn.Sequential`.

Stride, padding, dilation and groups are divided between the two so that the pair computes, up to rounding, what the
layer with the truncated weight computes. The bias is the same `Parameter` object as before: an optimizer keeps it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..matricize import Layer, Unfolding
from ..solvers.eigen import eigh_inside
from ..solvers.factored import factored_svd
from ..solvers.gram import promoted_matmul, small_gram

MARK = "laconic_cut"  # attribute on the nn.Sequential: what was cut here, for the surgery record
SLIM = "laconic_slim"  # attribute on a layer or a pair: the dense numbers of the channels it still has (see channels.py)


def empty_pair(module: Layer, unfolding: Unfolding, rank: int, device: Any = None) -> nn.Sequential:
    """The two layers for this rank, uninitialised, without bias; on `device` (None: the weight's)."""
    weight = module.weight
    device = device or weight.device
    inner = unfolding.groups * rank
    if unfolding.name in ("out,in", "in,out"):
        out_features, in_features = (unfolding.m, unfolding.n) if unfolding.name == "out,in" else (unfolding.n, unfolding.m)
        wide: dict[str, Any] = {"bias": False, "dtype": weight.dtype, "device": "meta"}
        return nn.Sequential(nn.Linear(in_features, inner, **wide), nn.Linear(inner, out_features, **wide)).to_empty(device=device)
    if unfolding.name == "entry,out":
        table = nn.Embedding(unfolding.m, inner, module.padding_idx, dtype=weight.dtype, device="meta")
        return nn.Sequential(table, nn.Linear(inner, unfolding.n, bias=False, dtype=weight.dtype, device="meta")).to_empty(device=device)
    dims = weight.ndim - 2
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    fixed: dict[str, Any] = {"groups": module.groups, "bias": False, "dtype": weight.dtype, "device": "meta"}
    spatial: dict[str, Any] = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    mode = module.padding_mode
    if unfolding.name == "in,out*k":
        transposed: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        first = conv(module.in_channels, inner, 1, **fixed)
        second = transposed(inner, module.out_channels, module.kernel_size, output_padding=module.output_padding, **spatial, **fixed)
    elif unfolding.name == "out,in*k":
        first = conv(module.in_channels, inner, module.kernel_size, padding_mode=mode, **spatial, **fixed)
        second = conv(inner, module.out_channels, 1, **fixed)
    elif unfolding.name == "out*kernel,in":
        first = conv(module.in_channels, inner, 1, **fixed)
        second = conv(inner, module.out_channels, module.kernel_size, padding_mode=mode, **spatial, **fixed)
    else:  # "out*k,in": the first kernel axis belongs to the second layer

        def share(values: Any, neutral: int, second: bool) -> Any:
            if isinstance(values, str):  # padding="same" / "valid" holds axis by axis
                return values
            ones = (neutral,) * (dims - 1)
            return (values[0], *ones) if second else (neutral, *values[1:])

        def part(second: bool) -> dict[str, Any]:
            return {
                "kernel_size": share(module.kernel_size, 1, second),
                "stride": share(module.stride, 1, second),
                "padding": share(module.padding, 0, second),
                "dilation": share(module.dilation, 1, second),
                "padding_mode": mode,
            }

        first = conv(module.in_channels, inner, **part(False), **fixed)
        second = conv(inner, module.out_channels, **part(True), **fixed)
    return nn.Sequential(first, second).to_empty(device=device)


def pair_weights(unfolding: Unfolding, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """`left [g, m, r]`, `right [g, r, n]` as weights of the first and the second layer."""
    g, r = unfolding.groups, left.shape[-1]
    split = unfolding.split_shape
    kernel = split[3:]
    ones = (1,) * len(kernel)
    if unfolding.name == "out,in":
        return right[0], left[0]
    if unfolding.name == "in,out":
        return left[0].T, right[0].T
    if unfolding.name == "entry,out":
        return left[0], right[0].T
    if unfolding.name == "in,out*k":
        return left.mT.reshape(g * r, split[1], *ones), right.reshape(g * r, split[2], *kernel)
    if unfolding.name == "out,in*k":
        return right.reshape(g * r, split[2], *kernel), left.reshape(g * split[1], r, *ones)
    if unfolding.name == "out*kernel,in":
        return right.reshape(g * r, split[2], *ones), left.mT.reshape(g, r, split[1], *kernel).transpose(1, 2).reshape(
            g * split[1], r, *kernel
        )
    first = right.reshape(g * r, split[2], 1, *kernel[1:])
    second = left.reshape(g * split[1], kernel[0], r).permute(0, 2, 1).reshape(g * split[1], r, kernel[0], *ones[1:])
    return first, second


def pair_matrices(unfolding: Unfolding, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pair_weights`: layers' weights as `left [g, m, r]`, `right [g, r, n]`."""
    g, m, n = unfolding.groups, unfolding.m, unfolding.n
    if unfolding.name == "out,in":
        return second[None], first[None]
    if unfolding.name == "in,out":
        return first.T[None], second.T[None]
    if unfolding.name == "entry,out":
        return first[None], second.T[None]
    r = first.shape[0] // g
    if unfolding.name == "in,out*k":
        return first.reshape(g, r, m).mT, second.reshape(g, r, n)
    right = first.reshape(g, r, n)
    if unfolding.name == "out,in*k":
        return second.reshape(g, m, r), right
    split = unfolding.split_shape
    if unfolding.name == "out*kernel,in":
        return second.reshape(g, split[1], r, -1).transpose(2, 3).reshape(g, m, r), right
    return second.reshape(g * split[1], r, split[3]).permute(0, 2, 1).reshape(g, m, r), right


def balanced_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` factors with sqrt(s) on each side: `left [g, m, r] @ right [g, r, n]`, in float64.

    A direction whose singular value is zero to rounding gets a zero column on the left and a row of ordinary length
    on the right: the product is the same, and, unlike with two zeros, training can still use the direction.
    """
    return balanced(*leading_svd(matrix.detach(), rank), rank, matrix.dtype)


def leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular triplets (or more) in float64: `u [g, m, r]`, `s [g, r]`, `vh [g, r, n]`.

    By the eigenvectors of the smaller Gram matrix, several times faster, where the weight is stored in less than float64
    and the wanted values are not small beside the largest: then nothing is lost.
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    if matrix.dtype != torch.float64:
        values, vectors = eigh_inside(small_gram(matrix if wide else matrix.mT, torch.float64))
        values, vectors = values.flip(-1)[..., :rank], vectors[..., vectors.shape[-1] - rank :].flip(-1)
        s = values.clamp_min(0).sqrt()
        if bool((s[..., -1:] > 1e-4 * s[..., :1]).all()):
            others = promoted_matmul(vectors.mT, matrix if wide else matrix.mT) / s[..., None]
            return (vectors, s, others) if wide else (others.mT, s, vectors.mT)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u, s, vh


def balanced(u: Tensor, s: Tensor, vh: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`balanced_factors` from a decomposition at hand; `dtype`: in which the matrix was stored."""
    u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
    root = s.sqrt()
    rounding = 1e-12 if dtype == torch.float64 else torch.finfo(torch.float32).eps
    dead = s <= s[..., :1] * rounding
    alive = root.masked_fill(dead, 0)
    typical = alive.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp_min(1)
    typical = typical.masked_fill(dead.all(-1, keepdim=True), 1.0)  # a matrix of zeros has no length of its own
    return u * alive[..., None, :], torch.where(dead, typical, root)[..., None] * vh


def factorize(module: Layer, unfolding: Unfolding, rank: int) -> nn.Sequential:
    """The layer as a pair of plain layers of this rank (best approximation of its weight, balanced)."""
    pair = empty_pair(module, unfolding, rank)
    left, right = balanced_factors(unfolding.unfold(module.weight), rank)
    for parameter, weight in zip(weights(pair), pair_weights(unfolding, left, right), strict=True):
        parameter.data.copy_(weight)
    return finish_pair(pair, module, unfolding, rank)


def narrow(pair: Layer, unfolding: Unfolding, rank: int) -> nn.Sequential:
    """A pair cut again, to a smaller rank: the best approximation of its product, balanced. `pair` is not changed."""
    first, second = weights(pair)
    left, right = balanced(*factored_svd(*pair_matrices(unfolding, first, second)), rank, first.dtype)
    inner = unfolding.groups * rank
    layers = []
    for layer, old, new, side in zip(pair, (first, second), pair_weights(unfolding, left, right), ("out", "in"), strict=True):
        fresh: Layer = copy.copy(layer)
        fresh._parameters = dict(layer._parameters)
        setattr(fresh, next(n for n in (f"{side}_features", f"{side}_channels", "embedding_dim") if hasattr(fresh, n)), inner)
        stored = stored_as(new.to(old.device, old.dtype), old)
        fresh.weight = nn.Parameter(stored, requires_grad=old.requires_grad)
        layers.append(fresh)
    cut = nn.Sequential(*layers)
    setattr(cut, MARK, getattr(pair, MARK) | {"rank": rank})
    _hand_over(pair, cut)
    return cut.train(pair.training)


def memory_format(weight: Tensor) -> torch.memory_format:
    """In which order a weight is stored. A 1 x 1 kernel fits both, and only its strides say which was meant."""
    for ndim, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if weight.ndim == ndim and weight.stride(-1) == weight.shape[1] > 1 and weight.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format


def stored_as(values: Tensor, weight: Tensor) -> Tensor:
    """The values in the order in which this weight is stored, in strides too: those of the gradients must be the same."""
    last = memory_format(weight)
    return values.contiguous() if last == torch.contiguous_format else values.to(memory_format=last)


def finish_pair(pair: nn.Sequential, module: Layer, unfolding: Unfolding, rank: int) -> nn.Sequential:
    """Give the pair the layer's bias, mode, gradients, memory format, and the mark that the record is read from."""
    pair[1].register_parameter("bias", getattr(module, "bias", None))
    for parameter in weights(pair):
        parameter.requires_grad_(module.weight.requires_grad)
        parameter.data = stored_as(parameter.data, module.weight)
    setattr(pair, MARK, {"kind": type(module).__name__, "unfolding": unfolding.name, "shape": list(unfolding.shape), "rank": rank})
    _hand_over(module, pair)
    return pair.train(module.training)


def _hand_over(old: nn.Module, new: nn.Module) -> None:
    """A slim layer that is cut stays a slim layer."""
    if hasattr(old, SLIM):
        setattr(new, SLIM, getattr(old, SLIM))


def new_pair(layer: Layer, unfolding: Unfolding, rank: int) -> nn.Sequential:
    """A whole pair whose values are not set."""
    return finish_pair(empty_pair(layer, unfolding, rank), layer, unfolding, rank)


def plain_layers(module: Layer) -> list[Layer]:
    """Of a pair its layers, in the order in which they run (three where it was cut along its inputs); else the layer itself."""
    return [*plain_layers(module[0]), *plain_layers(module[1])] if hasattr(module, MARK) else [module]


def weights(pair: Layer) -> tuple[nn.Parameter, nn.Parameter]:
    """The two weights of a pair."""
    first, second = pair[0].weight, pair[1].weight
    assert isinstance(first, nn.Parameter)
    assert isinstance(second, nn.Parameter)
    return first, second


def product(pair: nn.Sequential, unfolding: Unfolding) -> Tensor:
    """The weight that the pair stands for, in the layer's shape, in float64."""
    first, second = (weight.detach().double() for weight in weights(pair))
    left, right = pair_matrices(unfolding, first, second)
    return unfolding.fold(left @ right)
