"""What a solver is, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..penalties import Penalty


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What a solver hands back, on the scale of its input.

    Attributes:
        x: shrunk matrices `[b, m, n]`.
        values: singular values of `x`, float64 `[b, k]`, non-increasing.
        input_values: singular values of the input, float64 `[b, k]`, non-increasing.
        error: bound on the error of an input singular value that lies at the cutoff, per matrix, float64 `[b]`.
    """

    x: Tensor
    values: Tensor
    input_values: Tensor
    error: Tensor


class Solver(Protocol):
    """One algorithm. `shrink` takes finite matrices `[b, m, n]` in float32 or float64, whose largest magnitude is from 2**-16 to 2**16.

    `scale` is the factor that brings the singular values back to the user's units (the prox is computed there), `tau`
    the threshold in the user's units.
    """

    @property
    def name(self) -> str: ...

    def shrink(self, x: Tensor, penalty: Penalty, tau: float, scale: float) -> Shrunk: ...


def shrink_values(s: Tensor, penalty: Penalty, tau: float, scale: float) -> Tensor:
    """Prox of singular values `s` (solver's units, float64), sorted; back in the solver's units."""
    return penalty.prox(s * scale, tau) / scale


def ratio(new: Tensor, old: Tensor) -> Tensor:
    """new / old, and 0 where old is 0."""
    return torch.where(old > 0, new / torch.where(old > 0, old, torch.ones_like(old)), torch.zeros_like(new))
