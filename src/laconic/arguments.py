"""What a compressor is given: checked before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .budget import Budget
from .checks import check_choice, check_function, whole_number
from .distributed import world_size
from .errors import InvalidTypeError, InvalidValueError
from .schedule import Schedule
from .structures import Channels, Entries, Structure


def check_arguments(
    structures: Sequence[Structure], budget: Any, total_steps: Any, every: Any, cut: Any, schedule: Any
) -> tuple[int | None, int | None]:
    """Returns `total_steps` and `every` as Python's own numbers."""
    if budget is None and any(s.strength is None for s in structures):
        raise InvalidValueError(
            "Compressor needs a budget=laconic.Budget(params=0.25) (with total_steps=), or structures=[laconic.LowRank(strength=...)]"
        )
    if budget is not None and not isinstance(budget, Budget):
        raise InvalidTypeError(f"budget = {budget!r}: expected laconic.Budget(params=0.25)")
    if budget is not None and any(isinstance(s, Entries) for s in structures):
        raise InvalidValueError("Entries and a budget: zeros among the entries save nothing that a budget counts; leave one of them out")
    if budget is not None and total_steps is None:
        raise InvalidValueError("a budget needs total_steps= (epochs x steps per epoch), to know when to press and when to cut")
    total_steps = whole_number("total_steps", total_steps, 1) if total_steps is not None else None
    every = whole_number("every", every, 1) if every is not None else None
    if schedule is not None and not isinstance(schedule, Schedule):
        raise InvalidTypeError(f"schedule = {schedule!r}: expected laconic.Schedule(warmup=0.1, settle=0.35)")
    if budget is None and schedule is not None:
        raise InvalidValueError("schedule= has no effect without a budget: a strength presses from the first step to the last")
    check_choice("cut", cut, ("early", "end"))
    return total_steps, every


def check_processes(structures: Sequence[Structure], sharded: bool, cut_early: bool, budget: Budget | None, rebuild: Any) -> None:
    if sharded and cut_early:
        raise InvalidValueError(
            'a sharded model (FSDP2) cannot be cut in mid-run: cut="end", and compact(into=MyNet()) when training is over'
        )
    if sharded and any(isinstance(s, Channels) for s in structures):
        raise InvalidValueError("a sharded model (FSDP2) cannot lose neurons: structures=[laconic.LowRank()]")
    if sharded and budget is not None and "latency" in budget.currencies:
        raise InvalidValueError("a sharded model (FSDP2) cannot be timed as it will be served: give the budget in params or macs")
    if world_size() > 1 and cut_early and rebuild is None:
        raise InvalidValueError(
            f'{world_size()} processes: a cut in mid-run makes new parameters, so pass rebuild= (it wraps the model in a new DistributedDataParallel), or cut="end"'
        )
    if rebuild is not None:
        check_function("rebuild", rebuild, "the bare model")
