"""The text of every table cell, once, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .data import CompactReport, LayerReport
from .human import MISSING, count, decimals, duration, fixed, size

COMPARISON_COLUMNS = (
    "Method",
    "Accuracy",
    "Parameters",
    "MACs",
    "File size",
    "Latency, batch 1 (ms)",
    "Latency, batch 64 (ms)",
    "Training",
)
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LayerCells:
    """One layer; a pair is (before, after). `times` is None in all rows where no layer was timed."""

    name: str
    kind: str
    shape: str
    rank: str
    params: tuple[str, str]
    macs: tuple[str, str]
    energy: str
    times: tuple[str, str] | None
    note: str


def layer_cells(report: CompactReport) -> list[LayerCells]:
    """Cells of the layer table, in the model's order."""
    times = [t for layer in report.layers for t in (layer.ms_before, layer.ms_after)]
    timed = any(t is not None for t in times)
    places = decimals(times)
    return [
        LayerCells(
            name=layer.name,
            kind=layer.kind or MISSING,
            shape=arrow(("×".join(map(str, layer.shape)), "×".join(map(str, layer.slim or layer.shape)))),
            rank=rank_text(layer),
            params=(count(layer.params_before), count(layer.params_after)),
            macs=(count(layer.macs_before), count(layer.macs_after)),
            energy=f"{layer.energy:.4f}" if layer.rank is not None else MISSING,
            times=(fixed(layer.ms_before, places), fixed(layer.ms_after, places)) if timed else None,
            note=layer.note,
        )
        for layer in report.layers
    ]


def rank_text(layer: LayerReport) -> str:
    """`41 / 64`, or `dense`, or `slim` where only neurons went."""
    if layer.rank is None:
        return layer.outcome
    return f"{layer.rank} / {layer.full_rank}" + (f", inputs {layer.inputs}" if layer.inputs is not None else "")


def arrow(pair: tuple[str, str]) -> str:
    """`before → after`, or the one text that both are."""
    return pair[0] if pair[0] == pair[1] else f"{pair[0]} → {pair[1]}"


def comparison_cells(rows: Sequence[Row], spreads: bool = True) -> list[tuple[str, ...]]:
    """Cells of the comparison under `COMPARISON_COLUMNS`; `spreads=False` leaves out how far a time scatters.

    Keys of a row: `method`; all others may be missing or None: `accuracy` (0 to 1), `accuracy_spread` (or `spread`),
    `params`, `macs`, `file_bytes`, `latency_b1_ms`, `latency_b1_spread_ms`, the same for `b64`, `train_seconds` (or
    `seconds`).
    """
    places = {key: decimals(row.get(key) for row in rows) for key in ("latency_b1_ms", "latency_b64_ms")}
    return [
        (
            str(row.get("method", MISSING)),
            spread(row.get("accuracy"), first(row, "accuracy_spread", "spread"), 4),
            count(row.get("params")),
            count(row.get("macs")),
            size(row.get("file_bytes")),
            spread(row.get("latency_b1_ms"), row.get("latency_b1_spread_ms") if spreads else None, places["latency_b1_ms"]),
            spread(row.get("latency_b64_ms"), row.get("latency_b64_spread_ms") if spreads else None, places["latency_b64_ms"]),
            duration(first(row, "train_seconds", "seconds")),
        )
        for row in rows
    ]


def spread(value: float | None, around: float | None, places: int) -> str:
    """`0.181 ± 0.004`."""
    return fixed(value, places) + (f" ± {around:.{places}f}" if value is not None and around is not None else "")


def first(row: Row, *keys: str) -> Any:
    """The first of these entries that is there."""
    return next((row[k] for k in keys if row.get(k) is not None), None)
