"""What all structures have in common: options, the unit of a threshold, and what a proximal step reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checks import check_choice, check_number
from ..errors import InvalidTypeError, InvalidValueError
from ..penalties import Penalty

SCALES = ("relative", "absolute")


def check_options(structure: Any) -> None:
    """What all structures have in common."""
    for name in ("include", "exclude"):
        value = getattr(structure, name)
        if not isinstance(value, (str, list, tuple)) or not all(isinstance(x, str) for x in value):
            raise InvalidTypeError(f"{name} = {value!r}: expected a pattern such as 'encoder.*', or a list of them")
        if name == "include" and value == []:
            raise InvalidValueError("include = []: an empty list selects nothing; leave it out for all layers")
        object.__setattr__(structure, name, (value,) if isinstance(value, str) else tuple(value))
    if not isinstance(structure.penalty, Penalty):
        raise InvalidTypeError(f"penalty = {structure.penalty!r}: expected an object with value, prox and cutoff, such as laconic.LogSum()")
    if structure.strength is not None:
        object.__setattr__(structure, "strength", check_number("strength", structure.strength))
        if not (structure.strength >= 0 and math.isfinite(structure.strength)):
            raise InvalidValueError(f"strength = {structure.strength}: must be finite and at least 0")
    check_choice("scale", structure.scale, SCALES)


def root_mean_square(values: Tensor) -> float:
    """The unit of the threshold with `scale="relative"`; 1 where all values are zero."""
    return float(values.square().mean().sqrt()) or 1.0


@dataclass(frozen=True, slots=True)
class Shrinkage:
    """What a proximal step found: `values` after it (float64, non-increasing), their number above zero, the solver used,
    and one line for each solver that failed before it."""

    values: Tensor
    rank: int
    solver: str
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InUnits:
    """A penalty on values measured in `unit`: `h_u(s) = u h(s / u)`; prox, cutoff are rescaled."""

    penalty: Penalty
    unit: float

    def value(self, s: Tensor) -> Tensor:
        return self.unit * self.penalty.value(s / self.unit)

    def prox(self, s: Tensor, tau: float) -> Tensor:
        return self.unit * self.penalty.prox(s / self.unit, tau / self.unit)

    def cutoff(self, tau: float) -> float:
        return self.unit * self.penalty.cutoff(tau / self.unit)
