"""What each operation does to the labels of its inputs: one rule per kind of operation, and the table of the kinds.

A rule returns the labels of the outputs; units that it cannot follow, it holds, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .labels import Label, Units

if TYPE_CHECKING:
    from .tracer import Tracer


@dataclasses.dataclass(slots=True)
class Operation:
    """One operation that ran on labelled tensors; a rule gives the labels of its outputs."""

    tracer: Tracer
    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]

    def arg(self, name: str, default: Any = None) -> Any:
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                return self.args[i] if i < len(self.args) else self.kwargs.get(name, default)
        return default

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    @property
    def units(self) -> Units:
        return self.tracer.units

    def hold(self, reason: str) -> None:
        for x in self.tensors:
            if (label := self.tracer.label(x)) is not None:
                self.units.hold(label.ids, reason)

    def first(self) -> tuple[Tensor, Label | None]:
        x = self.args[0]
        return x, self.tracer.label(x)

    def hold_others(self) -> None:
        """Only the first argument may have units."""
        for x in self.tensors[1:]:
            if (label := self.tracer.label(x)) is not None and x is not self.args[0]:
                self.units.hold(label.ids, f"{self.name} uses it in a way that laconic does not follow")


Labels = list[Label | None]


def unknown(op: Operation) -> Labels:
    op.hold(f"{op.name} is an operation that laconic does not follow")
    return [None] * len(op.outputs)


def _pointwise(op: Operation) -> Labels:
    out = op.outputs[0]

    def labels() -> list[Label]:
        return [Label(out.ndim - x.ndim + label.axis, label.ids) for x in op.tensors if (label := op.tracer.label(x)) is not None]

    if len({label.axis for label in labels()}) > 1:
        op.tracer.forget(op.tensors)
    found = labels()
    axes = {label.axis for label in found}
    if not found:
        return [None] * len(op.outputs)
    if len(axes) > 1:
        op.hold(f"{op.name} crosses it with other units")
        return [None] * len(op.outputs)
    (axis,) = axes
    ids = found[0].ids
    why = f"{op.name} combines it with numbers that are no layer's output, such as an embedding, the input or a parameter"
    for x in op.tensors:
        place = axis - (out.ndim - x.ndim)
        if place < 0 or x.shape[place] == 1:
            continue
        label = op.tracer.label(x)
        ids = op.units.meet(ids, label.ids if label is not None else np.zeros_like(ids), why)
    return [Label(axis, ids)] * len(op.outputs)


def _moved(op: Operation) -> Labels:
    """The same operation on the labels."""

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor):
            return op.tracer.full(value) if value.is_floating_point() or value.is_complex() or op.tracer.label(value) else value
        return type(value)(swap(v) for v in value) if isinstance(value, (list, tuple)) else value

    moved = op.func(*(swap(a) for a in op.args), **{k: swap(v) for k, v in op.kwargs.items()})
    shape = tuple(op.tensors[0].shape)
    return [op.tracer.canonical(x, op.name, shape) for x in tree_leaves(moved) if isinstance(x, Tensor)]


def _viewed(op: Operation) -> Labels:
    """The numbers in the same order, in another shape."""
    x, out = op.tensors[0], op.outputs[0]
    if x.dtype != out.dtype:
        return unknown(op)
    return [op.tracer.canonical(op.tracer.full(x).reshape(out.shape), op.name, tuple(x.shape))]


def _fresh(op: Operation) -> Labels:
    """Made by shape and value, not from the numbers of its argument."""
    return [None] * len(op.outputs)


def _kept(op: Operation) -> Labels:
    """The shape stays; every place depends on the same place."""
    op.hold_others()
    return [op.first()[1]] * len(op.outputs)


def _dims(op: Operation, x: Tensor) -> set[int]:
    dims = op.arg("dim")
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(x.ndim))
    return {d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def _along(op: Operation) -> Labels:
    """Only `dim` may change in size; places along it depend on each other (softmax, cumsum, sort, topk)."""
    x, label = op.first()
    op.hold_others()
    if label is not None and label.axis in _dims(op, x):
        op.units.hold(label.ids, f"{op.name} mixes the units")
    return [label] * len(op.outputs)


def _reduced(op: Operation) -> Labels:
    x, label = op.first()
    op.hold_others()
    if label is None:
        return [None] * len(op.outputs)
    dims = _dims(op, x)
    if label.axis in dims:
        op.units.hold(label.ids, f"{op.name} over the units: it would have fewer terms")
        return [None] * len(op.outputs)
    axis = label.axis if op.arg("keepdim", False) else label.axis - sum(d < label.axis for d in dims)
    return [Label(axis, label.ids)] * len(op.outputs)


def _largest(op: Operation) -> Labels:
    """`max` and `min`: of two tensors place by place, or over dimensions."""
    return _pointwise(op) if len(op.tensors) > 1 else _reduced(op)


def _rolled(op: Operation) -> Labels:
    """Along the units it is another order once the last ones are gone."""
    x, label = op.first()
    dims = op.arg("dims") or range(x.ndim)
    if label is not None and label.axis in {d % x.ndim for d in dims}:
        op.units.hold(label.ids, "roll moves the last units to the front")
        return [None]
    return _moved(op)


def _spatial(op: Operation) -> Labels:
    """Pooling and resizing: the last axes, as many as the name says."""
    x, label = op.first()
    op.hold_others()
    dims = next(int(c) for c in op.name if c.isdigit())
    if label is not None and label.axis >= x.ndim - dims:
        op.units.hold(label.ids, f"{op.name} works along it")
        return [None] * len(op.outputs)
    return [label] * len(op.outputs)


def _padded(op: Operation) -> Labels:
    x, label = op.first()
    if label is None:
        return [None]
    pad = list(op.args[1])
    place = 2 * (x.ndim - 1 - label.axis)
    before, after = pad[place : place + 2] if place < len(pad) else (0, 0)
    ids = np.pad(label.ids, (max(before, 0), max(after, 0)))
    return [Label(label.axis, ids[max(-before, 0) : len(ids) - max(-after, 0)])]


def _layer_norm(op: Operation) -> Labels:
    x, label = op.first()
    op.hold_others()
    if label is not None and label.axis >= x.ndim - len(op.args[1]):
        op.units.hold(label.ids, "LayerNorm or RMSNorm is called with parameters that laconic does not find")
    return [label] + [None] * (len(op.outputs) - 1)


def _group_norm(op: Operation) -> Labels:
    op.hold("GroupNorm over the units: their statistics would change")
    return [op.first()[1]] + [None] * (len(op.outputs) - 1)


def _batch_norm(op: Operation) -> Labels:
    op.hold("batch_norm is called with parameters that laconic does not find")
    return [op.first()[1]] + [None] * (len(op.outputs) - 1)


def _glu(op: Operation) -> Labels:
    x, label = op.first()
    if label is None or label.axis != op.arg("dim", -1) % x.ndim:
        return [label]
    a, b = np.split(label.ids, 2)
    return [Label(label.axis, op.units.meet(a, b, "glu pairs it with numbers that are no layer's output"))]


def _triangle(op: Operation) -> Labels:
    x, label = op.first()
    if label is not None and label.axis >= x.ndim - 2:
        op.units.hold(label.ids, f"{op.name} works along it")
    return [label]


def _select_by_list(op: Operation) -> Labels:
    x, label = op.first()
    op.hold_others()
    if label is not None and label.axis == op.args[1] % x.ndim:
        op.units.hold(label.ids, f"{op.name} picks channels by number")
        return [None]
    return [label]


def _indexed(op: Operation) -> Labels:
    _, label = op.first()
    op.hold_others()
    if label is None:
        return [None]
    place = 0
    for index in op.args[1]:
        span = 1 if index is None or index.dtype != torch.bool else index.ndim
        if index is not None and place <= label.axis < place + span:
            op.units.hold(label.ids, "it is indexed by number")
            return [None]
        place += span
    return _moved(op)


def _complex_view(op: Operation) -> Labels:
    x, label = op.first()
    if label is not None and label.axis == x.ndim - 1:
        op.units.hold(label.ids, f"{op.name} pairs the units")
        return [None]
    return [label]


def _product(op: Operation) -> Labels:
    """(b)mm and its kin: rows and columns carry units through, a sum over units does not, batches must match."""
    *bias, a, b = [x for x in op.args if isinstance(x, Tensor)]
    out = op.outputs[0]
    for label in filter(None, map(op.tracer.label, bias)):
        op.units.hold(label.ids, f"{op.name} adds to it")
    la, lb = op.tracer.label(a), op.tracer.label(b)
    batch = out.ndim - 2
    if la is not None and la.axis == batch + 1:
        op.units.hold(la.ids, "it is multiplied with something that is not a layer of its own")
        la = None
    if lb is not None and lb.axis == batch:
        op.units.hold(lb.ids, "it is multiplied with something that is not a layer of its own")
        lb = None
    heads = [label for label in (la, lb) if label is not None and label.axis < batch]
    if heads:
        rest = [label for label in (la, lb) if label is not None and label.axis >= batch]
        zeros = np.zeros_like(heads[0].ids)
        ids = op.units.meet(heads[0].ids, heads[1].ids if len(heads) > 1 else zeros, f"{op.name} combines it with what has no such units")
        for label in rest:
            op.units.hold(label.ids, f"{op.name} crosses it with other units")
            op.units.hold(ids, f"{op.name} crosses it with other units")
        return [Label(heads[0].axis, ids)]
    if la is not None and lb is not None:
        op.hold(f"{op.name} crosses it with other units")
        return [None]
    return [la or lb]


def _linear(op: Operation) -> Labels:
    """A weight that no supported layer holds, or that its parent reads directly."""
    x, label = op.first()
    op.hold_others()
    if label is not None and label.axis == x.ndim - 1:
        op.units.hold(label.ids, "it is read by a weight that is not a supported layer's own")
        return [None]
    return [label]


def _rules() -> dict[str, Callable[[Operation], Labels]]:
    table: dict[Callable[[Operation], Labels], str] = {
        _viewed: "view _unsafe_view _reshape_alias _reshape_copy",
        _moved: "permute transpose t expand squeeze unsqueeze select slice split split_with_sizes unsafe_split unsafe_split_with_sizes "
        "unbind cat stack repeat flip unfold pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle diagonal",
        _kept: "clone detach alias _to_copy lift_fresh lift_fresh_copy native_dropout zeros_like ones_like empty_like full_like "
        "rand_like randn_like bernoulli view_as_real",
        _fresh: "new_zeros new_ones new_full new_empty new_empty_strided",
        _along: "softmax _softmax log_softmax _log_softmax cumsum cumprod sort topk logcumsumexp _safe_softmax",
        _reduced: "sum mean amax amin argmax argmin prod var std var_mean std_mean logsumexp norm linalg_vector_norm any all "
        "count_nonzero nansum median",
        _largest: "max min",
        _rolled: "roll",
        _spatial: "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d "
        "_adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d "
        "upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
        "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d grid_sampler_2d grid_sampler_3d",
        _padded: "constant_pad_nd",
        _layer_norm: "native_layer_norm layer_norm rms_norm _fused_rms_norm",
        _group_norm: "native_group_norm group_norm",
        _batch_norm: "native_batch_norm batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm",
        _glu: "glu",
        _triangle: "tril triu",
        _select_by_list: "index_select",
        _indexed: "index",
        _complex_view: "view_as_complex",
        # Not tagged as pointwise, but so they are.
        _pointwise: "hardswish leaky_relu _prelu_kernel log_sigmoid_forward rrelu_with_noise softsign logaddexp2 fill zero polar complex",
        _product: "mm bmm addmm baddbmm",
        _linear: "linear",
    }
    return {name: rule for rule, names in table.items() for name in names.split()}


_RULES = _rules()
PLACE_BY_PLACE = (_pointwise, _viewed, _moved, _kept)  # where a parameter of the model's own may meet the units that it belongs to


def rule_for(func: Any) -> Callable[[Operation], Labels] | None:
    """The rule of an operation; None where it may be a composition of others."""
    name = func.overloadpacket.__name__
    base = name if name in _RULES else name.rstrip("_")
    if name != base and _RULES.get(base) is _moved:
        return unknown  # it changes the shape of what it is given
    return _RULES.get(base) or (_pointwise if torch.Tag.pointwise in func.tags or _pointwise_name(base) else None)


def _pointwise_name(name: str) -> bool:
    """Does PyTorch call the operation pointwise, in some overload? (It does not say so of every one that writes in place.)"""
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
