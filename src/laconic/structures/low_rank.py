"""Low rank: a penalty on the singular values of an unfolded weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import whole_number
from ..distributed import full, write
from ..matricize import CHANNEL, SPATIAL, Unfolding, check_matricization, unfolding_named
from ..penalties import L1, LogSum, Penalty
from ..precision import full_precision
from ..solvers import factored_prox, factored_svd, spectral_prox
from ..solvers.eigen import eigh_inside
from ..solvers.gram import singular_values, small_gram
from ..surgery.factorize import factorize, narrow, pair_matrices, pair_weights
from ..surgery.factorize import weights as pair_parameters
from ..timing import RankTimes
from .base import InUnits, Shrinkage, check_options


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
        inner: the first layer of the pair as a site of its own, which may be cut along the channels that it takes in; its modules are
            there once this site is cut. None: the pair stays a pair.
        positions: how often a parameter of the dense weight, of the pair's first and of its second weight takes part in a
            multiplication on the example inputs; None without.
    """

    name: str
    structure: LowRank
    unfolding: Unfolding
    kind: str
    modules: tuple[nn.Module, ...]
    paths: tuple[tuple[str, ...], ...]
    positions: tuple[int, int, int] | None = None
    rank: int | None = None
    times: RankTimes | None = None
    inner: Site | None = None
    whole: Unfolding = field(init=False)  # with all channels of the dense model

    def __post_init__(self) -> None:
        self.whole = self.unfolding

    @property
    def layer(self) -> str:
        return self.paths[0][0]

    @property
    def dense_macs(self) -> int | None:
        """MACs of the layer with its dense weight, on the example inputs; None without."""
        return None if self.positions is None else self.positions[0] * self.unfolding.dense_params

    @property
    def unit_macs(self) -> int | None:
        """MACs of one unit of rank, on the example inputs; None without."""
        if self.positions is None:
            return None
        first, second = self.unfolding.unit_parts
        return self.positions[1] * first + self.positions[2] * second

    @property
    def first_layers(self) -> tuple[nn.Module, ...]:
        """Of the pairs."""
        pairs: tuple[Any, ...] = self.modules
        return tuple(pair[0] for pair in pairs)

    def inner_at(self, rank: int) -> Site:
        """The first layer of the pair of this rank, to see what it costs."""
        assert self.inner is not None
        return replace(
            self.inner, unfolding=self.inner.unfolding.resized(self.unfolding.groups * rank, self.unfolding.sides[1]), inner=None
        )

    def cut_to(self, rank: int, pairs: Sequence[nn.Sequential]) -> None:
        """The pairs are in the model."""
        self.modules, self.rank = tuple(pairs), rank
        if self.inner is not None:
            self.inner.unfolding = self.inner_at(rank).unfolding
            self.inner.modules = self.first_layers

    def resize(self, out: int, taken: int) -> None:
        """The layer has other numbers of channels now: a measured time is taken to change as the parameters do."""
        before, self.unfolding = self.unfolding, self.unfolding.resized(out, taken)
        if self.inner is not None:
            self.inner.unfolding = self.inner.unfolding.resized(self.inner.unfolding.sides[0], taken)
            if self.rank is not None:
                self.inner.modules = self.first_layers
        if self.times is not None:
            dense, unit = (getattr(self.unfolding, n) / getattr(before, n) for n in ("dense_params", "unit_params"))
            self.times = self.times.scaled(dense, unit)

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """The trained parameters: the weight, or once cut the weights of the pair (of three layers, once the first is cut as well)."""
        if self.inner is not None and self.inner.rank is not None:
            pair: Any = self.modules[0]
            return (*self.inner.weights, pair[1].weight)
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
        first: Tensor
        *_, first, second = self.weights
        if self.inner is not None and self.inner.rank is not None:
            left, right = self.inner.factors
            with full_precision(left.device):
                first = self.inner.unfolding.fold(left @ right)
        return pair_matrices(self.unfolding, first.detach(), second.detach())

    @property
    def joint_shares(self) -> Tensor:
        r"""What the inner cut leaves of the energy that the pair keeps: the logarithm, `[r - 1, s - 1]`, for both ranks.

        With the singular vectors U of the unfolded weight and the eigenvectors V of its Gram matrix along the channels taken in,
        :math:`E_{ij} = \|W \times_1 u_i \times_2 v_j\|_F^2`, and the share is
        :math:`\sum_{i \le r, j \le s} E_{ij} / \sum_{i \le r, j} E_{ij}`.
        """
        with full_precision(self.weights[0].device):
            if self.rank is None:
                matrix = self.matrix[0]
            else:
                left, right = self.factors
                matrix = torch.linalg.qr(left[0].double(), mode="r").R.to(right.dtype) @ right[0]
            _, u = eigh_inside(small_gram(matrix[None], torch.float64))
            u = u[0].flip(1)[:, : self.unfolding.full_rank].to(matrix.dtype)
            rows = (u.mT @ matrix).unflatten(1, (self.unfolding.sides[1], -1))  # [r, in, k]
            _, v = torch.linalg.eigh(torch.einsum("rik,rjk->ij", rows, rows).double())
            energies = torch.einsum("rik,ij->rjk", rows, v.flip(1).to(rows.dtype)).double().square().sum(2).cumsum(0).cumsum(1)
        return (energies / energies[:, -1:].clamp_min(math.ulp(0.0))).clamp(1e-16, 1.0).log().cpu()

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
        multiple: cut only at multiples of this rank (what the hardware likes: 8, 16).
        inputs: cut the first layer of a convolution's pair again, along the channels that it takes in, where that serves the budget better (Tucker-2):
            1 x 1 from n to s channels, the kernel from s to r, 1 x 1 from r to m.
        embeddings: cut `nn.Embedding` as well, into a table of r columns and a linear layer. It saves parameters and costs operations, so it is asked for.
    """

    penalty: Penalty = field(default_factory=LogSum)
    strength: float | None = None
    scale: str = "relative"
    matricization: str = CHANNEL
    include: str | tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    multiple: int = 1
    inputs: bool = True
    embeddings: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        object.__setattr__(self, "multiple", whole_number("multiple", self.multiple, least=1))
        check_matricization(self.matricization)

    @classmethod
    def as_published(cls, strength: float, **options: Any) -> LowRank:
        """Alvarez & Salzmann 2017: nuclear norm, absolute threshold, spatial unfolding.

        With one proximal step per epoch and ranks by energy per layer: see `Compressor.as_published`.
        """
        published: dict[str, Any] = {"penalty": L1(), "strength": strength, "scale": "absolute", "matricization": SPATIAL, "inputs": False}
        return cls(**published | options)

    def unit(self, site: Site) -> float:
        """The unit of the threshold for this weight (1 for a zero weight)."""
        if self.scale == "absolute":
            return 1.0
        u = site.unfolding  # of the singular values, by the Frobenius norm: needs no decomposition
        return site.norm / math.sqrt(u.groups * min(u.m, u.n)) or 1.0

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
        return combined(singular_values(site.matrix))

    def cut(self, site: Site, rank: int) -> list[nn.Sequential]:
        """A pair of layers for each module that holds the weight; tied modules share the factors."""
        make = factorize if site.rank is None else narrow
        pairs = [make(module, site.unfolding, rank) for module in site.modules]
        for pair in pairs[1:]:
            pair[0].weight, pair[1].weight = pairs[0][0].weight, pairs[0][1].weight
        return pairs


def inner_site(site: Site) -> Site | None:
    """The first layer of a convolution's pair, unfolded along the channels that it takes in."""
    u = site.unfolding
    if not site.structure.inputs or u.name not in ("out,in*k", "out*k,in") or u.groups > 1 or len(u.shape) < 3:
        return None
    kernel = u.shape[2:] if u.name == "out,in*k" else (1, *u.shape[3:])
    if math.prod(kernel) == 1 or u.shape[1] == 1:
        return None
    unfolding = unfolding_named("out*kernel,in", (u.full_rank, u.shape[1], *kernel))
    paths = tuple(tuple(f"{path}.0" for path in of_module) for of_module in site.paths)
    return Site(f"{site.layer}.0.weight", site.structure, unfolding, site.kind, (), paths)


def combined(values: Tensor) -> Tensor:
    """Singular values of all groups `[g, k]` as one spectrum `[k]`: the units of a grouped layer go together."""
    return torch.linalg.vector_norm(values.double(), dim=0).cpu() if values.ndim == 2 else values.double().cpu()
