"""The pictures of a report: data in, inline SVG out; None where the data is not there.

Needs matplotlib (the extra `plot`), which is imported when the first picture is drawn. No pyplot, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .cells import Row, first
from .data import CompactReport, LayerReport
from .human import count, duration, elide, share
from .labels import LETTER, place_beside, spread_out
from .svg import COLOUR, DASHES, LINES, axes_at, new_figure, style, to_svg

WIDTH = 9.6  # inches; of every picture, so that all have one type size on the page
PANELS = 4  # small multiples in one row
FLOOR = 1e-4  # singular values below this share of the largest are not drawn
INK, MUTED, GRID, BEFORE, AFTER, MARK = (COLOUR[n] for n in ("ink", "muted", "grid", "before", "after", "mark"))


def spectra_picture(report: CompactReport) -> str | None:
    """Singular values of every cut layer before training and just before the cut, with the rank that was kept."""
    layers = [x for x in report.layers if x.rank is not None and x.spectrum]
    if not layers:
        return None
    starts = [start_of(report, x) for x in layers]
    largest = max(v for s in (*starts, *(x.spectrum for x in layers)) for v in s)
    shown = [v for s in (*starts, *(x.spectrum for x in layers)) for v in s if v > FLOOR * largest]
    if not shown:
        return None
    low, high = min(shown) / 1.4, max(shown) * 1.6
    rows = math.ceil(len(layers) / PANELS)
    width, height, left, top, gap_x, gap_y = 1.92, 1.15, 0.62, 0.78, 0.3, 0.72
    titles = [two_lines(x.name, 28) for x in layers]
    if any(len(t) > 1 for t in titles):
        top, gap_y = top + 0.15, gap_y + 0.15
    with style():
        figure = new_figure(WIDTH, top + rows * (height + gap_y) - gap_y + 0.25)
        for i, (layer, start) in enumerate(zip(layers, starts, strict=True)):
            row, column = divmod(i, PANELS)
            ax = axes_at(figure, left + column * (width + gap_x), top + row * (height + gap_y), width, height)
            before = draw_spectrum(ax, start, low, BEFORE, 1.6)
            after = draw_spectrum(ax, layer.spectrum, low, AFTER, 1.8)
            assert layer.rank is not None
            mark = ax.axvline(layer.rank, color=MARK, linewidth=1.1)
            ax.set_yscale("log")
            ax.set_ylim(low, high)
            count_x = max(len(start), len(layer.spectrum))
            margin = max(0.03 * (count_x - 1), 0.5)
            ax.set_xlim(1 - margin, count_x + margin)
            ax.set_xticks([1, count_x] if count_x > 1 else [1])
            if layer.rank not in ax.get_xticks():
                far = min(layer.rank - 1, count_x - layer.rank) > 0.14 * count_x
                ax.set_xticks([1, layer.rank, count_x] if far else [layer.rank, count_x] if layer.rank < count_x / 2 else [1, layer.rank])
            ticks_at_decades(ax, low, high, labels=column == 0)
            ax.grid(axis="y")
            ax.tick_params(length=0)
            ax.set_title("\n".join(titles[i]), loc="left", color=INK, pad=17)
            ax.text(0, 1.045, f"rank {layer.rank} of {layer.full_rank}", transform=ax.transAxes, color=MARK)
        handles, names = [after, mark], ["just before the cut", "rank kept"]
        if any(starts):
            handles, names = [before, *handles], ["before training", *names]
        figure.legend(handles, names, loc="upper left", bbox_to_anchor=(0.5 / WIDTH, 1), ncols=3, handlelength=1.6, columnspacing=2)
        return to_svg(figure, "spectra", "Singular values of every cut layer before training and just before the cut")


def two_lines(name: str, width: int) -> list[str]:
    """A layer's name in one line or, broken after a dot, in two."""
    if len(name) <= width:
        return [name]
    end = name.find(".", len(name) - width - 1) + 1
    return [elide(name[:end], width), name[end:]] if end else [elide(name, width)]


def start_of(report: CompactReport, layer: LayerReport) -> tuple[float, ...]:
    """The layer's spectrum when training began; empty where not recorded. Spectra are stored by weight name."""
    starts = report.spectra_start or {}
    return starts.get(weight_name(layer, starts), ())


def weight_name(layer: LayerReport, names: Any) -> str:
    """The weight's name among `names`, for a layer name."""
    if f"{layer.name}.weight" in names or layer.name in names:
        return f"{layer.name}.weight" if f"{layer.name}.weight" in names else layer.name
    return next((n for n in names if n.rpartition(".")[0] == layer.name), "")


def draw_spectrum(ax: Any, values: Sequence[float], low: float, colour: str, width: float) -> Any:
    """One falling line; what lies below `low` is left out, and a lone value becomes a dot."""
    seen = [v for v in values if v > low]
    marker = "o" if len(seen) == 1 else None
    return ax.plot(range(1, len(seen) + 1), seen, color=colour, linewidth=width, marker=marker, markersize=4, solid_capstyle="round")[0]


def ticks_at_decades(ax: Any, low: float, high: float, labels: bool) -> None:
    """Powers of ten; where fewer than two are in sight, also 2 and 5 times."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [10.0**e for e in exponents if low <= 10.0**e <= high]
    if len(ticks) < 2:
        ticks = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks] if labels else [""] * len(ticks))
    ax.minorticks_off()


def ranks_picture(report: CompactReport) -> str | None:
    """Rank over training as a share of the full rank, one line per layer, up to the cut; the strength below."""
    history = report.history
    full = {layer: layer.full_rank for layer in report.layers if layer.full_rank}
    names = {layer: weight_name(layer, history[-1].ranks) for layer in full} if history else {}
    layers = [layer for layer, name in names.items() if name]
    if len(history) < 2 or not layers:
        return None
    steps = [h.step for h in history]
    strength = [math.nan if h.strength is None else h.strength for h in history]
    has_strength = any(math.isfinite(s) for s in strength)
    left, top, line = 0.62, 0.3, 0.165
    kept = {x: f"{x.rank} of {x.full_rank}" if x.rank is not None else "dense" for x in layers}
    width = WIDTH - left - 0.45 - LETTER * min(46, max(len(x.name) + len(kept[x]) for x in layers) + 2)
    height = max(2.5, line * (len(layers) + 0.5))
    with style():
        figure = new_figure(WIDTH, top + height + (1.0 if has_strength else 0) + 0.48)
        ax = axes_at(figure, left, top, width, height)
        ends = []
        cut = [layer for layer in layers if layer.rank is not None]
        for layer in sorted(layers, key=lambda x: x.rank is not None):
            shares = [100 * h.ranks.get(names[layer], math.nan) / (layer.full_rank or 1) for h in history]
            if layer.rank is None:
                colour, dash = MUTED, DASHES[2]
            else:
                i = cut.index(layer)
                colour, dash = COLOUR[f"line{i % LINES}"], DASHES[i // LINES % len(DASHES)]
            ax.plot(steps, shares, color=colour, linestyle=dash, linewidth=1.6 if layer.rank is not None else 1.0)
            ends.append((shares[-1], colour, dash, elide(layer.name, 44 - len(kept[layer])), kept[layer]))
        ax.set_ylim(0, 102)
        ax.set_yticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        ax.set_ylabel("rank, share of full rank")
        span = max(steps[-1] - steps[0], 1)
        places = spread_out([e[0] for e in ends], 102 * line / height, 0, 102)
        for (value, colour, dash, name, what), y in zip(ends, places, strict=True):
            x = [steps[-1] + f * span for f in (0.008, 0.03, 0.04)]
            ax.plot(x, [value, y, y], color=colour, linestyle=dash, linewidth=0.9, clip_on=False)
            ax.text(steps[-1] + 0.047 * span, y, f"{name}, {what}", va="center", color=INK if what != "dense" else MUTED, clip_on=False)
        ax.text(steps[-1], 105, f"cut, step {steps[-1]:,}", ha="right", va="bottom", color=MARK)
        panels = [ax]
        if has_strength:
            below = axes_at(figure, left, top + height + 0.3, width, 0.7)
            below.plot(steps, strength, color=INK, linewidth=1.4)
            finite = [s for s in strength if math.isfinite(s)]
            if min(finite) > 0 and max(finite) > 20 * min(finite):
                below.set_yscale("log")
                ticks_at_decades(below, min(finite) / 1.5, max(finite) * 1.5, labels=True)
                below.set_ylim(min(finite) / 1.5, max(finite) * 1.5)
            else:
                below.set_ylim(0, 1.15 * max(finite) or 1)
                below.locator_params(axis="y", nbins=3)
            below.set_ylabel("strength")
            ax.tick_params(labelbottom=False)
            panels.append(below)
        for panel in panels:
            panel.set_xlim(steps[0], steps[-1])
            panel.axvline(steps[-1], color=MARK, linewidth=1.1, clip_on=False)
            panel.grid(axis="y")
            panel.tick_params(length=0)
            panel.yaxis.set_label_coords(-0.47 / width, 0.5)
        whole_steps(panels[-1])
        panels[-1].set_xlabel("optimizer step")
        return to_svg(figure, "ranks", "Ranks of the layers over training, and the strength of the pressure")


def whole_steps(ax: Any) -> None:
    """At most six ticks, at whole steps, with commas."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def comparison_picture(rows: Sequence[Row] | None) -> str | None:
    """Accuracy against parameters, one point per method, with its spread and training time where known.

    Keys of a row: see `comparison_cells`. None for fewer than two methods with both numbers.
    """
    points = [r for r in rows or () if r.get("accuracy") is not None and r.get("params")]
    if len(points) < 2:
        return None
    left, top, width, height = 0.62, 0.12, WIDTH - 0.8, 2.7
    with style():
        figure = new_figure(WIDTH, top + height + 0.5)
        ax = axes_at(figure, left, top, width, height)
        x = [float(r["params"]) for r in points]
        y = [100 * float(r["accuracy"]) for r in points]
        error = [100 * float(first(r, "accuracy_spread", "spread") or 0) for r in points]
        low, high = min(a - e for a, e in zip(y, error, strict=True)), max(a + e for a, e in zip(y, error, strict=True))
        margin = max(0.18 * (high - low), 0.1)
        ax.set_ylim(low - margin, high + margin)
        if max(x) > 4 * min(x):
            ax.set_xscale("log")
            ax.set_xlim(min(x) / 1.35, max(x) * 1.8)
        else:
            room = max(max(x) - min(x), 0.2 * max(x))
            ax.set_xlim(max(0, min(x) - 0.15 * room), max(x) + 0.35 * room)
        for i, (r, a, b, e) in enumerate(zip(points, x, y, error, strict=True)):
            colour, marker = (COLOUR[f"line{i % LINES}"], "osD^vP"[i % 6])
            if e:
                ax.errorbar(a, b, e, color=colour, capsize=3, linewidth=1.2)
            ax.plot(a, b, marker, color=colour, markersize=10 if is_ours(r) else 8)
        dots = [tuple(ax.transData.transform((a, b)) / figure.dpi) for a, b in zip(x, y, strict=True)]
        texts = [label_of(r) for r in points]
        bars = [0.09 + e * height / (high - low + 2 * margin) for e in error]
        for i, place in enumerate(place_beside(dots, bars, texts)):
            offset = (72 * (place.at[0] - dots[i][0]), 72 * (place.at[1] - dots[i][1]))
            joint = {
                "arrowstyle": "-",
                "color": COLOUR[f"line{i % LINES}"],
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 5,
                "relpos": (place.align == "right", 0.5),
            }
            ax.annotate(
                texts[i], (x[i], y[i]), offset, textcoords="offset points", ha=place.align, va="center", annotation_clip=False,
                weight="bold" if is_ours(points[i]) else "normal", arrowprops=joint if place.far else None,
            )  # fmt: skip
        size_ticks(ax)
        ax.set_xlabel("parameters")
        ax.set_ylabel("accuracy (%)")
        ax.yaxis.set_label_coords(-0.47 / width, 0.5)
        ax.grid()
        ax.tick_params(length=0)
        return to_svg(figure, "comparison", "Accuracy against the number of parameters for every method compared")


def is_ours(row: Row) -> bool:
    return str(row.get("method", "")).startswith("laconic")


def label_of(row: Row) -> str:
    seconds = first(row, "train_seconds", "seconds")
    return elide(str(row.get("method", "")), 32) + (f", {duration(seconds)}" if seconds is not None else "")


def size_ticks(ax: Any) -> None:
    """Ticks at 1, 2 and 5 times powers of ten on a log axis, evenly spread on a linear one; written for people."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    low, high = ax.get_xlim()
    if ax.get_xscale() == "log":
        ticks = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
        ax.xaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
        ax.minorticks_off()
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: count(v) if v < 1e6 else f"{v / 1e6:g} M"))


def params_picture(report: CompactReport) -> str | None:
    """Parameters of every weight before and after, as bars, in the model's order."""
    layers = report.layers
    if not layers:
        return None
    numbers, top, line = 2.5, 0.42, 0.235
    left = 0.2 + LETTER * min(32, max(len(x.name) for x in layers))
    width = WIDTH - left - numbers
    height = line * len(layers)
    most = max(x.params_before for x in layers) or 1
    with style():
        figure = new_figure(WIDTH, top + height + 0.1)
        ax = axes_at(figure, left, top, width, height)
        rows = range(len(layers))
        before = ax.barh(rows, [x.params_before for x in layers], 0.66, color=BEFORE)
        after = ax.barh(rows, [x.params_after for x in layers], 0.66, color=[AFTER if x.rank is not None else MUTED for x in layers])
        ax.set_xlim(0, most)
        ax.set_ylim(len(layers) - 0.5, -0.5)
        ax.set_yticks(rows, [elide(x.name, 32) for x in layers])
        ax.tick_params(axis="y", labelcolor=INK)
        ax.set_xticks([])
        ax.tick_params(length=0)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        for i, x in enumerate(layers):
            # Three columns, each aligned to the right.
            cells = (count(x.params_before), count(x.params_after), share(x.params_after, x.params_before))
            texts = cells if x.params_after != x.params_before else (cells[0], "dense" if x.rank is None else "same", "")
            for text, at, colour in zip(texts, (0.85, 1.65, 2.35), (MUTED, INK if x.rank is not None else MUTED, MUTED), strict=True):
                ax.text(most * (1 + at / width), i, text, ha="right", va="center", color=colour, clip_on=False)
        for text, at in (("before", 0.85), ("after", 1.65)):
            ax.text(most * (1 + at / width), -0.85, text, ha="right", va="center", color=MUTED, clip_on=False)
        handles: list[Any] = [before]
        names = ["removed"]
        for wanted, name in ((True, "left after the cut"), (False, "stays dense")):
            found = [bar for bar, x in zip(after, layers, strict=True) if (x.rank is not None) is wanted]
            handles += found[:1]
            names += [name] * len(found[:1])
        figure.legend(
            handles, names, loc="upper left", bbox_to_anchor=((left - 0.12) / WIDTH, 1), ncols=3, handlelength=1.2, columnspacing=2
        )
        return to_svg(figure, "params", "Parameters of every layer before and after the cut")
