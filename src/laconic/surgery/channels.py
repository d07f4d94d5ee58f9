"""Whole units (neurons, filters, heads) out of a network: every tied slice of every layer, in place, all of it or nothing.

A `Group` says which channels of which layers belong to one unit (`laconic.graph` finds the groups). Its numbers are
those of the dense model and never change: each slimmed layer carries a mark with the dense numbers of the channels it
still has, so that it can be slimmed again, factorised before or after, and replayed on a fresh dense model.
One operation on every kind of layer, and therefore one long file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import InvalidValueError, SurgeryError
from ..matricize import INPUTS_FIRST, Layer, inputs_first, is_hf_conv1d
from .factorize import MARK, SLIM, stored_as
from .optimizer import Replacement, replace, states_to_slice

Ints = NDArray[np.int64]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm)
PRODUCER, CONSUMER, CARRIER = "producer", "consumer", "carrier"
SIDES = ("out", "in")


@dataclass(frozen=True, slots=True)
class End:
    """One side of one layer that is tied to the units of a group.

    Attributes:
        path: the layer's path in the dense model (the first of its paths).
        side: `"out"`: rows of the weight, bias, entries of a norm; `"in"`: columns of the weight; else the name of a parameter or
            buffer that the module at `path`, whose code is the model's own, holds for each channel (a layer scale, embeddings of positions).
        index: `[units, k]`: the channels of that side, in the dense layer's numbering, of each unit.
        role: `"producer"` computes the units from something else, `"consumer"` reads them, `"carrier"` passes each on by
            itself (BatchNorm, PReLU, depthwise convolution, a parameter of the model's own; LayerNorm, whose statistics are then over the units
            that are left).
    """

    path: str
    side: str
    index: Ints
    role: str

    @property
    def own(self) -> bool:
        """Is it a parameter or buffer of the model's own?"""
        return self.side not in SIDES

    @property
    def name(self) -> str:
        """The layer's path, or the whole name of the model's own parameter."""
        return f"{self.path}.{self.side}".lstrip(".") if self.own else self.path


@dataclass(frozen=True, slots=True)
class Count:
    """A number on a module that counts the units (`heads`) or their channels (`split_size`): it shrinks with them. Of places within heads also
    1 / the root of their number, by which products are multiplied (`scaling`): it grows."""

    path: str
    name: str
    dense: int | float

    def left(self, units: int, of: int) -> int | float:
        """What it is once that many of the units are left."""
        return self.dense * units // of if isinstance(self.dense, int) else self.dense * (of / units) ** 0.5


@dataclass(frozen=True, slots=True)
class Group:
    """Units that can go one by one, each with all that is tied to it.

    Attributes:
        name: path of the first producer.
        units: how many there are in the dense model; a unit is a neuron, a filter, or a whole attention head.
        ends: every side of every layer that has a share in them.
        counts: numbers in the model's own code that shrink with them.
        queries: where the units are places within heads, the side whose product with another is taken over them, divided by the root of their number.
    """

    name: str
    units: int
    ends: tuple[End, ...]
    counts: tuple[Count, ...] = ()
    queries: tuple[End, ...] = ()

    @property
    def producers(self) -> tuple[End, ...]:
        return tuple(end for end in self.ends if end.role == PRODUCER)

    @property
    def consumers(self) -> tuple[End, ...]:
        return tuple(end for end in self.ends if end.role == CONSUMER)

    @property
    def carriers(self) -> tuple[End, ...]:
        return tuple(end for end in self.ends if end.role == CARRIER)

    @property
    def of_heads(self) -> bool:
        """A unit is several channels of what puts it out and of what reads it. (Of a gated hidden layer in one piece it is several of the first alone, in front
        of a `Flatten` of the second.)"""
        return all(any(end.index.shape[1] > 1 for end in ends) for ends in (self.producers, self.consumers))


@dataclass(frozen=True, slots=True)
class Edit:
    """New tensors and attributes of one module, made but not yet put in place.

    `parameters` hold, beside the new parameter, how to slice whatever has the old one's shape.
    """

    module: nn.Module
    parameters: dict[str, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]
    buffers: dict[str, Tensor]
    attributes: dict[str, Any]


def slim(
    model: nn.Module,
    groups: Sequence[Group],
    kept: Mapping[str, Sequence[int]],
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> list[nn.Parameter]:
    """Keep only these units, in place. On an error everything is as it was. Returns the parameters whose optimizer state could not be
    sliced: those in their places start without one.

    Args:
        groups: of the dense model; some of their units may be gone already, and layers may have been factorised since.
        kept: for each group that shrinks the units that stay, by their numbers in the dense model, in any order.
        optimizers: their `param_groups` get the new parameters, their state is sliced.

    Raises:
        InvalidValueError: an unknown group or unit, a unit that is gone already, or no unit at all.
        SurgeryError: a layer is no longer there, or no longer has the channels that the group says.
    """
    edits = _plan(model, groups, kept)
    changes = {getattr(edit.module, name): change for edit in edits for name, change in edit.parameters.items()}
    replacements = [Replacement(old, new, select) for old, (new, select) in changes.items()]
    states = [states_to_slice(optimizer, replacements) for optimizer in optimizers]
    had = [{r.old for r in replacements if getattr(optimizer, "state", {}).get(r.old)} for optimizer in optimizers]
    lost = [p for of_one, found in zip(had, states, strict=True) for p in of_one.difference(r.old for r, _ in found)]
    apply(edits)
    for optimizer, found in zip(optimizers, states, strict=True):
        replace(optimizer, replacements, found)
    for r in replacements:
        r.new.grad = None if r.old.grad is None else r.select(r.old.grad)
        r.old.grad = None  # memory for the next
    return lost


@contextlib.contextmanager
def slimmed(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside, the model has only these units; afterwards its own parameters again."""
    undo = apply(_plan(model, groups, kept))
    try:
        yield
    finally:
        undo()


def _plan(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> list[Edit]:
    gone, counts = _what_goes(model, groups, kept)
    edits: list[Edit] = []
    for path in gone | counts:
        edits += _edits(path, _module(model, path), gone.get(path, {}), counts.get(path, {}))
    return tied(edits)


def tied(edits: list[Edit]) -> list[Edit]:
    """A weight that two layers share is shared afterwards, too."""
    made: dict[int, tuple[nn.Parameter, Callable[[Tensor], Tensor]]] = {}
    for edit in edits:
        for name, new in edit.parameters.items():
            edit.parameters[name] = made.setdefault(id(edit.module._parameters[name]), new)
    return edits


def apply(edits: Sequence[Edit]) -> Callable[[], None]:
    """Put the new tensors in place. All that can fail is done before. Returns what puts the model back."""
    before = [(edit.module, dict(edit.module.__dict__), dict(edit.module._parameters), dict(edit.module._buffers)) for edit in edits]
    for edit in edits:
        for name, (new, _) in edit.parameters.items():
            edit.module._parameters[name] = new
        for name, buffer in edit.buffers.items():
            edit.module._buffers[name] = buffer
        for name, value in edit.attributes.items():
            setattr(edit.module, name, value)

    def undo() -> None:
        for module, attributes, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)

    return undo


def channels_kept(module: nn.Module, side: str) -> Ints:
    """The dense numbers of the channels that a layer still has on one side."""
    mark = getattr(module, SLIM, {})
    return np.asarray(mark.get("kept", {}).get(side, np.arange(width(module, side))), dtype=np.int64)


def units_kept(model: nn.Module, group: Group) -> list[int]:
    """The units of a group that the model still has, by their dense numbers."""
    end = group.ends[0]
    here = channels_kept(_module(model, end.path), end.side)
    return [int(u) for u in np.flatnonzero(np.isin(end.index, here).all(1))]


def is_layer_norm(module: Layer) -> bool:
    """LayerNorm or RMSNorm over the last axis: PyTorch's, or the model's own, which has its name (of T5, of Llama) and a number for each channel."""
    if isinstance(module, LAYER_NORMS):
        return len(module.normalized_shape) == 1
    own = [*module.parameters(), *module.buffers()]
    return (
        type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
        and isinstance(getattr(module, "weight", None), Tensor)
        and all(x.ndim == 1 and per_channel(x) and x.shape == module.weight.shape for x in own)
    )


def width(module: Layer, side: str) -> int:
    """Channels of one side of a layer, a pair, or a carrier, as it is now; or of a parameter of the model's own."""
    if side not in SIDES:
        tensor = getattr(module, side)
        return int(tensor.shape[long_axis(tensor)])
    if hasattr(module, MARK):
        return width(module[0] if side == "in" else module[1], side)
    if is_hf_conv1d(module):
        return int(module.weight.shape[1 if side == "out" else 0])
    if isinstance(module, nn.Embedding):
        return int(module.embedding_dim if side == "out" else module.num_embeddings)
    if is_layer_norm(module):
        return int(module.normalized_shape[0] if isinstance(module, LAYER_NORMS) else module.weight.numel())
    for name in (f"{side}_features", f"{side}_channels", "num_features", "num_parameters"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise SurgeryError(
        f"a {type(module).__name__} is not a layer whose channels can be removed: find the groups again after changing the model"
    )


def parameters_at(module: nn.Module, end: End) -> list[nn.Parameter]:
    """Of the layer at an end, or the one of the model's own."""
    if end.own:
        return [p for name, p in module.named_parameters(recurse=False) if name == end.side]
    return list(module.parameters())


def groups_of(module: Layer) -> int:
    """Groups of a convolution or of the pair it became; 1 for everything else."""
    return groups_of(module[0]) if hasattr(module, MARK) else int(getattr(module, "groups", 1))


def replayed(path: str, module: nn.Module, kept: Mapping[str, Sequence[int]], sizes: Mapping[str, Any]) -> list[Edit]:
    """The edits that make a dense layer the slim one that kept these channels; of another module they set its counts."""
    gone = {side: np.setdiff1d(np.arange(width(module, side)), np.asarray(stay)) for side, stay in kept.items()}
    return _edits(path, module, gone, sizes)


# ---- what goes ------------------------------------------------------------------------------------------------------


def _what_goes(
    model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Sequence[int]]
) -> tuple[dict[str, dict[str, Ints]], dict[str, dict[str, int | float]]]:
    by_name = {group.name: group for group in groups}
    gone: dict[str, dict[str, list[Ints]]] = {}
    counts: dict[str, dict[str, int | float]] = {}
    for name, units in kept.items():
        if name not in by_name:
            raise InvalidValueError(f"kept names {name!r}, which is no group; there are: {', '.join(list(by_name)[:6])}")
        group = by_name[name]
        stay = np.unique(np.asarray(list(units), dtype=np.int64))
        here = np.asarray(units_kept(model, group), dtype=np.int64)
        if not len(stay):
            raise InvalidValueError(f"kept[{name!r}] is empty: at least one unit stays")
        if len(strange := np.setdiff1d(stay, here)):
            raise InvalidValueError(f"kept[{name!r}] holds {int(strange[0])}, which is not one of the {len(here)} units that are left")
        for end in group.ends:
            leave = np.delete(end.index, stay, axis=0).ravel()
            gone.setdefault(end.path, {}).setdefault(end.side, []).append(leave)
        for count in group.counts:
            counts.setdefault(count.path, {})[count.name] = count.left(len(stay), group.units)
    joined = {path: {side: np.concatenate(parts) for side, parts in sides.items()} for path, sides in gone.items()}
    return joined, counts


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise SurgeryError(f"{path} is no longer in the model: find the groups again after changing the model") from None


# ---- new tensors ----------------------------------------------------------------------------------------------------


def _edits(path: str, module: nn.Module, gone: Mapping[str, Ints], counts: Mapping[str, Any]) -> list[Edit]:
    """The edits of one layer without these channels (dense numbers), its counts and its mark included; none where nothing changes."""
    mark = _mark(module)
    positions: dict[str, Ints] = {}
    for side, channels in gone.items():
        here = channels_kept(module, side)
        if len(here) != width(module, side):
            raise SurgeryError(f"{path} has {width(module, side)} channels on side {side!r}, its mark says {len(here)}")
        stay = np.flatnonzero(~np.isin(here, channels))
        if len(stay) == 0:
            raise InvalidValueError(f"{path} would lose all its channels on side {side!r}: at least one unit stays")
        if len(stay) < len(here):
            positions[side] = stay
            mark["dense"].setdefault(side, len(here))
            mark["kept"][side] = here[stay].tolist()
    if not positions and not counts:
        return []
    mark["sizes"] |= counts
    edits = [_edit(module, [(name, ((long_axis(getattr(module, name)), p),))], {}) for name, p in positions.items() if name not in SIDES]
    if not positions.keys().isdisjoint(SIDES):
        edits += _sliced(path, module, positions.get("out"), positions.get("in"))
        mark["sizes"] |= _sizes(module, positions.get("out"), positions.get("in"))
    return [*edits, Edit(module, {}, {}, {**counts, SLIM: mark})]


def per_channel(tensor: Tensor) -> bool:
    """One number for each channel: a single axis is longer than 1."""
    return tensor.is_floating_point() and tensor.numel() == max(tensor.shape, default=0) > 1


def for_channels(tensor: Tensor) -> bool:
    """May it hold numbers for channels: one for each, or one for each channel of each position, `[1, positions, channels]`?"""
    return per_channel(tensor) or (tensor.is_floating_point() and tensor.ndim == 3 and tensor.shape[0] == 1 and tensor.shape[2] > 1)


def long_axis(tensor: Tensor) -> int:
    """Of the channels."""
    return int(np.argmax(tensor.shape)) if per_channel(tensor) else tensor.ndim - 1


def _mark(module: nn.Module) -> dict[str, Any]:
    """A copy of the mark of a slim module, or a new one: dense widths, channels kept, and attributes as they are now."""
    kind = getattr(module, MARK)["kind"] if hasattr(module, MARK) else type(module).__name__
    mark: dict[str, Any] = {"kind": kind, "dense": {}, "kept": {}, "sizes": {}}
    return mark | {key: dict(value) for key, value in getattr(module, SLIM, {}).items() if key != "kind"}


def _sizes(module: Layer, out: Ints | None, into: Ints | None) -> dict[str, int | tuple[int]]:
    """The attributes that say how wide a layer is (of a pair: those of the dense layer that it stands for)."""
    if is_layer_norm(module):
        assert out is not None
        return {"normalized_shape": (len(out),)} if isinstance(module, LAYER_NORMS) else {}
    if isinstance(module, nn.Embedding):
        assert out is not None
        return {"embedding_dim": len(out)}
    if isinstance(module, (*NORMS, nn.PReLU)):
        assert out is not None
        return {"num_parameters" if isinstance(module, nn.PReLU) else "num_features": len(out)}
    if (groups := groups_of(module)) > 1:
        assert out is not None
        stay, into = whole_groups("", out, width(module, "out") // groups, width(module, "in") // groups)
        return {"groups": len(stay), "out_channels": len(out), "in_channels": len(into)}
    unfolding = getattr(module, MARK, {}).get("unfolding", "")
    if unfolding == "in,out" or is_hf_conv1d(module):
        names = {"out": "nf", "in": "nx"}
    elif unfolding == "out,in" or isinstance(module, nn.Linear):
        names = {"out": "out_features", "in": "in_features"}
    else:
        names = {"out": "out_channels", "in": "in_channels"}
    return {names[side]: len(p) for side, p in (("out", out), ("in", into)) if p is not None}


def _sliced(path: str, module: Layer, out: Ints | None, into: Ints | None) -> list[Edit]:
    """A layer (or a pair of layers, or a pair within it) with these positions of its channels only."""
    groups = groups_of(module)
    if hasattr(module, MARK):
        return _sliced_pair(path, module, groups, out, into)
    attributes = _sizes(module, out, into)
    if isinstance(module, (*NORMS, nn.PReLU)) or is_layer_norm(module):
        assert out is not None
        return [_edit(module, [(name, ((0, out),)) for name in ("weight", "bias", "running_mean", "running_var")], attributes)]
    out_axis, in_axis = (1, 0) if inputs_first(module) else (0, 1)
    if groups > 1:
        assert out is not None
        _, into = whole_groups(path, out, module.out_channels // groups, module.in_channels // groups)
        chosen = [(0, into if in_axis == 0 else out)]
    else:
        chosen = [(axis, p) for axis, p in ((out_axis, out), (in_axis, into)) if p is not None]
    tensors = [("weight", tuple(chosen))] + ([("bias", ((0, out),))] if out is not None else [])
    return [_edit(module, tensors, attributes)]


def _sliced_pair(path: str, pair: Layer, groups: int, out: Ints | None, into: Ints | None) -> list[Edit]:
    mark = dict(getattr(pair, MARK))
    shape = list(mark["shape"])
    out_axis, in_axis = (1, 0) if mark["unfolding"] in INPUTS_FIRST else (0, 1)
    if groups > 1:  # whole groups go from both layers: r channels between them for each
        assert out is not None
        rank = width(pair[0], "out") // groups
        stay, into = whole_groups(path, out, width(pair[1], "out") // groups, width(pair[0], "in") // groups)
        between = (stay[:, None] * rank + np.arange(rank)).ravel()
        shape[0] = len(into) if out_axis == 1 else len(out)
        edits = [*_sliced(path, pair[0], between, None), *_sliced(path, pair[1], out, None)]
    else:
        edits = []
        if into is not None:
            shape[in_axis] = len(into)
            edits += _sliced(path, pair[0], None, into)
        if out is not None:
            shape[out_axis] = len(out)
            edits += _sliced(path, pair[1], out, None)
    return [*edits, Edit(pair, {}, {}, {MARK: mark | {"shape": shape}})]


def whole_groups(path: str, out: Ints, out_width: int, in_width: int) -> tuple[Ints, Ints]:
    """Of a grouped layer that keeps these outputs: the groups that stay, and the inputs they read."""
    stay = np.unique(out // out_width)
    if len(stay) * out_width != len(out):
        raise SurgeryError(f"{path or 'a layer'} is grouped: its channels go by whole groups of {out_width}")
    return stay, (stay[:, None] * in_width + np.arange(in_width)).ravel()


def _edit(module: nn.Module, tensors: Iterable[tuple[str, tuple[tuple[int, Ints], ...]]], attributes: dict[str, Any]) -> Edit:
    parameters: dict[str, tuple[nn.Parameter, Callable[[Tensor], Tensor]]] = {}
    buffers: dict[str, Tensor] = {}
    for name, chosen in tensors:
        old = getattr(module, name, None)
        if not isinstance(old, Tensor):
            continue
        select = _selector(chosen)
        if name in module._buffers:
            buffers[name] = select(old.detach())
            continue
        new = nn.Parameter(select(old.detach()), requires_grad=old.requires_grad)
        parameters[name] = new, select
    return Edit(module, parameters, buffers, attributes)


def _selector(chosen: tuple[tuple[int, Ints], ...]) -> Callable[[Tensor], Tensor]:
    def select(tensor: Tensor) -> Tensor:
        result = tensor
        for axis, positions in chosen:
            result = result.index_select(axis, torch.as_tensor(positions, device=tensor.device))
        return stored_as(result, tensor)

    return select
