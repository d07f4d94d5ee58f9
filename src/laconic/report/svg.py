"""From a matplotlib figure to an SVG that belongs to its page.

Figures are drawn in stand-in colours, each of which becomes a CSS variable: one picture serves light, dark and print.
Text stays text, in the page's font. The same figure always gives the same bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = 6
NAMES = ("ink", "muted", "grid", "before", "after", "mark", *(f"line{i}" for i in range(LINES)))
COLOUR = {name: f"#fe01{i:02x}" for i, name in enumerate(NAMES)}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
STYLE: Any = {
    "axes.edgecolor": COLOUR["grid"],
    "axes.labelcolor": COLOUR["muted"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "grid.color": COLOUR["grid"],
    "grid.linewidth": 0.6,
    "text.color": COLOUR["ink"],
    "text.parse_math": False,  # a layer may have $ in its name
    "xtick.color": COLOUR["grid"],
    "ytick.color": COLOUR["grid"],
    "xtick.labelcolor": COLOUR["muted"],
    "ytick.labelcolor": COLOUR["muted"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "laconic",
}


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults and ours on top, whatever the user has set; restored afterwards.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise missing_extra("matplotlib", "plot", "the HTML report") from None
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes placed in inches from the top left corner, so that a panel has its size however many there are."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element; `name` keeps its ids apart from those of other pictures, `label` is read aloud."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<defs>\s*</defs>", "", text)
    names = {hexed: key for key, hexed in COLOUR.items()}

    def adapt(match: re.Match[str]) -> str:
        tag = re.sub(r"#fe01[0-9a-f]{2}\b", lambda c: f"var(--{names[c[0]]})", match[0])
        tag = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", tag)
        tag = re.sub(r' xmlns(:xlink)?="[^"]*"', "", tag).replace("xlink:href=", "href=")
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag)

    text = re.sub(r"<[^>]*>", adapt, text)
    return re.sub("\n+", "\n", text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1))
