"""Which groups have channels whose basis is free: the residual stream, and the places within attention heads. Both are tried on a copy."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..measure import call, evaluating
from ..surgery.basis import Basis, Heads, Stream, flatten, is_linear_stream, positions, turn_heads, turn_stream
from ..surgery.channels import PRODUCER, End, Group, channels_kept
from ..watch import Watch
from .trial import Trial, gap, largest, line, settled


def free_bases(
    model: nn.Module, groups: Sequence[Group], inputs: Sequence[Any]
) -> tuple[list[Group], dict[str, Stream | Heads], dict[str, str]]:
    """Groups whose channels may be turned, by name; groups of heads become groups of the places within all heads, where these can go.

    The model is left as it was. Whatever goes wrong makes them fewer, never an error.

    Returns:
        The groups, in their order; the bases; and why other groups of heads, and streams, have none.
    """
    bases: dict[str, Stream | Heads] = {}
    reasons: dict[str, str] = {}
    try:
        trial = Trial(model, inputs)
    except Exception as error:
        return list(groups), {}, {group.name: line(error) for group in groups if is_linear_stream(model, group) or group.of_heads}
    within: dict[str, tuple[Group, Heads]] = {}
    for group in groups:
        try:
            if is_linear_stream(model, group):
                bases[group.name] = _stream(trial, group)
            elif group.of_heads:
                within[group.name] = _places(trial, group)
        except _NotFree as why:
            reasons[group.name] = str(why)
        except Exception as error:
            reasons[group.name] = line(error)
    passed, failed = settled(trial, [places for places, _ in within.values()])
    reasons |= failed
    passing = {group.name: group for group in passed}
    bases |= {name: heads for name, (_, heads) in within.items() if name in passing}
    return [passing.get(group.name, group) for group in groups], bases, reasons


class _NotFree(Exception):  # noqa: N818  no error
    """Why a group keeps its axes."""


def _stream(trial: Trial, group: Group) -> Stream:
    model = trial.twin
    norms = [end.path for end in group.carriers if not end.own]
    readers, behind = _read_from(trial, norms, [end.path for end in group.consumers])
    centred = any(_takes_mean_off(trial, path) for path in norms)
    tables = {id(model.get_submodule(end.path).weight) for end in group.producers}
    tied = [end.path for end in group.consumers if id(model.get_submodule(end.path).weight) in tables]
    flat = dict.fromkeys(behind[path] for path in tied if path in behind)
    stream = Stream({path: tuple(p for p, norm in readers.items() if norm == path) for path in norms}, centred, tuple(flat))
    rotation = random_rotation(len(positions(model, group, group.producers[0])), centred)
    if trial.changed(lambda twin: turn_stream(twin, group, stream, rotation), first=lambda twin: flatten(twin, stream)):
        raise _NotFree("other axes for its channels change the outputs")
    return stream


def random_rotation(size: int, centred: bool, seed: int = 0) -> Tensor:
    """An orthogonal matrix, float64; one that keeps the mean of the channels, if `centred`."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    if not centred:
        return torch.linalg.qr(noise)[0]
    rest = across_the_mean(size)
    turn = torch.linalg.qr(noise[1:, 1:])[0]
    return rest @ turn @ rest.T + 1 / size


def across_the_mean(size: int) -> Tensor:
    """Orthonormal columns `[size, size - 1]`, each of which sums to 0."""
    start = torch.eye(size, dtype=torch.float64, device="cpu")
    start[:, 0] = 1
    return torch.linalg.qr(start)[0][:, 1:]


def _places(trial: Trial, group: Group) -> tuple[Group, Heads]:
    """The places within the heads of a group as units, each with its channels of queries, keys and values in all heads."""
    if len(group.consumers) != 1 or group.carriers:
        raise _NotFree("more than a product of queries and keys, and a mix of values, lies between its layers")
    consumer = group.consumers[0]
    places = consumer.index.shape[1]
    parts: list[End] = []
    for end in group.producers:
        if end.index.shape[1] % places == 0:
            blocks = end.index.reshape(group.units, -1, places).swapaxes(0, 1)
            parts += [End(end.path, end.side, np.ascontiguousarray(block.T), PRODUCER) for block in blocks]
    if len(parts) != 3:
        raise _NotFree("its heads are not one query, one key and one value of the same size each")
    values = [end for end in parts if _doubles(trial, end, consumer)]
    if len(values) != 1:
        raise _NotFree("what its heads put out is not proportional to their values")
    query, key = (end for end in parts if end is not values[0])
    heads = Heads(query, key, values[0])
    inner = tuple(
        dataclasses.replace(end, index=np.concatenate([part.index for part in parts if part.path == end.path], 1))
        for end in group.producers
    )
    outer = dataclasses.replace(consumer, index=np.ascontiguousarray(consumer.index.T))
    within = dataclasses.replace(group, units=places, ends=(*inner, outer), counts=(), queries=(query,))
    noise = torch.randn(2, group.units, places, places, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    some, other = torch.eye(places, dtype=torch.float64, device="cpu") + 0.3 * noise / places**0.5
    if trial.changed(lambda twin: turn_heads(twin, within, heads, some, other)):
        raise _NotFree("other axes within its heads change the outputs")
    return within, heads


def _takes_mean_off(trial: Trial, path: str) -> bool:
    norm: Any = trial.twin.get_submodule(path)
    weight = next(iter((*norm.parameters(), *norm.buffers())), torch.ones(()))
    x = torch.linspace(-1, 2, channels_kept(norm, "out").size).square().to(weight)
    with torch.no_grad():
        return bool(torch.allclose(norm(x), norm(x + 1), atol=0.01))


def _read_from(trial: Trial, norms: Sequence[str], readers: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The norm whose output each layer reads, as it is or a part of it, by the layer's path; missing: another tensor. And the norm that ran last
    before it."""
    made: dict[int, tuple[Tensor, str]] = {}  # held, so that no other tensor gets its place in memory
    found: dict[str, str] = {}
    behind: dict[str, str] = {}

    def put(path: str, _m: nn.Module, _a: Any, out: Tensor) -> None:
        made[out.untyped_storage().data_ptr()] = out, path

    def take(path: str, _m: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        if (place := x.untyped_storage().data_ptr()) in made:
            found[path] = made[place][1]
        if made:
            behind[path] = found.get(path, next(reversed(made.values()))[1])

    layer = trial.twin.get_submodule
    handles = [layer(path).register_forward_hook(partial(put, path)) for path in norms]
    handles += [layer(path).register_forward_pre_hook(partial(take, path), with_kwargs=True) for path in readers]
    try:
        with evaluating(trial.twin), torch.no_grad():
            call(trial.twin, trial.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found, behind


def _doubles(trial: Trial, end: End, consumer: End) -> bool:
    """Does what the consumer reads double with what this part of a layer puts out?"""
    twin = copy.deepcopy(trial.twin)
    here = channels_kept(twin.get_submodule(end.path), end.side)
    where, twice = torch.from_numpy(np.searchsorted(here, end.index)), 2 * torch.eye(len(end.index), dtype=torch.float64, device="cpu")
    with torch.no_grad():
        Basis().mix_rows(twin.get_submodule(end.path), where, twice)
    once, again = (_taken(model, consumer.path, trial.inputs) for model in (trial.twin, twin))
    return gap(2 * once, again) <= 1e-3 * largest(again)


def _taken(model: nn.Module, path: str, inputs: Sequence[Any]) -> Tensor:
    """What a layer takes in."""
    seen: list[Tensor] = []
    watch = Watch({path: model.get_submodule(path)}, lambda _n, _m, x: seen.append(x), training=False)
    try:
        with evaluating(model), torch.no_grad():
            call(model, inputs)
    finally:
        watch.close()
    return seen[0]
