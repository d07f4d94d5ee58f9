"""Units that put out the same number whatever the input: what the number is, and how the layers that read it take it over.

A unit whose rows are zero in every layer that computes it puts out a constant: its bias, sent through the norms and
activations behind it. We look at what its consumers really see, on the example inputs and on others like them (a gate that other
inputs move must not look like a constant), and let their biases say it: exact if the constant is
zero, or if nothing on the way pads it with zeros. Where a consumer without a bias goes straight into a BatchNorm, the
running mean takes the constant instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..matricize import CONVS, TRANSPOSED_CONVS, Layer, by_inputs, by_outputs
from ..measure import call, check_inputs, evaluating, varied
from .channels import NORMS, End, Group, Ints, channels_kept, units_kept
from .factorize import MARK, plain_layers

LOOKS = 4  # at the example inputs, then at others of their shapes
SAME = 1e-5  # two numbers that differ by less, relatively, are one: attention averages a constant with rounding


@dataclass(frozen=True, slots=True)
class Constants:
    """The dead units of a group.

    Attributes:
        units: those that can go once their constants are folded, by their dense numbers.
        values: what each consumer sees of them: `[units, k]` for the `k` channels of a unit.
        norms: consumers without a bias, and the BatchNorm behind each that takes the constants.
        stays: dead units whose removal would not be exact, and why.
    """

    units: tuple[int, ...]
    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    stays: dict[int, str] = field(default_factory=dict)


def dead_constants(model: nn.Module, groups: Sequence[Group], example_inputs: Any) -> dict[str, Constants]:
    """The dead units of each group that has some, and what their consumers see of them (eval mode)."""
    silent = {group.name: _silent(model, group) for group in groups}
    groups = [group for group in groups if silent[group.name]]
    if not groups:
        return {}
    watch = _Watch(model, [end.path for group in groups for end in (*group.consumers, *_padded_carriers(model, group))])
    given = check_inputs(example_inputs, model)
    watch.run(given)
    for seed in range(1, LOOKS):
        with contextlib.suppress(Exception):  # a model need not run on what the examples become
            watch.run(varied(given, seed))
    return {group.name: _constants(model, group, silent[group.name], watch) for group in groups}


@torch.no_grad()
def fold(model: nn.Module, groups: Sequence[Group], dead: dict[str, Constants]) -> None:
    """Let the consumers say the constants themselves, and no longer read the units: the model computes what it did."""
    for group in groups:
        found = dead.get(group.name)
        if found is None or not found.units:
            continue
        for end in group.consumers:
            module: Layer = model.get_submodule(end.path)
            here = channels_kept(module, "in")
            positions = np.searchsorted(here, end.index[list(found.units)].ravel())
            shift = response(module, torch.from_numpy(found.values[end.path].ravel()), positions)
            if bool(shift.any()):
                if end.path in found.norms:
                    norm: Layer = model.get_submodule(found.norms[end.path])
                    norm.running_mean.sub_(shift.to(norm.running_mean))
                else:
                    bias = plain_layers(module)[-1].bias
                    bias.add_(shift.to(bias))
            by_inputs(plain_layers(module)[0])[torch.from_numpy(positions)] = 0


def unread_units(model: nn.Module, group: Group) -> list[int]:
    """Units (by their dense numbers) that are there, and that no consumer reads: all its columns are zero."""
    here = units_kept(model, group)
    read = np.zeros(len(here), dtype=bool)
    for end in group.consumers:
        module: Layer = model.get_submodule(end.path)
        columns = by_inputs(plain_layers(module)[0]).detach().flatten(1).ne(0).any(1).cpu().numpy()
        read |= columns[np.searchsorted(channels_kept(module, "in"), end.index[here])].any(1)
    return [unit for unit, r in zip(here, read, strict=True) if not r]


def _silent(model: nn.Module, group: Group) -> list[int]:
    """Units whose rows are zero in all their producers; never all: the last one stays."""
    here = units_kept(model, group)
    zero = np.ones(len(here), dtype=bool)
    for end in group.producers:
        module: Layer = model.get_submodule(end.path)
        dead = ~by_outputs(plain_layers(module)[-1]).detach().flatten(1).any(1).cpu().numpy()
        zero &= dead[np.searchsorted(channels_kept(module, "out"), end.index[here])].all(1)
    silent = [unit for unit, z in zip(here, zero, strict=True) if z]
    return silent[1:] if len(silent) == len(here) else silent


def _constants(model: nn.Module, group: Group, silent: list[int], watch: _Watch) -> Constants:
    stays: dict[int, str] = {}
    for end in _padded_carriers(model, group):
        conv: Layer = model.get_submodule(end.path)
        places = np.searchsorted(channels_kept(conv, "out"), end.index[silent])
        low, high = (x.reshape(conv.groups, -1) for x in watch.seen[end.path])
        moved: NDArray[np.bool_] = np.any(np.maximum(-low, high), axis=1)
        seen = moved[places // (conv.out_channels // conv.groups)].any(1).tolist()
        stays |= {unit: f"its constant goes through {end.path}, which pads with zeros" for unit, s in zip(silent, seen, strict=True) if s}
    values: dict[str, NDArray[np.float64]] = {}
    for end in group.consumers:
        module = model.get_submodule(end.path)
        places = np.searchsorted(channels_kept(module, "in"), end.index[silent])
        low, high = watch.seen[end.path]
        lows, highs = low[places], high[places]
        values[end.path] = np.where((lows == 0) & (highs == 0), 0.0, (lows + highs) / 2)
        near = np.subtract(highs, lows) - SAME * np.maximum(np.abs(highs), np.abs(lows))
        even = (near.max(axis=1) <= 0).tolist()
        size = np.abs(values[end.path]).max(1).tolist()
        obstacle = _obstacle(module, end.path, watch)
        for unit, constant, value in zip(silent, even, size, strict=True):
            if not constant:
                stays.setdefault(unit, f"{end.path} does not see a constant of it")
            elif value and obstacle:
                stays.setdefault(unit, f"its constant {value:.3g} cannot go into {end.path}, which {obstacle}")
    goes = [i for i, unit in enumerate(silent) if unit not in stays]
    norms = {end.path: watch.norms[end.path] for end in group.consumers if end.path in watch.norms}
    return Constants(tuple(silent[i] for i in goes), {path: v[goes] for path, v in values.items()}, norms, stays)


def shares_bias(model: nn.Module, module: Layer) -> bool:
    """Is the bias of this layer (of a pair the last) another module's, too? What is added to it would be added there."""
    bias = plain_layers(module)[-1].bias
    return bias is not None and sum(p is bias for m in model.modules() for p in m._parameters.values()) > 1


def _obstacle(module: Layer, path: str, watch: _Watch) -> str | None:
    """Why a consumer cannot take a constant that is not zero."""
    for layer in plain_layers(module):
        if isinstance(layer, TRANSPOSED_CONVS):
            return "is a transposed convolution: its outputs see different parts of the kernel"
        if _pads(layer):
            return "pads with zeros"
    if plain_layers(module)[-1].bias is None and path not in watch.norms:
        return "has no bias"
    return "has a bias that is another module's, too" if shares_bias(watch.model, module) else None


def _pads(layer: Layer) -> bool:
    padding = getattr(layer, "padding", 0)
    padded = padding == "same" if isinstance(padding, str) else bool(np.any(padding))
    return padded and layer.padding_mode == "zeros" and max(layer.kernel_size) > 1


def _padded_carriers(model: nn.Module, group: Group) -> list[End]:
    """Grouped convolutions that pass the units on and make something else of a constant at the border: where there is nothing but border in
    the example inputs, that does not show."""
    carriers = [(end, model.get_submodule(end.path)) for end in group.carriers]
    return [end for end, module in carriers if isinstance(module, CONVS) and not isinstance(module, TRANSPOSED_CONVS) and _pads(module)]


class _Watch:
    """Forward passes: least and greatest number in each input channel of the consumers, and the BatchNorm that alone
    reads the output of one without a bias."""

    def __init__(self, model: nn.Module, consumers: Sequence[str]):
        self.model = model
        self.seen: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self.norms: dict[str, str] = {}
        self.paths = dict.fromkeys(consumers)

    def run(self, inputs: Sequence[Any]) -> None:
        calls: dict[str, int] = {}
        read_by: dict[str, list[str]] = {}
        made: dict[int, tuple[Tensor, str]] = {}
        inside = 0

        def reader(name: str, given: Any) -> None:
            for x in tree_leaves(given):
                if isinstance(x, Tensor) and id(x) in made:
                    read_by.setdefault(made[id(x)][1], []).append(name)

        class Readers(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if not inside:
                    reader("", (args, kwargs))
                return func(*args, **(kwargs or {}))

        handles = []
        for path in self.paths:
            module = self.model.get_submodule(path)

            def note(module: nn.Module, args: Any, kwargs: Any, y: Any, path: str = path) -> None:
                x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
                self._note(path, module, x.detach())
                calls[path] = calls.get(path, 0) + 1
                if plain_layers(module)[-1].bias is None and isinstance(y, Tensor):
                    made[id(y)] = y, path

            handles.append(module.register_forward_hook(note, with_kwargs=True))
        for path, module in self.model.named_modules():
            if isinstance(module, NORMS[:4]):

                def enter(module: nn.Module, args: Any, path: str = path) -> None:
                    nonlocal inside
                    reader(path, args)
                    calls[path] = calls.get(path, 0) + 1
                    inside += 1

                def leave(module: nn.Module, args: Any, y: Any) -> None:
                    nonlocal inside
                    inside -= 1

                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            with evaluating(self.model), torch.inference_mode(), Readers():
                reader("", call(self.model, inputs))
        finally:
            for handle in handles:
                handle.remove()
        for path, readers in read_by.items():
            norm = readers[0]
            only = len(set(readers)) == 1 and norm and calls[norm] == calls[path] == len(readers)
            if only and getattr(self.model.get_submodule(norm), "running_mean", None) is not None:
                self.norms[path] = norm

    def _note(self, path: str, module: Layer, x: Tensor) -> None:
        core = plain_layers(module)[0]
        axis = x.ndim - 1 if core.weight.ndim == 2 else x.ndim - core.weight.ndim + 1
        flat = x.movedim(axis, 0).flatten(1).double()
        low, high = flat.amin(1).cpu().numpy(), flat.amax(1).cpu().numpy()
        if path in self.seen:
            low, high = np.minimum(low, self.seen[path][0]), np.maximum(high, self.seen[path][1])
        self.seen[path] = low, high


def response(module: Layer, values: Tensor, positions: Ints | None = None) -> Tensor:
    """What a layer without its bias puts out for a constant in its input channels, or in these of them, in float64."""
    if hasattr(module, MARK):
        return response(module[1], response(module[0], values, positions))
    columns = by_inputs(module).detach().cpu().double()
    columns = columns.flatten(2).sum(2) if columns.ndim > 2 else columns
    return (columns if positions is None else columns[torch.from_numpy(positions)]).T @ values
