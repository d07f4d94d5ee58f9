"""Where labels go, so that none covers another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LETTER = 0.08  # inches; width of a letter in the pictures' type size, generous
LINE = 0.16
AROUND = (
    *((0.14, 0.0, "left"), (-0.14, 0.0, "right"), (0.0, 0.2, "center"), (0.0, -0.2, "center")),
    *((dx, sign * dy, align) for dy in (0.22, 0.42, 0.62, 0.82) for sign in (1, -1) for dx, align in ((0.3, "left"), (-0.3, "right"))),
)
Box = tuple[float, float, float, float]


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart, in the order of `wanted`, as near to it as least squares can be, within the range.

    Where the range is too small for all, it is overrun at the upper end.
    """
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], -i))
    # With y_i = z_i + i * gap the condition is that z does not fall: pool neighbours that do (isotonic regression).
    blocks: list[list[float]] = []  # sum, number
    for place, i in enumerate(order):
        blocks.append([wanted[i] - place * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, number = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += number
    pooled = [total / number for total, number in blocks for _ in range(int(number))]
    top = high - (len(wanted) - 1) * gap
    result = [0.0] * len(wanted)
    for place, i in enumerate(order):
        result[i] = max(low, min(pooled[place], top)) + place * gap
    return result


@dataclass(frozen=True, slots=True)
class Place:
    """The near end of a label, which way it runs (`left`: text starts here), and whether it needs a line to its dot."""

    at: tuple[float, float]
    align: str
    far: bool


def place_beside(dots: Sequence[tuple[float, float]], bars: Sequence[float], texts: Sequence[str]) -> list[Place]:
    """A place for each label beside its dot (inches) that covers no dot, no error bar (half as long as `bars`) and no earlier label.

    Nearest first; where all places are taken, the one that covers least.
    """
    taken: list[Box] = [(x - 0.09, y - bar, x + 0.09, y + bar) for (x, y), bar in zip(dots, bars, strict=True)]
    places = []
    for (x, y), text in zip(dots, texts, strict=True):
        width = LETTER * len(text)
        best: tuple[float, Place, Box] | None = None
        for distance, (dx, dy, align) in enumerate(AROUND):
            start = x + dx - {"left": 0, "right": width, "center": width / 2}[align]
            box = (start, y + dy - LINE / 2, start + width, y + dy + LINE / 2)
            cost = 100 * sum(overlap(box, other) for other in taken) + 0.001 * distance + (10 if start < 0.65 else 0)
            if best is None or cost < best[0]:
                best = (cost, Place((x + dx, y + dy), align, abs(dx) > 0.2), box)
        assert best is not None
        places.append(best[1])
        taken.append(best[2])
    return places


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
