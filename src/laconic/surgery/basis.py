r"""Other axes for the channels of a group, in place: the model computes what it did.

Where everything between the layers of a group is linear, the basis of its channels is free. For an invertible :math:`A`

- rows that put the channels out become :math:`A W`, columns that read them :math:`W A^{-1}`;
- behind a norm with gain :math:`\gamma`, whose channels turn by an orthogonal :math:`R` (with :math:`R \mathbf 1 = \mathbf 1` where the norm takes the mean
  off), the readers take over the gain: :math:`W \operatorname{diag}(\gamma / s) R^T`, and the norm keeps its size :math:`s` alone;
- within an attention head :math:`q^T k = (A q)^T (A^{-T} k)`, and the values are mixed like any channels.

The optimizer goes along: gradients turn by :math:`A^{-T}`, first moments with them, second moments by its squared entries, as in `optimizer`.
Source: Ashkboos et al. 2024, *SliceGPT* (the stream of a network with RMSNorm; here with LayerNorm as well).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..matricize import Layer, inputs_first
from .channels import SIDES, End, Group, channels_kept, is_layer_norm, long_axis, units_kept
from .factorize import plain_layers
from .optimizer import FIRST_MOMENTS, SECOND_MOMENTS

LEAST_GAIN = 1e-3  # of a norm's channel, beside the others: by it the readers are divided


@dataclass(frozen=True, slots=True)
class Stream:
    """A residual stream: all that touches it is linear, or a norm.

    Attributes:
        readers: paths of the layers that read what a norm puts out, by the norm's path.
        centred: does a norm take the mean of the channels off (LayerNorm; not RMSNorm)?
        flat: paths of norms whose output, as it is or times a number, a table reads that puts the stream out, too (a tied head). It cannot take
            over a gain, so that this has to become one number first (see `flatten`).
    """

    readers: Mapping[str, tuple[str, ...]]
    centred: bool
    flat: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Heads:
    """What the heads of one attention put out: `[places, heads]` channels each."""

    query: End
    key: End
    value: End


@dataclass(frozen=True, slots=True)
class Turned:
    """What the readers of a group take in now: `matrices` (one for each column of `positions`) times what they took in before."""

    positions: Tensor
    matrices: Tensor


def positions(model: nn.Module, group: Group, end: End) -> Tensor:
    """Where the units that are left are on one side of a layer: `[units, channels of a unit]`."""
    here = channels_kept(model.get_submodule(end.path), end.side)
    return torch.from_numpy(np.searchsorted(here, end.index[units_kept(model, group)]))


@torch.no_grad()
def flatten(model: nn.Module, stream: Stream, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """The root mean square of their gains, with the sign of most, for all channels of the norms that are to be flat. This changes what the model computes."""
    basis = Basis(optimizers)
    for path in stream.flat:
        module: Layer = model.get_submodule(path)
        if module.weight is not None:
            gain = module.weight.double()
            basis.fill(module.weight, float(gain.square().mean().sqrt() * (1 if gain.sum() >= 0 else -1)))


@torch.no_grad()
def turn_stream(
    model: nn.Module, group: Group, stream: Stream, rotation: Tensor, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> dict[str, Turned]:
    """Turn the channels of a stream by an orthogonal matrix `[units, units]`, float64. Returns what its readers see of it, by path."""
    basis = Basis(optimizers)
    gains: dict[str, Tensor] = {}
    for end in group.carriers:
        module: Layer = model.get_submodule(end.path)
        where = positions(model, group, end)
        if end.own:
            basis.mix(getattr(module, end.side), long_axis(getattr(module, end.side)), where, rotation)
            continue
        gain = (
            torch.ones(len(where), dtype=torch.float64, device="cpu")
            if module.weight is None
            else module.weight.detach().double().cpu()[where[:, 0]]
        )
        size = gain.square().mean().sqrt()
        gain = gain / size
        gain = torch.where(gain.abs() < LEAST_GAIN, LEAST_GAIN, gain)
        gains |= dict.fromkeys(stream.readers[end.path], gain)
        if module.weight is not None:
            basis.fill(module.weight, float(size))
        if getattr(module, "bias", None) is not None:
            basis.mix(module.bias, 0, where, rotation / gain)
    for end in group.producers:
        basis.mix_rows(model.get_submodule(end.path), positions(model, group, end), rotation)
    seen = {}
    for end in group.consumers:
        where = positions(model, group, end)
        matrix = rotation / gains[end.path] if end.path in gains else rotation
        basis.mix_columns(model.get_submodule(end.path), where, matrix)
        seen[end.path] = Turned(where, matrix.expand(where.shape[1], -1, -1))
    return seen


@torch.no_grad()
def turn_heads(
    model: nn.Module, group: Group, heads: Heads, queries: Tensor, values: Tensor, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> dict[str, Turned]:
    """Mix the places within each head by invertible matrices `[heads, places, places]`, float64: queries and keys, and values."""
    basis = Basis(optimizers)
    for end, matrices in ((heads.query, queries), (heads.key, torch.linalg.inv(queries).mT), (heads.value, values)):
        basis.mix_rows(model.get_submodule(end.path), positions(model, group, end), matrices)
    seen = {}
    for end in group.consumers:
        where = positions(model, group, end)
        basis.mix_columns(model.get_submodule(end.path), where, values)
        seen[end.path] = Turned(where, values)
    return seen


@torch.no_grad()
def scale_norms(model: nn.Module, group: Group, factor: float, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Their gains, by a number."""
    basis = Basis(optimizers)
    for end in group.carriers:
        module: Layer = model.get_submodule(end.path)
        if not end.own and module.weight is not None:
            where = positions(model, group, end)
            basis.mix(module.weight, 0, where, factor * torch.eye(len(where), dtype=torch.float64, device="cpu"))


@torch.no_grad()
def scale_queries(model: nn.Module, group: Group, factor: float, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Attention divides by the root of the places of a head: fewer, and the queries have to be that much smaller."""
    basis = Basis(optimizers)
    for end in group.queries:
        where = positions(model, group, end)
        basis.mix_rows(model.get_submodule(end.path), where, factor * torch.eye(len(where), dtype=torch.float64, device="cpu"))


def mixed(x: Tensor, axis: int, where: Tensor, matrices: Tensor) -> Tensor:
    """A copy whose slices at `where[:, j]` along the axis are `matrices[j]` (or the one matrix) times what they were."""
    matrices = matrices.to(x.device)
    matrices = matrices.expand(where.shape[1], -1, -1)
    out = x.detach().clone()
    rows, where = out.movedim(axis, 0), where.to(x.device)
    old = rows[where].double()  # [units, k, ...]
    rows[where] = torch.einsum("kij,jk...->ik...", matrices, old).to(x.dtype)
    return out


class Basis:
    """Changes parameters in place, each once, with their gradients and the optimizers' state."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer] = ()):
        self.states = [o.state for o in optimizers if hasattr(o, "state")]
        self.done: set[tuple[int, int, bytes]] = set()

    def mix_rows(self, module: Layer, where: Tensor, matrices: Tensor) -> None:
        last = plain_layers(module)[-1]
        self.mix(last.weight, 1 if inputs_first(last) or isinstance(last, nn.Embedding) else 0, where, matrices)
        if getattr(last, "bias", None) is not None:
            self.mix(last.bias, 0, where, matrices)

    def mix_columns(self, module: Layer, where: Tensor, matrices: Tensor) -> None:
        """Of what reads `matrices` times what it read."""
        first = plain_layers(module)[0]
        self.mix(first.weight, 0 if inputs_first(first) else 1, where, torch.linalg.inv(matrices).mT)

    def mix(self, parameter: Tensor, axis: int, where: Tensor, matrices: Tensor) -> None:
        key = id(parameter), axis, where.numpy().tobytes()
        if key in self.done:  # of tables that share it
            return
        self.done.add(key)
        parameter.copy_(mixed(parameter, axis, where, matrices))
        to_gradients = torch.linalg.inv(matrices).mT
        if parameter.grad is not None:
            parameter.grad = mixed(parameter.grad, axis, where, to_gradients)
        for of_parameter, name, value in self._moments(parameter):
            if name in FIRST_MOMENTS:
                of_parameter[name] = mixed(value, axis, where, to_gradients)
            elif name in SECOND_MOMENTS:
                of_parameter[name] = mixed(value, axis, where, to_gradients.square())

    def fill(self, parameter: Tensor, number: float) -> None:
        """The same number everywhere: of its moments the mean is all that still says something."""
        parameter.fill_(number)
        for of_parameter, name, value in self._moments(parameter):
            of_parameter[name] = torch.full_like(value, float(value.mean()) if name in SECOND_MOMENTS else 0.0)

    def _moments(self, parameter: Tensor) -> list[tuple[dict[str, Any], str, Tensor]]:
        """In the optimizers, which get new tensors: the old ones can be put back."""
        of_parameter = [state[parameter] for state in self.states if parameter in state]
        return [(x, name, v) for x in of_parameter for name, v in x.items() if isinstance(v, Tensor) and v.shape == parameter.shape]


def is_linear_stream(model: nn.Module, group: Group) -> bool:
    """Is there a norm over its channels, and nothing else that passes them on?"""
    carriers = [(end, model.get_submodule(end.path)) for end in group.carriers]
    norms = [end for end, module in carriers if not end.own and is_layer_norm(module)]
    return (
        bool(norms) and all(end.own or is_layer_norm(module) for end, module in carriers) and all(e.side in SIDES for e in group.producers)
    )
