"""One self-contained page: no network, no scripts, light and dark, fit for paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .cells import COMPARISON_COLUMNS, LayerCells, Row, comparison_cells, first, layer_cells
from .css import CSS
from .data import CompactReport
from .human import MISSING, count, decimals, fixed, scientific, share, size
from .pictures import comparison_picture, is_ours, params_picture, ranks_picture, spectra_picture


def render(
    report: CompactReport,
    *,
    title: str,
    profiles: Mapping[str, Mapping[str, Any]] | None = None,
    comparison: Sequence[Row] | None = None,
    context: Mapping[str, Any] | None = None,
) -> str:
    """The report as one HTML page.

    Args:
        report: what compaction did.
        title: heading of the page.
        profiles: `Profile.to_json()` by name, e.g. of the dense and the compact model.
        comparison: one row per method; keys: see `comparison_cells`.
        context: what a reader needs to repeat it: versions, seed, machine, recipe. Dicts in it are listed key by key.

    The same arguments give the same bytes. What is missing is said on the page.

    Raises:
        MissingExtraError: matplotlib, which draws the pictures, is not installed.
    """
    sections = [
        section("Methods compared", comparison_section(comparison)),
        section("Parameters, layer by layer", picture(params_picture(report), "No picture: the report lists no layers.", PARAMS)),
        section("Singular values", picture(spectra_picture(report), "No picture: no layer was cut, or its spectrum was not recorded.", spectra_text(report))),
        section("Ranks over training", picture(ranks_picture(report), "No picture: there is no history of ranks, as for a model that was cut without training under pressure.", RANKS)),
        section("Layers", layer_section(report)),
        section("Notes", bullet_list(report.notes) if report.notes else missing("No notes.")),
        section("Measured", profile_section(profiles)) if profiles else "",
        section("How this was made", context_section(context)),
    ]  # fmt: skip
    return PAGE.format(title=escape(title), css=CSS, headline=headline(report), sections="\n".join(s for s in sections if s))


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} - laconic</title>
<style>{css}</style>
</head>
<body>
<main>
<header><p class="kicker">laconic report</p><h1>{title}</h1></header>
{headline}
{sections}
</main>
</body>
</html>
"""
PARAMS = "Weights of two or more dimensions, in the model's order. A cut layer holds the parameters of both its factors."
RANKS = "The rank is the number of singular values above zero after each proximal step; at the cut it falls to what the budget allows."


def headline(report: CompactReport) -> str:
    """The four numbers to read first."""
    tiles = [
        before_after("Parameters", report.params_before, report.params_after),
        before_after("MACs", report.macs_before, report.macs_after, "not counted: no example inputs"),
        tile("Largest output change", scientific(report.max_abs_diff, 3), "by the cut, on the example inputs" if report.max_abs_diff is not None else "not checked: no example inputs" if report.macs_before is None else "not compared: see the notes"),
        tile("Surgery error", scientific(report.surgery_error), "cut layers against truncated dense ones, relative"),
    ]  # fmt: skip
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def before_after(name: str, before: int | None, after: int | None, otherwise: str = "") -> str:
    if not before or after is None:
        return tile(name, MISSING, otherwise)
    return tile(name, count(after), f"{share(after, before)} of {count(before)}")


def tile(name: str, value: str, below: str) -> str:
    return f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd><dd class="below">{escape(below)}</dd></div>'


def section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def picture(svg: str | None, otherwise: str, caption: str) -> str:
    return missing(otherwise) if svg is None else f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def spectra_text(report: CompactReport) -> str:
    text = "Largest first, on a logarithmic axis that all panels share; values below a ten-thousandth of the largest are not drawn."
    return text if report.spectra_start else f"{text} The spectra before training are not in this report."


def table(head: str, rows: Iterable[str], foot: str = "") -> str:
    end = f"\n<tfoot>{foot}</tfoot>" if foot else ""
    return '<div class="wide"><table>\n<thead>' + head + "</thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>" + end + "\n</table></div>"


def line(cells: Sequence[str], left: int, tag: str = "td", css: str = "") -> str:
    """A table row; the first `left` cells and none else are text, set to the left."""
    inner = "".join(element(tag, c, "" if i < left else "num") for i, c in enumerate(cells))
    return row(inner, css)


def element(tag: str, text: str, css: str = "") -> str:
    return f'<{tag} class="{css}">{escape(text)}</{tag}>' if css else f"<{tag}>{escape(text)}</{tag}>"


def row(inner: str, css: str = "") -> str:
    return f'<tr class="{css}">{inner}</tr>' if css else f"<tr>{inner}</tr>"


def comparison_section(rows: Sequence[Row] | None) -> str:
    if not rows:
        return missing("Nothing to compare with: no other methods were given.")
    body = [line(c, 1, css="ours" if is_ours(r) else "") for r, c in zip(rows, comparison_cells(rows), strict=True)]
    drawn = picture(comparison_picture(rows), "No picture of accuracy against size: it needs two methods with both numbers.", comparison_text(rows))  # fmt: skip
    return table(line(COMPARISON_COLUMNS, 1, "th"), body) + drawn


def comparison_text(rows: Sequence[Row]) -> str:
    timed = any(first(r, "train_seconds", "seconds") is not None for r in rows)
    spread = any(first(r, "accuracy_spread", "spread") is not None for r in rows)
    parts = (
        "Accuracy against size; up and to the left is better.",
        "Beside each name, the time of its training." * timed,
        "Bars: the spread." * spread,
    )
    return " ".join(p for p in parts if p)


def layer_section(report: CompactReport) -> str:
    """The layer table: pairs of columns for before and after, times only where some were measured."""
    layers = layer_cells(report)
    if not layers:
        return missing("The report lists no layers.")
    timed = any(x.times for x in layers)
    noted = any(x.note for x in layers)
    single = [f'<th rowspan="2">{t}</th>' for t in ("Layer", "Kind")] + [f'<th rowspan="2" class="num">{t}</th>' for t in ("Shape", "Rank")]
    pairs = ['<th colspan="2" class="pair">Parameters</th>', '<th colspan="2" class="pair">MACs</th>']
    last = ['<th rowspan="2" class="num">Energy kept</th>', '<th colspan="2" class="pair">Time (ms)</th>' if timed else "", '<th rowspan="2">Note</th>' if noted else ""]  # fmt: skip
    second = '<th class="num">before</th><th class="num">after</th>' * (3 if timed else 2)
    head = f"<tr>{''.join(single + pairs + last)}</tr><tr>{second}</tr>"
    total = LayerCells("whole model", "", "", "", (count(report.params_before), count(report.params_after)), (count(report.macs_before), count(report.macs_after)), "", ("", "") if timed else None, "")  # fmt: skip
    told = "" if timed else missing("Times of single layers were not measured.")
    return table(head, (layer_line(x, noted) for x in layers), layer_line(total, noted)) + told


def layer_line(x: LayerCells, noted: bool) -> str:
    numbers = (x.shape, x.rank, *x.params, *x.macs, x.energy, *(x.times or ()))
    cells = [f"<td><code>{breakable(x.name)}</code></td>" if x.kind else element("td", x.name), element("td", x.kind)]
    cells += [element("td", n, "num") for n in numbers]
    cells += [element("td", x.note, "note")] if noted else []
    return row("".join(cells), "dense" if x.rank == "dense" else "")


def breakable(name: str) -> str:
    """Escaped; a long name may go on in the next line after each dot."""
    return escape(name).replace(".", ".<wbr>")


def bullet_list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(x)}</li>" for x in lines) + "</ul>"


def profile_section(profiles: Mapping[str, Mapping[str, Any]]) -> str:
    places = decimals(p.get("latency_ms") for p in profiles.values())
    rows = []
    for name, p in profiles.items():
        timing = p.get("latency") or {}
        where = ", ".join(
            f"{label}{timing[k]}" for k, label in (("device", ""), ("threads", "threads: "), ("blocks", "timings: ")) if k in timing
        )
        rows.append(line((str(name), count(p.get("params")), count(p.get("macs")), fixed(p.get("latency_ms"), places), fixed(timing.get("spread_ms"), places), size(p.get("peak_memory")), where or MISSING), 1))  # fmt: skip
    return table(line(("Model", "Parameters", "MACs", "Latency (ms)", "Spread (ms)", "Peak memory", "Timed on"), 1, "th"), rows)


def context_section(context: Mapping[str, Any] | None) -> str:
    if not context:
        return missing("Versions, seed and machine were not given.")
    entries = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in flat(context))
    return f'<dl class="context">{entries}</dl>'


def flat(entries: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(map(str, value)) or MISSING
        else:
            yield f"{prefix}{key}", MISSING if value is None else str(value)
