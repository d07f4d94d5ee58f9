"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

MISSING = "-"
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def count(n: float | None) -> str:
    """Parameters and MACs: exact below a million, else three digits and a unit.

    Example:
        >>> count(94186), count(29_150_000), count(None)
        ('94,186', '29.2 M', '-')
    """
    if n is None:
        return MISSING
    for factor, unit in UNITS:
        if abs(n) >= 0.9995 * factor:
            return f"{three_digits(n / factor)} {unit}"
    return f"{round(n):,}"


def size(num_bytes: float | None) -> str:
    """`98,304` -> `98.3 kB`; decimal units, as file managers show."""
    if num_bytes is None:
        return MISSING
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= 0.9995 * factor:
            return f"{three_digits(num_bytes / factor)} {unit}"
    return f"{num_bytes:.0f} B"


def three_digits(x: float) -> str:
    """Three significant digits without an exponent: `29.2`, `0.984`, `1,200`."""
    if not math.isfinite(x) or x == 0:
        return f"{x:.0f}"
    exponent = int(f"{x:.2e}".partition("e")[2])  # after rounding: 0.9999 counts as 1
    return f"{x:,.{max(0, 2 - exponent)}f}"


def scientific(x: float | None, digits: int = 2) -> str:
    """Errors: few digits, a short exponent: `0.9`, `4.1e-8`."""
    if x is None:
        return MISSING
    mantissa, mark, exponent = f"{x:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if mark else mantissa


def share(part: float | None, whole: float | None) -> str:
    """`24.9 %`."""
    return MISSING if part is None or not whole else f"{100 * part / whole:.1f} %"


def duration(seconds: float | None) -> str:
    """`2.5 s`, `12 min 05 s`, `3 h 20 min`."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def decimals(values: Iterable[float | None], digits: int = 3) -> int:
    """Decimal places that give the smallest of the values `digits` significant digits: a column then lines up (at most 4)."""
    magnitudes = [abs(v) for v in values if v is not None and math.isfinite(v) and v != 0]
    return min(4, max(0, digits - 1 - math.floor(math.log10(min(magnitudes))))) if magnitudes else 0


def fixed(value: float | None, places: int) -> str:
    return MISSING if value is None else f"{value:,.{places}f}"


def elide(text: str, width: int) -> str:
    """Leave out the beginning of a long name; layer names differ towards their end."""
    return text if len(text) <= width else f"…{text[len(text) - width + 1 :]}"
