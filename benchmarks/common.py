"""What the benchmarks share: interleaved timing, and where results go."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from laconic.results import provenance, write_json

RESULTS = Path(__file__).parent / "results"


def clock() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int = 15, seconds: float = 0.05) -> dict[str, float]:
    """Median seconds per call. The functions take turns, so that a slow spell of the machine hits them all."""
    counts: dict[str, int] = {}
    for name, function in functions.items():
        function()
        start = clock()
        function()
        counts[name] = max(1, int(seconds / max(clock() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            for _ in range(counts[name]):
                function()
            times[name].append((clock() - start) / counts[name])
    return {name: statistics.median(values) for name, values in times.items()}


def write(name: str, rows: list[dict[str, Any]], device: str = "cpu") -> None:
    """`results/NAME.json`, of another device `results/NAME-DEVICE.json`."""
    write_json(RESULTS / f"{name if device == 'cpu' else f'{name}-{device}'}.json", {"rows": rows, **provenance()})
