"""From a model to its groups: which layers are watched, one pass with labels, and what is tied in the end."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..attention import Attention
from ..checks import has_gradient_hooks, hooked
from ..distributed import bare
from ..matricize import has_own_forward, is_table, takes_entries, unfoldings
from ..measure import _countable_attention, call, check_inputs, seeded
from ..surgery.channels import (
    CARRIER,
    CONSUMER,
    NORMS,
    PRODUCER,
    SIDES,
    End,
    Group,
    Ints,
    channels_kept,
    for_channels,
    groups_of,
    is_layer_norm,
)
from ..surgery.factorize import MARK
from .labels import leaves
from .tracer import Decision, Tracer
from .trial import line, tried

NOT_REACHED = "not reached on the example inputs"
OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


def find_groups(model: nn.Module, example_inputs: Any) -> tuple[list[Group], dict[str, str]]:
    """The groups of units that can be removed exactly, tried on a copy; and why the outputs of other layers stay.

    The model is left as it was. Whatever goes wrong with an exotic model makes groups fewer, never an error.

    Args:
        example_inputs: the model's positional arguments; random numbers of the right shape and dtype will do.

    Returns:
        Groups in the order of their first producers, and one line for every other layer with an output of its own.
    """
    inputs = check_inputs(example_inputs, model)
    layers, reasons = _layers(model)
    patched = next((path or "the model" for path, m in model.named_modules() if not _goes_along(m)), None)
    if patched is not None:  # a copy would run the original
        return [], {
            path: reasons.get(
                path,
                f"{patched} has a forward of its own, set on the object (by a wrapper for mixed precision: build the compressor before it)",
            )
            for path in layers.producers
        }
    try:
        groups, held = _best_trace(copy.deepcopy(model).eval(), layers, inputs)
    except Exception as error:  # whatever goes on in a model's code
        return [], {path: reasons.get(path, f"the model could not be followed ({line(error)})") for path in layers.producers}
    reasons = held | reasons
    groups, failed = tried(model, groups, inputs)
    reasons |= failed
    inside = {end.path for group in groups for end in (*group.producers, *group.carriers)}
    order = [*layers.producers, *(path for path in reasons if path not in layers.producers)]
    return groups, {path: reasons.get(path, "nothing was found that reads it") for path in order if path not in inside}


def _goes_along(module: nn.Module) -> bool:
    """Does a copy of the module have a forward of the copy's own? The class's, or a method bound to the object, as Accelerate sets it; what
    `torch.compile` returned makes a new one."""
    forward = vars(module).get("forward")
    return forward is None or bare(module) is not module or (isinstance(forward, MethodType) and forward.__self__ is module)


@dataclasses.dataclass(slots=True)
class Layers:
    """Paths of the layers of a model: those with outputs of their own, those that pass units on, those not looked into; and where the model's own
    code holds a number for each channel: path and name. And the paths of tables that share one weight, with the linear layer that has it, too; and
    linear layers whose outputs stay, and why."""

    producers: list[str] = dataclasses.field(default_factory=list)
    carriers: list[str] = dataclasses.field(default_factory=list)
    opaque: dict[str, str] = dataclasses.field(default_factory=dict)
    own: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    shared: list[list[str]] = dataclasses.field(default_factory=list)
    fixed: dict[str, str] = dataclasses.field(default_factory=dict)


def _layers(model: nn.Module) -> tuple[Layers, dict[str, str]]:
    """The layers of a model by path, and the reasons that are known before anything runs."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                holders.setdefault(id(tensor), []).append(path)
    found, reasons = Layers(shared=_shared_tables(model, holders)), {}
    skip: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        above = next((why for prefix, why in skip if path.startswith(prefix)), None)
        if above is not None:
            if above and unfoldings(module):
                found.producers.append(path)
                reasons[path] = above
            continue
        kind = type(module).__name__
        pair = hasattr(module, MARK)
        supported = pair or is_table(module) or bool(unfoldings(module))
        parametrized = is_parametrized(module) or any(n in module._parameters for n in ("weight_g", "weight_v", "weight_orig"))
        carrier = isinstance(module, NORMS) or (isinstance(module, nn.PReLU) and module.num_parameters > 1)
        carrier |= is_layer_norm(module)
        why = None
        if pair and takes_entries(module):
            why = "it is an embedding's pair: its width stays"
        elif isinstance(module, OPAQUE):
            why = f"{kind} is not supported"
        elif parametrized:
            why = "parametrized (weight_norm, spectral_norm, ...): its weight is computed anew on every forward"
        elif supported or carrier:
            if isinstance(module, nn.Linear) and module.bias is not None and (others := [p for p in holders[id(module.bias)] if p != path]):
                found.fixed[path] = (
                    f"its bias is shared with {others[0] or 'the model itself'}"  # by the output layer of BERT: its inputs are no matter of the bias
                )
            why = _untouchable(path, module, holders, next((paths for paths in found.shared if path in paths), [path]), path in found.fixed)
        if why is None and not supported and not carrier:
            found.own += [(path, name) for name, tensor in _own(module) if len(holders[id(tensor)]) == 1]
            continue
        if supported or parametrized or isinstance(module, OPAQUE):
            found.producers.append(path)
        if why is not None:
            reasons[path] = why
            found.opaque[path] = why
        elif carrier:
            found.carriers.append(path)
        if pair or why is not None:
            skip.append((f"{path}.", "" if pair else why or ""))
    reasons |= {p: "the model itself is this layer" for p in found.producers if p == ""}
    return found, reasons


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are trained and buffers of this module itself with numbers for each channel."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or name in SIDES or name in module._non_persistent_buffers_set or not for_channels(tensor):
            continue
        if tensor.requires_grad is isinstance(tensor, nn.Parameter) and not has_gradient_hooks(tensor):
            yield name, tensor


def _shared_tables(model: nn.Module, holders: Mapping[int, list[str]]) -> list[list[str]]:
    """Paths of embeddings that share one weight, and of the linear layer that has it, too, to say which entry is next."""
    found = []
    for paths in holders.values():
        modules = [model.get_submodule(path) for path in paths]
        linear = sum(isinstance(m, nn.Linear) for m in modules)
        alike = all((is_table(m) or isinstance(m, nn.Linear)) and m.weight is modules[0].weight for m in modules)
        if alike and linear <= 1 and linear < len(paths) > 1:
            found.append(paths)
    return found


def _untouchable(path: str, module: nn.Module, holders: Mapping[int, Sequence[str]], shared: Sequence[str], fixed: bool) -> str | None:
    parameters = list(module.parameters())
    if has_own_forward(module):
        return "it has a forward of its own, set on the object, which may rely on its width"
    if any(p.is_complex() for p in parameters):
        return "its numbers are complex"
    if any(hooked(m) for m in module.modules()):
        return "it has forward or backward hooks, which may rely on its width"
    if any(has_gradient_hooks(p) for p in parameters):
        return "its parameters have hooks on their gradients, which would be lost"
    if not all(p.requires_grad for p in parameters):
        return "frozen (requires_grad is False)"
    for parameter in parameters:
        if fixed and parameter is module.bias:
            continue
        others = sorted(p for p in holders[id(parameter)] if p not in shared and not p.startswith(f"{path}."))
        if others:
            return f"its weight is shared with {others[0] or 'the model itself'}"
    return None


def _best_trace(twin: nn.Module, layers: Layers, inputs: Sequence[Any]) -> tuple[list[Group], dict[str, str]]:
    """Where a view leaves it open which axis the units are (heads, or places within a head), the first axis that keeps
    most channels removable is taken; decided one operation after the other."""
    choices: dict[Decision, int] = {}
    best = _trace(twin, layers, inputs, choices)
    for key, axes in dict(best[2]).items():
        if all(d != key for d in best[2]):
            continue
        for axis in axes[1:]:
            other = _trace(twin, layers, inputs, choices | {key: axis})
            if _size(other[0]) > _size(best[0]):
                best, choices = other, choices | {key: axis}
    return best[0], best[1]


def _size(groups: Sequence[Group]) -> int:
    """Channels that can go."""
    return sum(end.index.size for group in groups for end in group.producers)


def _trace(
    twin: nn.Module, layers: Layers, inputs: Sequence[Any], choices: Mapping[Decision, int]
) -> tuple[list[Group], dict[str, str], dict[Decision, tuple[int, ...]]]:
    tracer = Tracer(choices)
    handles = []

    def watch(path: str, module: nn.Module, why: str | None) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            tracer.inside += 1

        def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            tracer.inside -= 1
            if tracer.inside:
                return
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            usual = len(given) == 1 or (given and isinstance(module, nn.Embedding))
            if why is None and usual and isinstance(result, Tensor):
                tracer.layer(path, module, given[0], result)
                if path in layers.fixed:
                    tracer.hold_all(result, layers.fixed[path])
            else:
                reason = f"{path} reads it, which stays as it is: {why or 'it is called in an unusual way'}"
                tracer.hold_all((args, kwargs), reason, list(leaves(result)) or None)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))

    def overlook(path: str, module: nn.Module) -> None:
        def hold(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if not tracer.inside:
                tracer.hold_all((args, kwargs, result), f"hooks on {path} see it")

        handles.append(module.register_forward_hook(hold, with_kwargs=True))

    def apart(module: nn.Module) -> None:
        def shift(by: int) -> None:
            tracer.apart += by

        handles.append(module.register_forward_pre_hook(lambda *_: shift(1)))
        handles.append(module.register_forward_hook(lambda *_: shift(-1)))

    for path, module in twin.named_modules():
        if path and hooked(module):  # of a layer, the reason is known already; here it is a block, or an activation
            overlook(path, module)
    for module in twin.modules():
        if isinstance(module, Attention):
            apart(module)
    for path in [*layers.producers, *layers.carriers, *layers.opaque]:
        if path in layers.opaque or not any(path.startswith(f"{p}.") for p in layers.opaque):
            watch(path, twin.get_submodule(path), layers.opaque.get(path))
    for path, name in layers.own:
        tracer.own(path, name, getattr(twin.get_submodule(path), name))
    try:
        with torch.inference_mode(), _countable_attention(), seeded():
            own = [x.clone() if isinstance(x, Tensor) else x for x in inputs]  # made here: tensors without a history
            with tracer:
                outputs = call(twin, own)
    finally:
        for handle in handles:
            handle.remove()
    tracer.hold_all(outputs, "it is an output of the model")
    for paths in layers.shared:
        _tie(twin, paths, layers, tracer)
    groups, reasons = _grouped(twin, layers, tracer)
    return groups, reasons, tracer.decisions


def _tie(model: nn.Module, paths: Sequence[str], layers: Layers, tracer: Tracer) -> None:
    """Layers that share one weight have the same units; a table that nothing has called has those of the others. The entries stay."""
    sides = {p: (p, "in", CONSUMER) if isinstance(model.get_submodule(p), nn.Linear) else (p, "out", PRODUCER) for p in paths}
    unknown = next((p for p, side in sides.items() if side not in tracer.layers and (side[1] == "in" or p in layers.opaque)), None)
    for entries in [tracer.layers[key] for p in paths if sides[p][1] == "in" and (key := (p, "out", PRODUCER)) in tracer.layers]:
        tracer.meet(entries, np.zeros_like(entries), f"it says which entry of {paths[0]} is meant")
    reached = {side: tracer.layers[side] for side in sides.values() if side in tracer.layers}
    if not reached:
        return
    units = next(iter(reached.values()))
    for (path, *_), here in reached.items():
        units = tracer.meet(units, here, f"{paths[0]} and {path} share their weight, but not the same units")
    if unknown is not None:
        tracer.meet(units, np.zeros_like(units), f"{unknown} has the same weight, and is not followed")
    tracer.layers |= dict.fromkeys(sides.values(), units)


def _grouped(model: nn.Module, layers: Layers, tracer: Tracer) -> tuple[list[Group], dict[str, str]]:
    """Units that share a producer are one group."""
    units, held = tracer.units, tracer.held
    reasons: dict[str, str] = {}
    roots = {key: units.find(ids) for key, ids in tracer.layers.items()}
    producers = [path for path in layers.producers if (path, "out", PRODUCER) in roots]
    free: dict[str, list[int]] = {}
    for path in layers.producers:
        if path not in producers:
            if path not in layers.opaque:
                grouped = groups_of(model.get_submodule(path)) > 1
                reasons[path] = "grouped: its outputs follow its inputs, which stay" if grouped else NOT_REACHED
            continue
        here = roots[path, "out", PRODUCER]
        free[path] = [int(r) for r in dict.fromkeys(here.tolist()) if r not in held]
        stuck = [int(r) for r in here if r in held]
        if stuck:
            reasons[path] = held[stuck[0]]

    buckets: list[tuple[list[str], dict[int, None]]] = []
    for path in producers:
        touching = [b for b in buckets if not b[1].keys().isdisjoint(free[path])]
        paths, members = [path], dict.fromkeys(free[path])
        for bucket in touching:
            buckets.remove(bucket)
        merged: dict[int, None] = {}
        for bucket in touching:
            merged |= bucket[1]
        buckets.append(([*(p for b in touching for p in b[0]), *paths], merged | members))

    groups = []
    for paths, bucket_units in buckets:
        if not bucket_units:
            continue
        group, why = _group(model, sorted(paths, key=producers.index), list(bucket_units), roots)
        if group is not None:
            groups.append(group)
        for path in paths if why else ():
            reasons.setdefault(path, why)
    return sorted(groups, key=lambda g: producers.index(g.name)), reasons


def _group(model: nn.Module, paths: list[str], members: list[int], roots: Mapping[tuple[str, str, str], Ints]) -> tuple[Group | None, str]:
    if len(members) < 2:
        return None, "all its channels are tied into one unit"
    order = dict.fromkeys(int(r) for path in paths for r in roots[path, "out", PRODUCER])
    inside = set(members)
    position = np.full(1 + max(int(here.max()) for here in roots.values()), -1)
    position[[root for root in order if root in inside]] = np.arange(len(members))
    ends = []
    for (path, side, role), here in roots.items():
        mine = position[here]
        if not (mine >= 0).any():
            continue
        counts = np.bincount(mine[mine >= 0], minlength=len(members))
        if counts.min() != counts.max():
            return None, f"its units do not have equal shares in {path}{'' if side in SIDES else f'.{side}'}"
        channels = np.argsort(mine, kind="stable")[(mine < 0).sum() :]
        dense = channels_kept(model.get_submodule(path), side)[channels]
        ends.append(End(path, side, dense.reshape(len(members), -1), role))
    ends.sort(key=lambda end: ((PRODUCER, CARRIER, CONSUMER).index(end.role), paths.index(end.path) if end.role == PRODUCER else 0))
    group = Group(paths[0], len(members), tuple(ends))
    if not group.consumers:
        return None, "no layer reads it"
    return group, ""
