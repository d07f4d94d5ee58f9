"""Everything about a run that changes, as plain data: what a resumed run needs besides model and optimizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .allocate import Floats
from .cuts import CutResult
from .moments import Moments
from .report import Snapshot
from .schedule import Controller
from .timing import RankTimes

VERSION = 10
MAX_SNAPSHOTS = 200


@dataclass(slots=True)
class RunState:
    """Attributes:
    steps: taken by each optimizer; skipped ones do not count.
    every: steps between proximal steps.
    owed: learning rates summed up since the last proximal step, by site.
    values: singular values after the last proximal step, by site.
    importances: shares of the units that were there at the last proximal step, by group.
    moments: of what the consumers took in during the step before it, by path.
    ranks: by site, current.
    solvers: used last, by site.
    failures: one line for each solver that failed.
    controller: steers the strength; None where strengths are given.
    settled: the structure is final.
    forgone: optional groups of neurons that are left alone; None until that is decided.
    cuts: what was cut so far.
    shapes: of each layer's input in training, by site; None until seen.
    gradient_scales: of pairs, by site, see `pace`.
    step_times: measured times of forward and backward, by site.
    spectra_start: singular values when training began, for the report.
    history: thinned: at most MAX_SNAPSHOTS, evenly spread.
    stride: proximal steps between snapshots.
    """

    steps: list[int]
    every: int
    owed: dict[str, float]
    controller: Controller | None
    spectra_start: dict[str, Floats]
    values: dict[str, Floats] = field(default_factory=dict)
    importances: dict[str, Floats] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    solvers: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    settled: bool = False
    forgone: list[str] | None = None
    shapes: dict[str, tuple[int, ...]] | None = None
    gradient_scales: dict[str, float] = field(default_factory=dict)
    step_times: dict[str, RankTimes] = field(default_factory=dict)
    cuts: CutResult = field(default_factory=CutResult)
    history: list[Snapshot] = field(default_factory=list)
    stride: int = 1

    def remember(self, strength: float, gap: float) -> None:
        """Add to the history."""
        if self.history and (self.steps[0] - self.history[-1].step) < self.stride * self.every:
            return
        self.history.append(Snapshot(self.steps[0], strength, dict(self.ranks), gap))
        if len(self.history) > MAX_SNAPSHOTS:
            del self.history[1::2]
            self.stride *= 2

    def to_state(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings, in dicts and lists: passes `torch.load(weights_only=True)`."""
        state: dict[str, Any] = _plain(dataclasses.asdict(self))
        return state

    @staticmethod
    def from_state(state: dict[str, Any]) -> RunState:
        state = {k: _arrays(v) for k, v in state.items()}
        state["controller"] = Controller(**state["controller"]) if state["controller"] is not None else None
        if state["shapes"] is not None:
            state["shapes"] = {name: tuple(shape) for name, shape in state["shapes"].items()}
        state["step_times"] = {name: RankTimes.from_json(t) for name, t in state["step_times"].items()}
        state["moments"] = {
            path: Moments(torch.from_numpy(m["mean"]), torch.from_numpy(m["variance"])) for path, m in state["moments"].items()
        }
        cuts = CutResult(**state["cuts"])
        cuts.timings = {name: (ms[0], ms[1]) for name, ms in cuts.timings.items()}
        state["cuts"] = cuts
        state["history"] = [Snapshot(**h) for h in state["history"]]
        return RunState(**state)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _arrays(value: Any) -> Any:
    """The way back; everything is copied, so that a state can be loaded twice."""
    if isinstance(value, torch.Tensor):
        return value.numpy().copy()
    if isinstance(value, dict):
        return {k: _arrays(v) for k, v in value.items()}
    return [_arrays(v) for v in value] if isinstance(value, list) else value
