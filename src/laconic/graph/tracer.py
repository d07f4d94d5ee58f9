"""One forward pass with labels beside the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..matricize import CONVS, TRANSPOSED_CONVS, Layer
from ..surgery.channels import CARRIER, CONSUMER, NORMS, PRODUCER, Ints, groups_of, is_layer_norm, long_axis
from ..surgery.factorize import plain_layers
from .labels import Label, Units, leaves
from .operations import PLACE_BY_PLACE, Operation, rule_for, unknown

Decision = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Tracer(TorchDispatchMode):
    """Labels beside tensors.

    Args:
        choices: for an operation that leaves units along several axes, the axis whose slices become the units.

    Attributes:
        decisions: every such operation that was met, with the axes that it could be.
        layers: for each (path, side, role) the unit of each channel.
        apart: depth of modules whose own results may be thrown away (`Attention`, which averages its weights over the heads for nobody).
        seen: which of the reasons to hold units (bits, in their order) count: all that arise elsewhere, and those that arise there and reach an output of the model.
    """

    def __init__(self, choices: Mapping[Decision, int]):
        super().__init__()
        self.units = Units()
        self.choices = choices
        self.decisions: dict[Decision, tuple[int, ...]] = {}
        self.layers: dict[tuple[str, str, str], Ints] = {}
        self.made: dict[str, Ints] = {}
        self.inside = 0  # depth of layers whose own operations are not followed
        self.apart = 0
        self.seen = 0
        self._labels: dict[int, tuple[Tensor, Label]] = {}  # by id; the tensor is kept alive, so that ids are not reused
        self._holds: dict[int, tuple[Tensor, int]] = {}  # the reasons to hold units that have gone into a tensor, as bits

    def label(self, x: Any) -> Label | None:
        entry = self._labels.get(id(x)) if isinstance(x, Tensor) else None
        return entry[1] if entry else None

    def set_label(self, x: Tensor, label: Label | None) -> None:
        if label is None or not label.ids.any():
            self._labels.pop(id(x), None)
        else:
            assert x.shape[label.axis] == len(label.ids)
            self._labels[id(x)] = x, label

    def passed_on(self, given: Any, first: int, made: Any) -> None:
        """What has gone into some tensors, and the reasons from the `first` on, go into others; what makes none (a number, say) decides what follows."""
        fresh = (1 << len(self.units.holds)) - (1 << first)
        self.seen |= 0 if self.apart else fresh
        bits = self.bits_of(given) | fresh
        outputs = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
        if not outputs:
            self.seen |= bits
        for x in outputs if bits else ():
            self._holds[id(x)] = x, bits | self.bits_of(x)

    def bits_of(self, values: Any) -> int:
        bits = 0
        for x in tree_leaves(values):
            bits |= self._holds[id(x)][1] if isinstance(x, Tensor) and id(x) in self._holds else 0
        return bits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        first = len(self.units.holds)
        result = self.followed(func, args, kwargs)
        written = [x for x, a in zip(args, func._schema.arguments, strict=False) if a.alias_info is not None and a.alias_info.is_write]
        self.passed_on((args, kwargs), first, (result, written))
        return result

    def followed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation, with labels."""
        labelled = [x for x in tree_leaves((args, kwargs)) if self.label(x)]
        if not labelled:
            return func(*args, **kwargs)
        name, rule = func.overloadpacket.__name__, rule_for(func)
        if rule is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            rule = unknown
        if rule not in PLACE_BY_PLACE and not self.forget(labelled):
            return func(*args, **kwargs)
        written = [x for x, a in zip(args, func._schema.arguments, strict=False) if a.alias_info is not None and a.alias_info.is_write]
        before = [self.label(x) for x in written]
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        op = Operation(self, func, name, args, kwargs, outputs)
        for x, label in zip(outputs, rule(op), strict=False):
            fits = label is None or (label.axis < x.ndim and x.shape[label.axis] == len(label.ids))
            if label is not None and not fits:
                self.units.hold(label.ids, f"{name} has a second output of another shape")
            self.set_label(x, label if fits else None)
        for x, old in zip(written, before, strict=True):
            new = self.label(x)
            # Whatever shares its memory changes too: only what leaves the units as they are is followed.
            if not _same(self.units, old, new):
                for label in (old, new):
                    if label is not None:
                        self.units.hold(label.ids, f"{name} writes in place")
        return result

    def canonical(self, full: Tensor, op: str, shape: tuple[int, ...]) -> Label | None:
        """Units place by place -> along one axis; where they vary along several, slices of one of them are tied."""
        if not full.numel():
            return None
        varying = tuple(a for a in range(full.ndim) if full.stride(a) and bool((full != full.narrow(a, 0, 1)).any()))
        small = full
        for a in range(full.ndim):
            small = small if a in varying else small.narrow(a, 0, 1)
        ids = small.cpu().numpy()
        if not varying:
            self.units.hold(ids.reshape(-1), "one of its channels is taken out by itself")
            return None
        axis = varying[0]
        if len(varying) > 1:
            key = (op, shape, tuple(full.shape), varying)
            axis = self.choices.get(key, self.decisions.setdefault(key, varying)[0])
            slices = np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)
            mixed = (slices == 0).any(1)
            self.units.hold(slices[mixed].ravel(), f"{op} puts it beside numbers that are no layer's output")
            first = slices.max(1)
            self.units.tie(np.where(slices != 0, slices, first[:, None]), np.broadcast_to(first[:, None], slices.shape))
            ids = first
        return Label(axis, ids.reshape(-1).astype(np.int64))

    def full(self, x: Tensor) -> Tensor:
        """The unit of every place of a tensor."""
        label = self.label(x)
        if label is None:
            return torch.zeros((1,) * x.ndim, dtype=torch.int64, device=x.device).expand(x.shape)
        ids = torch.from_numpy(self.units.find(label.ids)).to(x.device)
        return ids.reshape([-1 if a == label.axis else 1 for a in range(x.ndim)]).expand(x.shape)

    # ---- layers -----------------------------------------------------------------------------------------------------

    def layer(self, path: str, module: Layer, x: Tensor, y: Tensor) -> None:
        """A layer has read `x` and made `y`."""
        first = len(self.units.holds)
        self.read_and_made(path, module, x, y)
        self.passed_on(x, first, y)

    def read_and_made(self, path: str, module: Layer, x: Tensor, y: Tensor) -> None:
        if isinstance(module, nn.Embedding):
            if y.shape[-1] != module.embedding_dim:  # of the model's own, which makes something else
                return
            self.set_label(y, Label(y.ndim - 1, self.made_by(path, y.shape[-1])))
            return
        label, channels = self.label(x), _channel_axis(module, x)
        if is_layer_norm(module) and (label is None or label.axis < channels):
            self.set_label(y, label)  # over other axes than the units'
            return
        if label is not None and label.axis != channels:
            self.units.hold(label.ids, f"{path} works along another axis of it")
            label = None
        ids = label.ids if label is not None else np.zeros(x.shape[channels], dtype=np.int64)
        if isinstance(module, (*NORMS, nn.PReLU)) or is_layer_norm(module):
            self.note(path, "out", CARRIER, ids)
            made = ids
        elif (groups := groups_of(module)) > 1:
            rows = ids.reshape(groups, -1)
            self.units.hold(rows[(rows == 0).any(1)].ravel(), f"{path} is grouped, and reads it beside numbers that are no layer's output")
            self.units.tie(rows, np.broadcast_to(rows[:, :1], rows.shape))
            made = np.repeat(rows[:, 0], y.shape[channels] // groups)
            self.note(path, "out", CARRIER, made)
        else:
            self.note(path, "in", CONSUMER, ids)
            made = self.made_by(path, y.shape[channels])
        self.set_label(y, Label(channels, made))

    def made_by(self, path: str, channels: int) -> Ints:
        """The units that a producer puts out, in all its calls the same."""
        if path not in self.made:
            self.made[path] = self.units.new(channels)
            self.note(path, "out", PRODUCER, self.made[path])
        return self.made[path]

    def own(self, path: str, name: str, tensor: Tensor) -> None:
        """A parameter or buffer of the model's own, with numbers for each channel: of what, will be seen where the two meet."""
        axis = long_axis(tensor)
        self.layers[path, name, CARRIER] = ids = self.units.new(tensor.shape[axis])
        self.set_label(tensor, Label(axis, ids))

    def forget(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Give up labels of the model's own that have met no layer's units: they belong to something else. Returns the tensors that keep theirs."""
        made = self.units.find(np.concatenate([np.zeros(0, dtype=np.int64), *self.made.values()]))
        kept = []
        for x in tensors:
            label = self.label(x)
            if label is not None and np.isin(self.units.find(label.ids), made).any():
                kept.append(x)
            elif label is not None:
                self.units.hold(label.ids, "it is used in another way, too")
                self.set_label(x, None)
        return kept

    def note(self, path: str, side: str, role: str, ids: Ints) -> None:
        """What a layer reads or makes; at a second call it must be tied to what it was at the first."""
        before = self.layers.get((path, side, role))
        self.layers[path, side, role] = ids if before is None else self.units.meet(before, ids, f"{path} also reads something else")

    def meet(self, a: Ints, b: Ints, reason: str) -> Ints:
        """Tie what is known of two layers' units once all has run; a unit that meets no unit is held."""
        first = len(self.units.holds)
        met = self.units.meet(a, b, reason)
        self.seen |= (1 << len(self.units.holds)) - (1 << first)
        return met

    def hold_all(self, values: Any, reason: str, made: Any = None) -> None:
        """Hold the units of these tensors: for good, or in so far as what is `made` of them matters."""
        first = len(self.units.holds)
        for x in leaves(values):
            if (label := self.label(x)) is not None:
                self.units.hold(label.ids, reason)
        self.passed_on(list(leaves(values)), first, made)

    @property
    def held(self) -> dict[int, str]:
        return self.units.held(self.seen)


def _channel_axis(module: Layer, x: Tensor) -> int:
    core = plain_layers(module)[0]
    if isinstance(core, (*CONVS, *TRANSPOSED_CONVS)):
        return x.ndim - core.weight.ndim + 1
    if isinstance(core, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
        return x.ndim - 1 - int(type(core).__name__[-2])
    return 1 if isinstance(core, (*NORMS, nn.PReLU)) else x.ndim - 1


def _same(units: Units, a: Label | None, b: Label | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.axis == b.axis and np.array_equal(units.find(a.ids), units.find(b.ids))
