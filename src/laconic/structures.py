"""Structures: what a regularizer acts on, what one of its units costs, and how a unit is cut out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import full, write
from .errors import InvalidTypeError, InvalidValueError, nearest
from .matricize import CHANNEL, SPATIAL, Unfolding, check_matricization
from .penalties import L1, LogSum, Penalty
from .solvers import factored_prox, factored_svd, spectral_prox
from .surgery.factorize import factorize, narrow, pair_matrices, pair_weights
from .surgery.factorize import weights as pair_parameters
from .timing import RankTimes


def root_mean_square(site: Site) -> float:
    """Root mean square singular value, `||W||_F / sqrt(g min(m, n))`: needs no decomposition."""
    u = site.unfolding
    return site.norm / math.sqrt(u.groups * min(u.m, u.n))


SCALES: dict[str, Callable[[Site], float]] = {"relative": root_mean_square, "absolute": lambda site: 1.0}


@dataclass(eq=False, slots=True)
class Site:
    """One weight under a structure.

    Attributes:
        name: parameter's name, e.g. `"conv1.weight"` (the first of `aliases`).
        structure: what acts on it.
        unfolding: how it becomes a matrix.
        kind: class name of the layer.
        modules: every distinct module that holds the weight (several when it is tied); once cut, the pairs in their place.
        paths: for each module, every path at which it sits.
        rank: None while dense.
        times: measured on the example inputs; None unless a budget in milliseconds asks for it.
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
    rank: int | None = None
    times: RankTimes | None = None

    @property
    def layer(self) -> str:
        return self.paths[0][0]

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """The trained parameters: the weight, or once cut the weights of the pair."""
        if self.rank is not None:
            return pair_parameters(self.modules[0])
        weight = self.modules[0].weight
        assert isinstance(weight, nn.Parameter)
        return (weight,)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype

    @property
    def matrix(self) -> Tensor:
        """The dense weight, unfolded."""
        (weight,) = self.weights
        return self.unfolding.unfold(full(weight))

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Once cut: `left [g, m, r]`, `right [g, r, n]`."""
        first, second = self.weights
        return pair_matrices(self.unfolding, first.detach(), second.detach())

    @property
    def norm(self) -> float:
        """Frobenius norm of the weight, or of the product of the factors."""
        accurate = torch.float32 if self.weights[0].device.type == "mps" else torch.float64
        if self.rank is None:
            return float(torch.linalg.vector_norm(self.matrix, dtype=accurate))
        left, right = (f.to(accurate) for f in self.factors)
        return math.sqrt(max(float(((left.mT @ left) * (right @ right.mT)).sum()), 0.0))

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(full(w)).all()) for w in self.weights)

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
        return SCALES[self.scale](site) or 1.0

    def shrink(self, site: Site, tau: float) -> Shrinkage:
        """The proximal step on one weight, in place; on a cut one in the space of its factors."""
        unit = self.unit(site) if math.isfinite(tau) else 1.0
        if not math.isfinite(unit):  # the solver names the weight and what to do
            unit = 1.0
        penalty = InUnits(self.penalty, unit)
        if site.rank is not None:
            left, right, values = factored_prox(*site.factors, penalty, tau * unit, site.name)
            for weight, new in zip(site.weights, pair_weights(site.unfolding, left, right), strict=True):
                write(weight, new)
            return Shrinkage(combined(values), int((values > 0).sum(-1).max()), "factored", ())
        result = spectral_prox(site.matrix, penalty, tau * unit, name=site.name)
        write(site.weights[0], site.unfolding.fold(result.x))
        return Shrinkage(combined(result.values), result.rank, result.solver, result.failures)

    def values(self, site: Site) -> Tensor:
        """Singular values, non-increasing, float64 on CPU; for a grouped layer the norm over its groups."""
        if site.rank is not None:
            return combined(factored_svd(*site.factors, site.name)[1])
        return combined(torch.linalg.svdvals(site.matrix.double()))

    def cut(self, site: Site, rank: int) -> list[nn.Sequential]:
        """A pair of layers for each module that holds the weight; tied modules share the factors."""
        make = factorize if site.rank is None else narrow
        pairs = [make(module, site.unfolding, rank) for module in site.modules]
        for pair in pairs[1:]:
            pair[0].weight, pair[1].weight = pairs[0][0].weight, pairs[0][1].weight
        return pairs


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


def combined(values: Tensor) -> Tensor:
    """Singular values of all groups `[g, k]` as one spectrum `[k]`: the units of a grouped layer go together."""
    return torch.linalg.vector_norm(values.double(), dim=0).cpu() if values.ndim == 2 else values.double().cpu()
