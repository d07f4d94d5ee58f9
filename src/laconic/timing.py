"""Measured times of single layers, dense and as a pair at a few ranks: what a cut buys on this machine.

A table is measured once for a layer's shape, its input's shape, this device, this number of threads and this version of
PyTorch, and kept in a small file, so that the next run decides the same. What a run uses travels in its state.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .matricize import Layer, Unfolding, an_input
from .surgery.factorize import memory_format, new_pair
from .watch import Watch

FORMAT = 3
ROUNDS = 2
SECONDS = 0.01  # of one timed block


@dataclass(frozen=True, slots=True)
class RankTimes:
    """Milliseconds of one layer: dense, and cut to each of `ranks` (increasing; times never falling)."""

    dense: float
    ranks: tuple[int, ...]
    cut: tuple[float, ...]

    def at(self, rank: int) -> float:
        """Time of the pair at this rank, interpolated; below the grid that of its first point, above by its last slope."""
        if rank > self.ranks[-1] and len(self.ranks) > 1:
            slope = (self.cut[-1] - self.cut[-2]) / (self.ranks[-1] - self.ranks[-2])
            return self.cut[-1] + slope * (rank - self.ranks[-1])
        return float(np.interp(rank, self.ranks, self.cut))

    def scaled(self, dense: float, cut: float) -> RankTimes:
        """Times of a layer with fewer channels, estimated: those of this one times a factor."""
        return RankTimes(self.dense * dense, self.ranks, tuple(t * cut for t in self.cut))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> RankTimes:
        return RankTimes(float(data["dense"]), tuple(int(r) for r in data["ranks"]), tuple(float(t) for t in data["cut"]))


def added(tables: Sequence[RankTimes]) -> RankTimes:
    """The times of several layers that share one weight."""
    return RankTimes(
        sum(t.dense for t in tables), tables[0].ranks, tuple(float(sum(c)) for c in zip(*(t.cut for t in tables), strict=True))
    )


def grid(break_even: int) -> tuple[int, ...]:
    """A coarse grid of ranks up to break-even, denser where cuts end."""
    return tuple(sorted({max(1, round(break_even * share)) for share in (0.05, 0.125, 0.25, 0.5, 0.75, 1.0)}))


def layer_times(module: Layer, unfolding: Unfolding, shape: Sequence[int], break_even: int, training: bool) -> RankTimes:
    """Times of one layer on inputs of this shape: of a forward pass, or (`training`) of forward and backward together.

    Read from the table on disk, or measured and written there.
    """
    what = _all_that_matters(module, unfolding, shape, break_even, training)
    return RankTimes.from_json(
        remembered(what, module.weight.device, lambda: _measure(module, unfolding, shape, break_even, training).to_json())
    )


def remembered(what: Sequence[Any], device: torch.device, measure: Callable[[], Any]) -> Any:
    """The entry of the table on disk for this, or measured and written there; machine, threads and versions are part of its name."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.processor() or platform.machine()}"
    key = hashlib.sha256(repr([FORMAT, torch.__version__, machine, torch.get_num_threads(), *what]).encode()).hexdigest()[:24]
    path = table_path()
    known = _read(path)
    if key not in known:
        measured = measure()
        known = {**_read(path), key: measured}
        _write(path, known)
    return known[key]


def table_path() -> Path:
    """`$LACONIC_CACHE`, or the user's cache folder."""
    folder = os.environ.get("LACONIC_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laconic"
    return Path(folder) / "layer-times.json"


def _all_that_matters(module: Layer, unfolding: Unfolding, shape: Sequence[int], break_even: int, training: bool) -> list[Any]:
    """Everything that a layer's time depends on."""
    weight = module.weight
    return [
        str(weight.dtype), type(module).__name__, unfolding.name, tuple(shape), tuple(weight.shape), weight.stride(), break_even, training,
        getattr(module, "bias", None) is not None,
        *(str(getattr(module, name, None)) for name in ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")),
    ]  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all; a folder that cannot be written to only means that the next run measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(content, file)
        Path(file.name).replace(path)
    except OSError:
        return


def _measure(module: Layer, unfolding: Unfolding, shape: Sequence[int], break_even: int, training: bool) -> RankTimes:
    weight = module.weight
    x = an_input(module, shape, 0.5)
    if x.ndim == weight.ndim == 4:
        x = x.contiguous(memory_format=memory_format(weight))
    ranks = grid(break_even)
    room = max(_room(layer) for layer in _versions(module, unfolding, ranks))
    memory = torch.full((room,), 0.01, dtype=weight.dtype, device=weight.device)
    layers = [_alone(layer, memory) for layer in _versions(module, unfolding, ranks)]
    calls = [_training_call(layer, x) if training else _forward_call(layer, x) for layer in layers]
    timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in calls]
    with torch.autocast(x.device.type, enabled=False):
        # In turns, so that a slow spell of the machine hits all; the fastest round is the least disturbed one.
        rounds = [[timer.blocked_autorange(min_run_time=SECONDS).median * 1e3 for timer in timers] for _ in range(ROUNDS)]
    best = np.min(rounds, axis=0)
    return RankTimes(float(best[0]), ranks, tuple(float(t) for t in np.maximum.accumulate(best[1:])))


def _versions(module: Layer, unfolding: Unfolding, ranks: Sequence[int]) -> Iterator[nn.Module]:
    """The layer, then the pair of each rank; one at a time."""
    yield module
    for rank in ranks:
        yield new_pair(module, unfolding, rank)


def _room(layer: nn.Module) -> int:
    return sum(_aligned(p.numel()) for p in layer.parameters())


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _alone(layer: nn.Module, memory: Tensor) -> nn.Module:
    """A copy with parameters of its own, so that timing leaves no trace in the model and draws no random numbers.

    They lie one behind the other in `memory`, where other layers may lie too: one is timed at a time.
    """
    alone: Layer = copy.copy(layer)
    alone._parameters = {}
    for name, p in layer._parameters.items():
        if p is None:
            alone._parameters[name] = None
            continue
        if p.dtype != memory.dtype:
            alone._parameters[name] = nn.Parameter(torch.full_like(p, 0.01))
            continue
        strides = torch.empty_like(p, device="meta", memory_format=torch.preserve_format).stride()
        alone._parameters[name] = nn.Parameter(memory.as_strided(p.shape, strides, memory.storage_offset()))
        memory = memory[_aligned(p.numel()) :]
    alone._modules = {}
    for name, m in layer._modules.items():
        alone._modules[name] = None if m is None else _alone(m, memory)
        memory = memory[0 if m is None else _room(m) :]
    return alone


def _forward_call(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def _training_call(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    x = x.detach().requires_grad_(x.is_floating_point())
    with torch.enable_grad():
        gradient = torch.ones_like(layer(x))

    leaves = [x, *layer.parameters()]

    def call() -> None:
        with torch.enable_grad():
            layer(x).backward(gradient)
        for leaf in leaves:  # as `zero_grad` leaves them: nothing to add to
            leaf.grad = None

    return call


class ShapeWatch:
    """Records the shape of each module's first input during one training step."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._watch = Watch(modules, lambda name, _, x: self.shapes.setdefault(name, tuple(x.shape)), uncompiled=True)

    def finish(self) -> dict[str, tuple[int, ...]]:
        self._watch.close()
        return self.shapes
