"""Reversible unfoldings of layer weights into matrices.

An `Unfolding` is data: how to split, permute and reshape one weight into a stack of matrices `[groups, m, n]`, and
back, bit for bit. Which unfoldings a layer has is decided by `unfoldings(module)`:

| layer | weight | name of the unfolding | matrix |
|---|---|---|---|
| `nn.Linear` | `[out, in]` | `out,in` | out x in |
| `nn.Conv1d/2d/3d` | `[out, in/g, *k]` | `out,in*k` | out x in*k: a full-kernel conv to r maps, then 1x1 |
| | | `out*k,in` | out*k1 x in*k2*k3: the first kernel axis goes to the second layer (1 x k, then k x 1) |
| | | `out*kernel,in` | out*k x in: 1x1 to r maps, then the full-kernel conv |
| `nn.ConvTranspose1d/2d/3d` | `[in, out/g, *k]` | `in,out*k` | in x out*k: 1x1 to r maps, then the transposed conv |
| Hugging Face `Conv1D` | `[in, out]` | `in,out` | in x out |
| `nn.Embedding` | `[entries, out]` | `entry,out` | entries x out: a table of r columns, then a linear layer |

Grouped layers give one matrix per group; all share one rank. In the names, `k` stands for the kernel axes; the
spellings `out,in*kh*kw`, `out*kh,in*kw` and `out*kh*kw,in` of the literature are accepted wherever a user names one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_choice
from .errors import InvalidValueError

CHANNEL = "out,in*kh*kw"
SPATIAL = "out*kh,in*kw"
INPUTS = "out*kh*kw,in"
AUTO = "auto"
MATRICIZATIONS = (CHANNEL, SPATIAL, INPUTS, AUTO)

# A module whose attributes (weight, stride, groups, ...) only its kind knows; nn.Module types them all as Tensor | Module.
Layer = Any

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
INPUTS_FIRST = ("in,out", "in,out*k", "entry,out")  # unfoldings of weights whose first axis is what the layer takes in


@dataclass(frozen=True, slots=True)
class Unfolding:
    """How one weight becomes a stack of matrices.

    The weight `[d0, d1, ...]` is split to `[groups, d0 / groups, d1, ...]`; `rows` and `columns` name axes of the split
    weight (axis 0 is the group).

    Attributes:
        name: see the table in the module's docstring.
        shape: shape of the weight.
        groups: number of matrices.
        rows, columns: axes that make up the rows and the columns.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def split_shape(self) -> tuple[int, ...]:
        return (self.groups, self.shape[0] // self.groups, *self.shape[1:])

    @property
    def m(self) -> int:
        """Rows of each matrix."""
        return math.prod(self.split_shape[a] for a in self.rows)

    @property
    def n(self) -> int:
        """Columns of each matrix."""
        return math.prod(self.split_shape[a] for a in self.columns)

    @property
    def full_rank(self) -> int:
        return min(self.m, self.n)

    @property
    def dense_params(self) -> int:
        return self.groups * self.m * self.n

    @property
    def unit_params(self) -> int:
        """Parameters that one unit of rank costs in factored form (all groups together)."""
        return sum(self.unit_parts)

    @property
    def unit_parts(self) -> tuple[int, int]:
        """What of `unit_params` is in the first layer and what in the second."""
        left, right = self.groups * self.m, self.groups * self.n
        return (left, right) if self.name in INPUTS_FIRST else (right, left)

    @property
    def sides(self) -> tuple[int, int]:
        """How many channels the layer puts out and takes in."""
        first, second = self.shape[0], self.shape[1] * self.groups
        return (second, first) if self.name in INPUTS_FIRST else (first, second)

    def resized(self, out: int, taken: int) -> Unfolding:
        """The unfolding of the same layer with other numbers of channels."""
        first, second = (taken, out) if self.name in INPUTS_FIRST else (out, taken)
        return replace(self, shape=(first, second // self.groups, *self.shape[2:]))

    def unfold(self, weight: Tensor) -> Tensor:
        """`[groups, m, n]`; a view where the strides allow it."""
        if tuple(weight.shape) != self.shape:
            raise InvalidValueError(f"weight of shape {tuple(weight.shape)}: this unfolding is for {self.shape}")
        return weight.reshape(self.split_shape).permute(0, *self.rows, *self.columns).reshape(self.groups, self.m, self.n)

    def fold(self, matrix: Tensor) -> Tensor:
        """Inverse of `unfold`."""
        axes = (0, *self.rows, *self.columns)
        split = self.split_shape
        inverse = [axes.index(a) for a in range(len(axes))]
        return matrix.reshape([split[a] for a in axes]).permute(inverse).reshape(self.shape)


def unfolding_named(name: str, shape: tuple[int, ...], groups: int = 1) -> Unfolding:
    """The unfolding of a weight by its name in the table above."""
    kernel = tuple(range(3, len(shape) + 1))
    if name == "out*k,in":
        return Unfolding(name, shape, groups, (1, kernel[0]), (2, *kernel[1:]))
    if name == "out*kernel,in":
        return Unfolding(name, shape, groups, (1, *kernel), (2,))
    return Unfolding(name, shape, groups, (1,), (2, *kernel))


def is_hf_conv1d(module: Layer) -> bool:
    """Hugging Face's `Conv1D` (GPT-2): a linear layer whose weight is `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and type(module).__module__.startswith("transformers")


def inputs_first(layer: Layer) -> bool:
    """Is the first axis of the layer's weight what it takes in, and the second what it puts out? Of most it is the other way round."""
    return isinstance(layer, (*TRANSPOSED_CONVS, nn.Embedding)) or is_hf_conv1d(layer)


def by_outputs(layer: Layer) -> Tensor:
    """A view of the weight with its outputs first."""
    return layer.weight.transpose(0, 1) if inputs_first(layer) else layer.weight


def by_inputs(layer: Layer) -> Tensor:
    """A view of the weight with its inputs first."""
    return layer.weight if inputs_first(layer) else layer.weight.transpose(0, 1)


def has_own_forward(module: nn.Module) -> bool:
    """Set on the object (LoRA, offloading, by hand): what it computes is not what its class says, and nothing in its place would have it."""
    return not isinstance(module, torch.jit.ScriptModule) and not vars(module).keys().isdisjoint(("forward", "_conv_forward"))


def takes_entries(module: Layer) -> bool:
    """A table, or the pair that one became: its input is whole numbers."""
    return isinstance(module[0] if isinstance(module, nn.Sequential) and len(module) else module, nn.Embedding)


def is_table(module: Layer) -> bool:
    """An embedding that does no more than look entries up, or one of the model's own on top of it (with an offset, or scaled, as BART's)."""
    alone = isinstance(module, nn.Embedding) and next(module.children(), None) is None
    return alone and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def an_input(module: Layer, shape: Sequence[int], fill: float = 0.0, device: Any = None) -> Tensor:
    """Something of this shape that the layer takes: one number, or a table's entries one after the other; on `device` (None: its weight's)."""
    like = next(module.parameters(), torch.zeros(()))
    if takes_entries(module):
        table: Layer = module[0] if isinstance(module, nn.Sequential) else module
        return (torch.arange(math.prod(shape), device=device or like.device) % table.num_embeddings).reshape(tuple(shape))
    return torch.full(tuple(shape), fill, dtype=like.dtype, device=device or like.device)


def unfoldings(module: Layer, embeddings: bool = False) -> list[Unfolding]:
    """The unfoldings of a layer's weight, the usual one first; empty for a layer that is not supported.

    A subclass counts as its base only if it computes the same (its `forward` is the base's own). An embedding counts only where it is
    asked for: it multiplies nothing, so to most of the package it is no layer.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return []
    shape = tuple(weight.shape)
    forward = getattr(type(module), "forward", None)  # a scripted module's class has none
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return [unfolding_named("out,in", shape)]
    if is_hf_conv1d(module):
        return [unfolding_named("in,out", shape)]
    if embeddings and forward is nn.Embedding.forward and is_table(module):  # others are not what a product would be
        return [unfolding_named("entry,out", shape)]
    for transposed in TRANSPOSED_CONVS:
        if isinstance(module, transposed) and forward is transposed.forward:
            return [unfolding_named("in,out*k", shape, module.groups)]
    for base in CONVS:
        if isinstance(module, base) and forward is base.forward and type(module)._conv_forward is base._conv_forward:
            pointwise = math.prod(shape[2:]) == 1
            names = ("out,in*k",) if pointwise else ("out,in*k", "out*k,in", "out*kernel,in")
            return [unfolding_named(name, shape, module.groups) for name in names]
    return []


def check_matricization(name: str) -> str:
    check_choice("matricization", name, MATRICIZATIONS)
    return name


def choose_unfolding(module: Layer, matricization: str, weight: Tensor | None = None, energy: float = 0.99) -> Unfolding:
    """The unfolding that `matricization` names for this layer; layers that have only one get that one.

    `"auto"` takes the one that needs fewer parameters to keep the share `energy` of the squared singular values of
    `weight` (None: the layer's own, as it is now).
    """
    from .penalties import energy_count

    options = unfoldings(module, embeddings=True)
    check_matricization(matricization)
    if len(options) == 1:
        return options[0]
    if matricization == CHANNEL:
        return options[0]
    if matricization != AUTO:
        return options[1 if matricization == SPATIAL else 2]

    def cost(option: Unfolding) -> int:
        values = torch.linalg.svdvals(option.unfold(module.weight.detach() if weight is None else weight).double())
        energies = values.square().sum(0).sqrt()
        return int(energy_count(energies, energy)) * option.unit_params

    return min(options, key=cost)
