"""What the benchmarks share: interleaved timing, and where results go."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laconic.results import provenance, write_json

RESULTS = Path(__file__).parent / "results"


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int = 15, seconds: float = 0.05) -> dict[str, float]:
    """Median seconds per call. The functions take turns, so that a slow spell of the machine hits them all."""
    counts: dict[str, int] = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        counts[name] = max(1, int(seconds / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                function()
            times[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(values) for name, values in times.items()}


def write(name: str, rows: list[dict[str, Any]]) -> None:
    write_json(RESULTS / f"{name}.json", {"rows": rows, **provenance()})
