"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from .cells import COMPARISON_COLUMNS, Row, arrow, comparison_cells, layer_cells
from .data import CompactReport
from .human import MISSING, count

NARROW = (0, 1, 0, 0)  # two spaces between columns: the usual tables fit into 80 columns
WRAPPED = {title: max(map(len, title.split())) for title in COMPARISON_COLUMNS if "Latency" in title}  # one word a line


def comparison_table(rows: Sequence[Row]) -> Table:
    """One line per method; `-` where a number is missing. Keys of a row: see `comparison_cells`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=NARROW)
    for title in COMPARISON_COLUMNS:
        left = title == "Method"
        table.add_column(
            Text(title), justify="left" if left else "right", min_width=max(map(len, title.split())), max_width=WRAPPED.get(title)
        )
    for cells in comparison_cells(rows, spreads=False):
        table.add_row(*(Text(c) for c in cells))
    return table


def layer_table(report: CompactReport) -> Table:
    """One line per layer, the whole model below, and under the table why layers stayed dense.

    A column that would hold nothing but `-` is left out.
    """
    layers = layer_cells(report)
    columns: list[tuple[str, list[str], str]] = [
        ("Layer", [x.name for x in layers], "whole model"),
        ("Kind", [x.kind for x in layers], ""),
        ("Shape", [x.shape for x in layers], ""),
        ("Rank", [x.rank for x in layers], ""),
        ("Parameters", [arrow(x.params) for x in layers], arrow((count(report.params_before), count(report.params_after)))),
        ("MACs", [arrow(x.macs) for x in layers], arrow((count(report.macs_before), count(report.macs_after)))),
        ("Energy", [x.energy for x in layers], ""),
        ("ms", [arrow(x.times) if x.times else MISSING for x in layers], ""),
    ]
    columns = [c for c in columns if set(c[1]) != {MISSING}]
    reasons: dict[str, list[str]] = {}
    for x in layers:
        if x.note:
            reasons.setdefault(x.note, []).append(x.name)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=NARROW,
        show_footer=True,
        caption=Text("\n".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())) if reasons else None,
        caption_justify="left",
    )
    for title, _, footer in columns:
        left = title in ("Layer", "Kind")
        table.add_column(Text(title), Text(footer), justify="left" if left else "right", overflow="fold")
    for cells in zip(*(c[1] for c in columns), strict=True):
        table.add_row(*(Text(c) for c in cells))
    return table
