"""Reports: data, JSON, tables, pictures, the page."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from rich.console import Console

from laconic.errors import MissingExtraError
from laconic.report import CompactReport, LayerReport, Snapshot, comparison_table, layer_table, render
from laconic.report.human import count, decimals, duration, elide, scientific, share, size, three_digits
from laconic.report.labels import overlap, place_beside, spread_out
from laconic.report.pictures import comparison_picture, params_picture, ranks_picture, spectra_picture

HOSTILE = '<script>alert("x")</script>&amp;$x_1$'
VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


def make_report(num_layers: int = 3, names: tuple[str, ...] = ()) -> CompactReport:
    """Layers of different sizes; the second stays dense, an embedding was left alone."""
    layers, starts = [], {}
    for i in range(num_layers):
        name = names[i] if i < len(names) else f"features.{i}"
        full = 8 + 2 * i
        starts[f"{name}.weight"] = tuple(2.0 - j / full for j in range(full))
        spectrum = tuple(4.0 * 0.5**j for j in range(full))
        rank = None if i == 1 else 2 + i
        after = full * 100 if rank is None else rank * (full + 100)
        note = "" if rank is not None else "the budget keeps it"
        layers.append(
            LayerReport(name, "Linear", (full, 100), rank, full, full * 100, after, full * 1000, 10 * after, 0.9812, spectrum, note=note)
        )
    layers.append(LayerReport("embedding", "Embedding", (50, 4), None, None, 200, 200, note="looked up, not multiplied"))
    history = tuple(
        Snapshot(100 * t, 0.5 * t, {f"{x.name}.weight": max(x.rank or 0, (x.full_rank or 0) - t) for x in layers[:-1]}) for t in range(1, 9)
    )
    return CompactReport(94_186, 23_498, 29_180_000, 7_100_000, 0.8964, 4.1e-8, tuple(layers), ("BatchNorm re-estimated",), history, starts)


def make_rows() -> list[dict]:
    return [
        {"method": "dense", "accuracy": 0.9805, "params": 94_186, "macs": 609_536, "file_bytes": 378_744, "latency_b1_ms": 0.176,
         "latency_b1_spread_ms": 0.031, "latency_b64_ms": 1.4495, "train_seconds": 75.2},
        {"method": "laconic", "accuracy": 0.9889, "params": 23_498, "macs": None},
    ]  # fmt: skip


class Balanced(HTMLParser):
    """Fails on tags that do not nest; collects tags, attributes, ids and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def whole_page(**changes) -> str:
    profiles = {
        "dense": {"params": 94_186, "macs": 609_536, "latency_ms": 0.176, "latency": {"spread_ms": 0.03, "threads": 1, "device": "cpu"}, "peak_memory": 420_000}
    }  # fmt: skip
    context = {"seed": 3, "torch": "2.13.0", "machine": {"cores": 2, "accelerator": None}}
    return render(
        **{"report": make_report(), "title": "Digits", "profiles": profiles, "comparison": make_rows(), "context": context, **changes}
    )


# ---- data -----------------------------------------------------------------------------------------------------------


def test_a_report_survives_json_unchanged():
    report = make_report()
    assert CompactReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


def test_a_strength_that_is_nan_is_stored_as_none_so_that_the_json_is_valid():
    history = (Snapshot(1, math.nan, {"a.weight": 3}), Snapshot(2, 0.5, {"a.weight": 2}))
    report = CompactReport(10, 5, None, None, None, 0.0, (), history=history)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["history"][0]["strength"] is None
    assert CompactReport.from_json(json.loads(text)) == report


def test_an_output_that_became_nan_is_said_and_not_hidden():
    report = CompactReport(10, 5, None, None, math.nan, 0.0, ())
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert math.isnan(CompactReport.from_json(data).max_abs_diff)
    assert '<dd class="value">nan</dd>' in render(report, title="t")


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: count(94_186), "94,186"),
        (lambda: count(29_180_000), "29.2 M"),
        (lambda: count(999_999), "1.00 M"),
        (lambda: count(2_400_000_000), "2.40 G"),
        (lambda: count(0), "0"),
        (lambda: count(None), "-"),
        (lambda: size(378_744), "379 kB"),
        (lambda: size(12), "12 B"),
        (lambda: share(23_498, 94_186), "24.9 %"),
        (lambda: share(1, 0), "-"),
        (lambda: scientific(4.13e-8), "4.1e-8"),
        (lambda: scientific(0.8964, 3), "0.896"),
        (lambda: scientific(None), "-"),
        (lambda: duration(59.96), "1 min 00 s"),
        (lambda: duration(2.46), "2.5 s"),
        (lambda: duration(7000), "1 h 56 min"),
        (lambda: duration(3599.7), "1 h 00 min"),
        (lambda: three_digits(0.0123), "0.0123"),
        (lambda: decimals([0.176, 1.45, None]), 3),
        (lambda: decimals([]), 0),
        (lambda: elide("encoder.layer.11.query", 9), "…11.query"),
    ],
)
def test_numbers_are_written_for_people(call, text):
    assert call() == text


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_labels_are_spread_as_little_as_needed():
    assert spread_out([50, 10, 50], 4, 0, 100) == [52, 10, 48]
    assert spread_out([100, 100, 0, 0], 5, 0, 100) == [100, 95, 5, 0]
    crowded = sorted(spread_out([3.0] * 20, 5, 0, 100))
    assert all(b - a >= 5 - 1e-9 for a, b in pairwise(crowded))


def test_labels_of_near_points_do_not_cover_each_other():
    dots = [(2.0, 2.0), (2.05, 2.1), (2.0, 1.9), (2.6, 2.0)]
    texts = ["one method", "another", "a third method", "the last"]
    boxes = []
    for text, place in zip(texts, place_beside(dots, [0.09] * 4, texts), strict=True):
        width = 0.08 * len(text)
        x = place.at[0] - {"left": 0, "right": width, "center": width / 2}[place.align]
        boxes.append((x, place.at[1] - 0.08, x + width, place.at[1] + 0.08))
    assert all(overlap(a, b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_a_picture_without_its_data_is_none():
    bare = CompactReport(10, 5, None, None, None, 0.0, ())
    assert [f(bare) for f in (spectra_picture, ranks_picture, params_picture)] == [None, None, None]
    assert comparison_picture(None) is None
    assert comparison_picture(make_rows()[:1]) is None
    assert comparison_picture([{"method": "a"}, {"method": "b", "accuracy": 0.5, "params": 3}]) is None


@pytest.mark.parametrize("num_layers", [1, 20])
def test_pictures_name_every_layer_they_show(num_layers):
    report = make_report(num_layers)
    cut = [x for x in report.layers if x.rank is not None]
    for svg, layers in (
        (spectra_picture(report), cut),
        (ranks_picture(report), report.layers[:-1]),
        (params_picture(report), report.layers),
    ):
        texts = "\n".join(parse(svg).text)
        assert all(re.search(rf"{re.escape(x.name)}\b", texts) for x in layers)
    spectra = spectra_picture(report)
    assert all(f"rank {x.rank} of {x.full_rank}" in spectra for x in cut)


def test_the_mark_stands_at_the_rank_that_was_kept():
    svg = spectra_picture(make_report(1))  # rank 2 of 8
    mark = re.search(r'<path d="M (\S+) \S+ \nL (\S+) [^>]*var\(--mark\)', svg)
    tick = re.search(r'<text[^>]* x="([^"]*)"[^>]*>2</text>', svg)
    assert mark[1] == mark[2] == tick[1]


def test_dollars_in_a_name_are_not_read_as_mathematics():
    report = make_report(1, names=("a.$x_1$",))
    for svg in (spectra_picture(report), ranks_picture(report), params_picture(report)):
        assert "a.$x_1$" in svg


def test_every_colour_follows_the_page():
    report = make_report()
    for svg in (spectra_picture(report), ranks_picture(report), params_picture(report), comparison_picture(make_rows())):
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) <= {"none"} | set(re.findall(r"var\(--\w+\)", svg))
        assert "#fe01" not in svg


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 31.0, "axes.grid": True}):
        before = dict(mpl.rcParams)
        changed = params_picture(make_report())
        assert dict(mpl.rcParams) == before
    assert changed == params_picture(make_report())


def test_zeros_one_value_and_equal_values_can_be_drawn():
    for spectrum in ((0.0, 0.0), (1.0,), (2.0, 2.0, 2.0), (3.0, 0.0)):
        layer = LayerReport("a", "Linear", (3, 3), 1, 3, 9, 6, spectrum=spectrum)
        svg = spectra_picture(CompactReport(9, 6, None, None, None, 0.0, (layer,)))
        assert (svg is None) == (max(spectrum) == 0)
    same = [{"method": m, "accuracy": 0.5, "params": 10} for m in "ab"]
    assert parse(comparison_picture(same)).text


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside_and_no_script():
    page = whole_page()
    parser = parse(page)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert not {"script", "link", "img", "iframe"} & set(parser.tags)
    assert all(v.startswith("#") for k, v in parser.attributes if k in ("href", "xlink:href", "src"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_ids_on_the_page_are_unique_and_references_lead_somewhere():
    page = whole_page()
    ids = [v for k, v in parse(page).attributes if k == "id"]
    assert len(ids) == len(set(ids))
    assert {r.strip("#") for r in re.findall(r"(?:url\(|href=\")(#[^)\"]*)", page)} <= set(ids)


def test_the_page_says_what_was_done():
    text = " ".join(parse(whole_page()).text)
    for wanted in ("23,498", "24.9 % of 94,186", "7.10 M", "0.896", "4.1e-8", "0.9889", "379 kB", "0.176 ± 0.031", "1 min 15 s", "0.9812",
                   "BatchNorm re-estimated", "the budget keeps it", "2.13.0", "machine.cores", "420 kB"):  # fmt: skip
        assert wanted in text, wanted
    for layer in make_report().layers:
        assert layer.name in text.replace(". ", ".")
        assert "×".join(map(str, layer.shape)) in text


def test_hostile_names_are_shown_as_text():
    report = make_report(3, names=(HOSTILE, "a\"b' onload='x", "c-->d]]>"))
    page = render(report, title=HOSTILE, comparison=[{**r, "method": HOSTILE} for r in make_rows()], context={HOSTILE: HOSTILE})
    parser = parse(page)
    assert "script" not in parser.tags
    assert not [k for k, _ in parser.attributes if k.startswith("on")]
    assert HOSTILE in "".join(parser.text).replace(".\u200b", ".")
    assert "c-->d]]>" in "".join(parser.text)


def test_the_same_report_gives_the_same_bytes():
    assert whole_page() == whole_page()


def test_what_is_missing_is_said():
    text = " ".join(parse(render(CompactReport(10, 5, None, None, None, 0.0, ()), title="Bare")).text)
    for wanted in ("not counted", "not checked", "Nothing to compare", "no layers", "no layer was cut", "no history", "were not given"):
        assert wanted in text, wanted
    one = " ".join(parse(whole_page(comparison=make_rows()[:1])).text)
    assert "it needs two methods" in one
    assert "Times of single layers were not measured." in one


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"^the HTML report needs matplotlib.*pip install 'laconic\[plot\]'$") as caught:
        whole_page()
    assert "\n" not in str(caught.value)


# ---- tables ---------------------------------------------------------------------------------------------------------


def printed(table, width: int = 140) -> str:
    console = Console(width=width, file=None, record=True, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_layer_table_holds_the_numbers():
    text = printed(layer_table(make_report()))
    for wanted in ("features.0", "2 / 8", "800 → 216", "8,000 → 2,160", "0.9812", "dense", "94,186 → 23,498", "29.2 M → 7.10 M",
                   "features.1: the budget keeps it", "embedding: looked up, not multiplied"):  # fmt: skip
        assert wanted in text, wanted
    assert " ms" not in text  # nothing was timed


def test_layer_times_get_a_column_once_there_are_some():
    layer = LayerReport("a", "Linear", (3, 3), 1, 3, 9, 6, ms_before=0.5, ms_after=0.25)
    assert "0.500 → 0.250" in printed(layer_table(CompactReport(9, 6, None, None, None, 0.0, (layer,))))


def test_the_comparison_table_holds_the_numbers_and_a_dash_for_what_is_missing():
    text = printed(comparison_table(make_rows()))
    for wanted in ("Method", "Accuracy", "Parameters", "MACs", "File size", "batch 1", "batch 64", "Training"):
        assert wanted in text, wanted
    dense, ours = text.strip().splitlines()[-2:]
    assert dense.split() == ["dense", "0.9805", "94,186", "609,536", "379", "kB", "0.176", "1.45", "1", "min", "15", "s"]
    assert ours.split() == ["laconic", "0.9889", "23,498", "-", "-", "-", "-", "-"]


def test_names_that_look_like_markup_are_printed_as_they_are():
    layer = LayerReport("[red]x[/red]", "Linear", (3, 3), 1, 3, 9, 6, note="[bold]y")
    text = printed(layer_table(CompactReport(9, 6, None, None, None, 0.0, (layer,))))
    assert "[red]x[/red]: [bold]y" in text
    assert "[b]" in printed(comparison_table([{"method": "[b]"}]))
