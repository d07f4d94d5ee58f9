"""Structures: what a regularizer acts on, what one of its units costs, and how a unit is cut out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .distributed import full, write
from .errors import InvalidTypeError, InvalidValueError, NonFiniteError, nearest
from .matricize import CHANNEL, SPATIAL, Layer, Unfolding, check_matricization, unfolding_named, unfoldings
from .penalties import L1, LogSum, Penalty
from .solvers import factored_prox, factored_svd, spectral_prox
from .surgery.channels import NORMS, End, Group, channels_kept, width
from .surgery.factorize import MARK, factorize, narrow, pair_matrices, pair_weights, product
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

    def resize(self, out: int, taken: int) -> None:
        """The layer has other numbers of channels now: a measured time is taken to change as the parameters do."""
        before, self.unfolding = self.unfolding, self.unfolding.resized(out, taken)
        if self.times is not None:
            dense, unit = (getattr(self.unfolding, n) / getattr(before, n) for n in ("dense_params", "unit_params"))
            self.times = self.times.scaled(dense, unit)

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


@dataclass(eq=False, slots=True)
class Weight:
    """The entries of one weight under a structure; looked up by its path, since a layer that loses neurons gets another."""

    structure: Entries
    path: str
    model: nn.Module

    @property
    def name(self) -> str:
        return f"entries of {self.path}"

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        return (self.model.get_parameter(self.path),)

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.weights[0]).all())


@dataclass(frozen=True, kw_only=True)
class Entries:
    r"""Drive single entries of weights to zero: a penalty on their magnitudes (`L1()` gives the lasso).

    .. math:: W \leftarrow \operatorname{argmin}_X \tfrac12 \|X - W\|_F^2 + \tau u\, u\, h(|X| / u)

    Zeros among the entries make a model no smaller and no faster; what they are for is the *sparse group lasso*: with
    the same matrix under `Channels`, the two proximal steps one after the other are exactly its proximal map (see
    `sparse_group_lasso`). Needs a strength; not together with a budget.

    Args: as of `LowRank`.
    """

    strength: float
    penalty: Penalty = field(default_factory=L1)
    scale: str = "relative"
    include: str | tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_options(self)

    def values(self, site: Weight) -> Tensor:
        """Magnitudes, in the shape of the weight."""
        return site.weights[0].detach().abs()

    @torch.no_grad()
    def shrink(self, site: Weight, tau: float) -> Shrinkage:
        """The proximal step on all entries, in place."""
        weight = site.weights[0]
        magnitudes = weight.detach().abs().double()
        if not bool(torch.isfinite(magnitudes).all()):
            raise NonFiniteError(
                f"{site.path} holds NaN or Inf: nothing was changed; look for a diverging loss or a learning rate that is too high"
            )
        unit = (float(magnitudes.square().mean().sqrt()) or 1.0) if self.scale == "relative" else 1.0
        shrunk = InUnits(self.penalty, unit).prox(magnitudes.flatten(), tau * unit).reshape(weight.shape)
        weight.copy_(weight.sign() * shrunk.to(weight.dtype))
        return Shrinkage(shrunk.flatten(), int((shrunk > 0).sum()), "entries", ())


def sparse_group_lasso(strength: float, alpha: float, **options: Any) -> list[Structure]:
    r"""The regularizer of Alvarez & Salzmann 2016: :math:`\sum_l (1 - \alpha) \lambda \sqrt{P_l} \sum_u \|\theta_u\|_2 + \alpha \lambda \|\theta\|_1`.

    Args:
        strength: :math:`\lambda`; alpha: between 0 (group lasso) and 1 (lasso).
        options: of both, such as `exclude=`.
    """
    if not 0 <= alpha <= 1:
        raise InvalidValueError(f"alpha = {alpha}: a mix between 0 (group lasso) and 1 (lasso)")
    return [
        Entries(strength=alpha * strength, scale="absolute", **options),
        Channels.as_published((1 - alpha) * strength, **options),
    ]


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
        _check_options(self)
        _check_multiple("rank_multiple", self.rank_multiple)
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


@dataclass(slots=True)
class WideLayer:
    """A layer whose cost depends on how many channels it puts out and takes in.

    Attributes:
        path: in the model.
        shape: of the weight in the dense model.
        dense: channels that it puts out and takes in in the dense model; out, taken: now.
        site: its weight's, where that may be factorised.
        beside: parameters for each output channel that are under no site: bias, entries of a norm, depthwise kernel.
        weight: parameters of its weight for each pair of channels, where that is under no site; else 0.
        positions: how often a parameter of that weight takes part in a multiplication on the example inputs.
        beside_macs: MACs for each output channel (depthwise kernels).
    """

    path: str
    shape: tuple[int, ...]
    dense: tuple[int, int]
    out: int
    taken: int
    site: Site | None
    beside: float = 0.0
    weight: float = 0.0
    positions: float = 0.0
    beside_macs: float = 0.0

    def params_at(self, out: int, taken: int) -> float:
        """Parameters that are under no site, with these numbers of channels."""
        return self.beside * out + self.weight * out * taken

    def macs_at(self, out: int, taken: int) -> float:
        """MACs of these parameters on the example inputs."""
        return self.beside_macs * out + self.positions * self.weight * out * taken


@dataclass(eq=False, slots=True)
class Neurons:
    """The neurons (filters, hidden units, heads) of a layer under a structure, with everything that is tied to them.

    Attributes:
        structure: what acts on them.
        group: what is tied to what, in the dense model's numbering.
        model: where the layers are looked up: they change when they are cut.
        kept: numbers of the units that are still there, increasing.
    """

    structure: Channels
    group: Group
    model: nn.Module
    kept: NDArray[np.int64]

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """What the penalty acts on: rows and biases of the layers that put the units out."""
        found = []
        for end in self.group.producers:
            last = last_layer(self.model.get_submodule(end.path))
            found += [p for p in (last.weight, last.bias) if p is not None]
        return tuple(found)

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(w).all()) for w in self.weights)

    def channels(self, end: End) -> Tensor:
        """Where the units are now on one side of a layer: `[units, channels of a unit]`."""
        here = channels_kept(self.model.get_submodule(end.path), end.side)
        return torch.from_numpy(np.searchsorted(here, end.index[self.kept]))


@dataclass(frozen=True, kw_only=True)
class Channels:
    r"""Drive whole neurons to zero: a penalty on the norm of each neuron's row of weights and its bias (group lasso).

    After the optimizer's own step, every few steps, for the rows :math:`\theta_u` of a layer

    .. math:: \theta \leftarrow \operatorname{argmin}_x \tfrac12 \sum_u \|x_u - \theta_u\|_2^2 + \tau u_0\, u_0\, h(\|x\| / u_0)

    which shrinks each row by :math:`\operatorname{prox}(\|\theta_u\|) / \|\theta_u\|`. The unit :math:`u_0` is the root mean square
    norm of the layer's rows (`scale="relative"`), or 1 (`"absolute"`, where :math:`\tau` is weighted by the square root of
    a group's size as in Alvarez & Salzmann 2016, *Learning the Number of Neurons in Deep Networks*).

    A neuron that is cut out takes everything with it that is tied to it: norms, columns in every consumer, through
    residual sums, concatenations, depthwise convolutions. What can be cut is found by tracing the model on
    `example_inputs` and verified (see `laconic.graph`).

    Args:
        penalty: on the norms; `L1()` gives the group lasso.
        strength: threshold per unit of learning rate. None: left to the budget.
        scale: `"relative"` or `"absolute"`.
        include, exclude: shell-style patterns on module or parameter names of the layers that put the neurons out.
        multiple: keep a multiple of this number of neurons (what the hardware likes: 8, 16).
    """

    penalty: Penalty = field(default_factory=LogSum)
    strength: float | None = None
    scale: str = "relative"
    include: str | tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    multiple: int = 1

    def __post_init__(self) -> None:
        _check_options(self)
        _check_multiple("multiple", self.multiple)

    @classmethod
    def as_published(cls, strength: float, **options: Any) -> Channels:
        """Alvarez & Salzmann 2016: group lasso, absolute threshold weighted by the square root of a group's size."""
        published: dict[str, Any] = {"penalty": L1(), "strength": strength, "scale": "absolute"}
        return cls(**published | options)

    def values(self, site: Neurons) -> Tensor:
        """Norm of each unit that is there, float64 on CPU: over its rows in every producer, and its biases."""
        total = torch.zeros(len(site.kept), dtype=torch.float64)
        for end in site.group.producers:
            module = site.model.get_submodule(end.path)
            energy = slice_energies(module, "out")
            bias = last_layer(module).bias
            if bias is not None:
                energy = energy + bias.detach().double().cpu().square()
            total += energy[site.channels(end)].sum(1)
        return total.sqrt()

    @torch.no_grad()
    def shrink(self, site: Neurons, tau: float) -> Shrinkage:
        """The proximal step on the rows of all units, in place."""
        norms = self.values(site)
        if not bool(torch.isfinite(norms).all()):
            raise NonFiniteError(
                f"{site.name} holds NaN or Inf: nothing was changed; look for a diverging loss or a learning rate that is too high"
            )
        relative = self.scale == "relative"
        unit = (float(norms.square().mean().sqrt()) or 1.0) if relative else 1.0
        size = sum(w.numel() for w in site.weights) / len(site.kept)
        shrunk = InUnits(self.penalty, unit).prox(norms, tau * unit * (1.0 if relative else math.sqrt(size)))
        factors = torch.where(norms > 0, shrunk / norms.clamp_min(math.ulp(0.0)), torch.ones_like(norms))
        for end in site.group.producers:
            module = site.model.get_submodule(end.path)
            last = last_layer(module)
            index = site.channels(end)
            scale = torch.ones(width(last, "out"), dtype=torch.float64)
            scale[index] = factors[:, None].expand(index.shape)
            axis = 1 if present_unfolding(last).name in ("in,out", "in,out*k") else 0
            shape = [-1 if d == axis else 1 for d in range(last.weight.ndim)]
            last.weight.mul_(scale.to(last.weight.device, last.weight.dtype).reshape(shape))
            if last.bias is not None:
                last.bias.mul_(scale.to(last.bias.device, last.bias.dtype))
        return Shrinkage(shrunk, int((shrunk > 0).sum()), "group", ())

    def importance(self, site: Neurons, variances: dict[str, Tensor] | None = None) -> NDArray[np.float64]:
        r"""What the consumers would lose of their input, a share for each unit that is there (float64, sums to 1).

        :math:`\sum_c \|W_{c,u}\|_2^2 v_u`, with `variances` of the consumers' inputs by path; where they are unknown, the
        squared norm of the unit's own row (or the norm's scale behind it) stands for them.
        """
        total = torch.zeros(len(site.kept), dtype=torch.float64)
        spread = self.values(site).square()
        norms = [site.model.get_submodule(e.path) for e in site.group.carriers]
        scales = [m.weight.detach().double().cpu().square() for m in norms if isinstance(m, NORMS) and m.weight is not None]
        ends = [e for e, m in zip(site.group.carriers, norms, strict=True) if isinstance(m, NORMS) and m.weight is not None]
        if scales:
            spread = sum((s[site.channels(e)].mean(1) for s, e in zip(scales, ends, strict=True)), torch.zeros_like(total))
        for end in site.group.consumers:
            energy = slice_energies(site.model.get_submodule(end.path), "in")
            index = site.channels(end)
            known = (variances or {}).get(end.path)
            weight = energy[index] * (known[index] if known is not None else spread[:, None])
            total += weight.sum(1)
        return (total / total.sum().clamp_min(math.ulp(0.0))).numpy()


def last_layer(module: Layer) -> Layer:
    """The layer that puts the channels out: the module, or the second of a pair."""
    return module[1] if hasattr(module, MARK) else module


def present_unfolding(module: Layer) -> Unfolding:
    """The (first) unfolding of the weight that a layer has, or that a pair stands for, with the channels it has now."""
    mark = getattr(module, MARK, None)
    if mark is None:
        return unfoldings(module)[0]
    return unfolding_named(mark["unfolding"], tuple(mark["shape"]), getattr(module[0], "groups", 1))


def slice_energies(module: Layer, side: str) -> Tensor:
    """Squared norm of the weight's slice of each channel on one side, float64 on CPU; of a pair that of its product."""
    unfolding = present_unfolding(module)
    weight = product(module, unfolding) if hasattr(module, MARK) else module.weight.detach().double()
    energy = weight.square().flatten(2).sum(2) if weight.ndim > 2 else weight.square()
    out_first = unfolding.name not in ("in,out", "in,out*k")
    if (side == "out") is out_first:
        return energy.sum(1).cpu()
    return energy.unflatten(0, (unfolding.groups, -1)).sum(1).flatten().cpu()  # each group has inputs of its own


def _check_options(structure: LowRank | Channels | Entries) -> None:
    """What all structures have in common."""
    for name in ("include", "exclude"):
        value = getattr(structure, name)
        object.__setattr__(structure, name, (value,) if isinstance(value, str) else tuple(value))
    if not isinstance(structure.penalty, Penalty):
        raise InvalidTypeError(f"penalty = {structure.penalty!r}: expected an object with value, prox and cutoff, such as laconic.LogSum()")
    if structure.strength is not None and not (structure.strength >= 0 and math.isfinite(structure.strength)):
        raise InvalidValueError(f"strength = {structure.strength}: must be finite and at least 0")
    if structure.scale not in SCALES:
        raise InvalidValueError(f"scale = {structure.scale!r} is unknown{nearest(structure.scale, SCALES)}")


def _check_multiple(name: str, value: Any) -> None:
    if not (isinstance(value, int) and value >= 1):
        raise InvalidValueError(f"{name} = {value!r}: must be a whole number, at least 1")


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


Structure = LowRank | Channels | Entries


def shrink(site: Site | Neurons | Weight, tau: float) -> Shrinkage:
    """The proximal step of whatever structure acts there."""
    structure: Any = site.structure
    result: Shrinkage = structure.shrink(site, tau)
    return result
