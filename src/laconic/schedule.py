"""The life of a run as data, and the controller that steers the pressure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .checks import check_number
from .errors import InvalidValueError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Fractions of `total_steps`.

    Attributes:
        warmup: until here the network trains dense and unpressed.
        settle: until here it is pressed and shrinks; from here on the structure is final and the small network trains on.
    """

    warmup: float = 0.1
    settle: float = 0.35

    def __post_init__(self) -> None:
        for name in ("warmup", "settle"):
            object.__setattr__(self, name, check_number(f"Schedule: {name}", getattr(self, name)))
        if not 0 <= self.warmup < self.settle <= 1:
            raise InvalidValueError(f"Schedule(warmup={self.warmup}, settle={self.settle}): need 0 <= warmup < settle <= 1")

    def way(self, progress: float) -> float:
        """How far between warm-up (0) and settling (1) a run is."""
        return min(max((progress - self.warmup) / (self.settle - self.warmup), 0.0), 1.0)


# Widths that all shrink by the same part need not be learnt about first: only which of their channels go is a question.
EVEN = Schedule(warmup=0.05, settle=0.2)
# Where their channels are turned to principal axes first, nothing needs to be pressed: all go at once, as soon as the optimizer has its moments.
TURNED = Schedule(warmup=0.01, settle=0.02)


def too_many_steps(total_steps: int) -> int:
    """From here on a run is longer than was told, by more than rounding epochs and batches explains."""
    return total_steps + total_steps // 10 + 2


@dataclass(slots=True)
class Controller:
    """Steers one strength for all layers so that the cut to the budget will lose little.

    The *gap* is what a cut to the budget would lose now: minus the logarithm of the product of retained shares, under
    the allocation that the budget would choose now, divided by the number of weights. It is steered along a straight
    line in its logarithm from where it is at the start of the pressure to `final_gap` at the cut: above the line the
    strength grows by `rate` per proximal step, below it falls.

    Attributes:
        strength: threshold per unit of learning rate.
        peak: the largest learning rate known when the strength was set.
        start_gap: gap at the first proximal step; None before.
    """

    strength: float
    peak: float
    start_gap: float | None = None
    final_gap: float = 0.1
    rate: float = 1.15

    def see(self, peak: float) -> None:
        """A learning rate above those known: the strength falls in proportion, so that their product stays what was meant."""
        if peak > self.peak:
            self.strength, self.peak = self.strength * self.peak / peak, peak

    def update(self, progress: float, gap: float) -> None:
        """Adjust the strength; `progress` goes from 0 (start of the pressure) to 1 (cut)."""
        gap = max(gap, 1e-12)
        if self.start_gap is None:
            self.start_gap = max(gap, self.final_gap)
        planned = math.log(self.start_gap) + progress * (math.log(self.final_gap) - math.log(self.start_gap))
        self.strength *= self.rate if math.log(gap) > planned else 1 / self.rate
