"""Structures: what a regularizer acts on, what one of its units costs, and how a unit is cut out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidTypeError, InvalidValueError, nearest
from .matricize import CHANNEL, SPATIAL, Unfolding, check_matricization
from .penalties import L1, LogSum, Penalty
from .solvers import SVTResult, spectral_prox
from .surgery.factorize import factorize


def root_mean_square(matrix: Tensor) -> float:
    """Root mean square singular value, `||W||_F / sqrt(g min(m, n))`: needs no decomposition."""
    norm = float(torch.linalg.vector_norm(matrix.detach(), dtype=torch.float64 if matrix.device.type != "mps" else torch.float32))
    return norm / math.sqrt(matrix.shape[0] * min(matrix.shape[-2:]))


SCALES: dict[str, Callable[[Tensor], float]] = {"relative": root_mean_square, "absolute": lambda matrix: 1.0}


@dataclass(eq=False, slots=True)
class Site:
    """One weight under a structure.

    Attributes:
        name: parameter's name, e.g. `"conv1.weight"` (the first of `aliases`).
        structure: what acts on it.
        unfolding: how it becomes a matrix.
        kind: class name of the layer.
        modules: every distinct module that holds the weight (several when it is tied).
        paths: for each module, every path at which it sits.
        unit_macs, dense_macs: MACs of one unit of rank and of the dense layer, on the example inputs; None without.
    """

    name: str
    structure: LowRank
    unfolding: Unfolding
    kind: str
    modules: tuple[nn.Module, ...]
    paths: tuple[tuple[str, ...], ...]
    dense_macs: int | None = None
    unit_macs: int | None = None

    @property
    def layer(self) -> str:
        return self.paths[0][0]

    @property
    def weight(self) -> nn.Parameter:
        weight = self.modules[0].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def matrix(self) -> Tensor:
        return self.unfolding.unfold(self.weight.detach())

    @property
    def break_even(self) -> int:
        """The largest rank r with r (m + n) < m n: from the next one on, two layers are no smaller than one."""
        return (self.unfolding.dense_params - 1) // self.unfolding.unit_params


@dataclass(frozen=True, kw_only=True)
class LowRank:
    r"""Drive weights to low rank: a penalty on the singular values of each unfolded weight.

    After the optimizer's own step, every few steps,

    .. math:: W \leftarrow \operatorname{argmin}_X \tfrac12 \|X - W\|_F^2 + \tau u\, u\, h(\sigma(X) / u)

    with :math:`\tau` = strength x the summed learning rates since the last such step, and the unit u = 1
    (`scale="absolute"`) or the root mean square singular value of W (`"relative"`: the threshold and the penalty's
    own constants then mean the same for every layer, whatever its scale).

    Args:
        penalty: on the singular values; `L1()` gives the nuclear norm.
        strength: threshold per unit of learning rate. None: left to the budget.
        scale: `"relative"` or `"absolute"`.
        matricization: of convolution kernels: `"out,in*kh*kw"`, `"out*kh,in*kw"`, or `"auto"` (per layer, whichever
            needs fewer parameters for 99 % of the energy of the weights as they are when the plan is made).
        include, exclude: shell-style patterns on module or parameter names.
        rank_multiple: cut only at multiples of this rank (what the hardware likes: 8, 16).
    """

    penalty: Penalty = field(default_factory=LogSum)
    strength: float | None = None
    scale: str = "relative"
    matricization: str = CHANNEL
    include: str | tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    rank_multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not isinstance(self.penalty, Penalty):
            raise InvalidTypeError(f"penalty = {self.penalty!r}: expected an object with value, prox and cutoff, such as laconic.LogSum()")
        if self.strength is not None and not (self.strength >= 0 and math.isfinite(self.strength)):
            raise InvalidValueError(f"strength = {self.strength}: must be finite and at least 0")
        if self.scale not in SCALES:
            raise InvalidValueError(f"scale = {self.scale!r} is unknown{nearest(self.scale, SCALES)}")
        if not (isinstance(self.rank_multiple, int) and self.rank_multiple >= 1):
            raise InvalidValueError(f"rank_multiple = {self.rank_multiple!r}: must be a whole number, at least 1")
        check_matricization(self.matricization)

    @classmethod
    def as_published(cls, strength: float, **options: Any) -> LowRank:
        """Alvarez & Salzmann 2017: nuclear norm, absolute threshold, spatial unfolding.

        With one proximal step per epoch and ranks by energy per layer: see `Compressor.as_published`.
        """
        published: dict[str, Any] = {"penalty": L1(), "strength": strength, "scale": "absolute", "matricization": SPATIAL}
        return cls(**published | options)

    def unit(self, site: Site) -> float:
        """The unit of the threshold for this weight (1 for a zero weight)."""
        return SCALES[self.scale](site.matrix) or 1.0

    def shrink(self, site: Site, tau: float) -> SVTResult:
        """The proximal step on one weight, in place."""
        matrix = site.matrix
        unit = self.unit(site) if math.isfinite(tau) else 1.0
        if not math.isfinite(unit):  # spectral_prox names the weight and what to do
            unit = 1.0
        result = spectral_prox(matrix, InUnits(self.penalty, unit), tau * unit, name=site.name)
        with torch.no_grad():
            site.weight.copy_(site.unfolding.fold(result.x))
        return result

    def values(self, site: Site) -> Tensor:
        """Singular values, non-increasing, float64 on CPU; for a grouped layer the norm over its groups."""
        return combined(torch.linalg.svdvals(site.matrix.double()))

    def cut(self, site: Site, rank: int) -> list[nn.Sequential]:
        """A pair of layers for each module that holds the weight; tied modules share the factors."""
        first = factorize(site.modules[0], site.unfolding, rank)
        pairs = [first]
        for module in site.modules[1:]:
            pair = factorize(module, site.unfolding, rank)
            pair[0].weight, pair[1].weight = first[0].weight, first[1].weight
            pairs.append(pair)
        return pairs


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


def combined(values: Tensor) -> Tensor:
    """Singular values of all groups `[g, k]` as one spectrum `[k]`: the units of a grouped layer go together."""
    return torch.linalg.vector_norm(values.double(), dim=0).cpu() if values.ndim == 2 else values.double().cpu()
