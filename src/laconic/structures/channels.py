"""Neurons: a penalty on the norm of the row of weights that puts each one out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..checks import check_finite, whole_number
from ..errors import InvalidTypeError
from ..matricize import INPUTS_FIRST, Layer, Unfolding, inputs_first, unfolding_named, unfoldings
from ..penalties import L1, LogSum, Penalty
from ..surgery.basis import Heads, Stream
from ..surgery.channels import NORMS, SIDES, End, Group, channels_kept, is_layer_norm, width
from ..surgery.factorize import MARK, plain_layers, product
from .base import InUnits, Shrinkage, check_options, root_mean_square
from .low_rank import Site

ROWS = 256  # of a weight, at a time
SILENT = 1e-12  # share of a unit that is alive, where its consumers were not seen to receive anything that varies


@dataclass(slots=True)
class WideLayer:
    """A layer whose cost depends on how many channels it puts out and takes in.

    Attributes:
        path: in the model; side: `"out"`, or the name of a parameter or buffer of the model's own (see `surgery.channels.End`), which is a layer here.
        shape: of the weight in the dense model.
        dense: channels that it puts out and takes in in the dense model; out, taken: now.
        site: its weight's, where that may be factorised.
        beside: parameters for each output channel that are under no site: bias, entries of a norm, depthwise kernel.
        weight: parameters of its weight for each pair of channels, where that is under no site; else 0.
        positions: how often a parameter of that weight takes part in a multiplication on the example inputs.
        beside_macs: MACs for each output channel (depthwise kernels).
        beside_ms, weight_ms: measured milliseconds that are under no site, for each output channel (norms, depthwise, activations behind it), or for each
            pair of channels.
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
    beside_ms: float = 0.0
    weight_ms: float = 0.0
    side: str = "out"

    @property
    def own(self) -> bool:
        """Is it a parameter or buffer of the model's own?"""
        return self.side not in SIDES

    @property
    def name(self) -> str:
        """Its path, or the whole name of the model's own parameter."""
        return self.tensor if self.own else self.path

    @property
    def tensor(self) -> str:
        """The name of its weight, or of the model's own parameter."""
        return f"{self.path}.{self.side if self.own else 'weight'}".lstrip(".")

    def params_at(self, out: int, taken: int) -> float:
        """Parameters that are under no site, with these numbers of channels."""
        return self.beside * out + self.weight * out * taken

    def macs_at(self, out: int, taken: int) -> float:
        """MACs of these parameters on the example inputs."""
        return self.beside_macs * out + self.positions * self.weight * out * taken

    def ms_at(self, out: int, taken: int) -> float:
        """Milliseconds of the layer, where it is under no site and was measured: taken to change as its parameters do."""
        return self.beside_ms * out + self.weight_ms * out * taken


@dataclass(eq=False, slots=True)
class Neurons:
    """The neurons (filters, hidden units, heads) of a layer under a structure, with everything that is tied to them.

    Attributes:
        structure: what acts on them.
        group: what is tied to what, in the dense model's numbering.
        model: where the layers are looked up: they change when they are cut.
        kept: numbers of the units that are still there, increasing.
        basis: what is needed to turn their basis, where that is free.
    """

    structure: Channels
    group: Group
    model: nn.Module
    kept: NDArray[np.int64]
    basis: Stream | Heads | None = None

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def producers(self) -> list[tuple[End, Layer]]:
        """The layers that put the units out; of tables that share a weight the first."""
        found: dict[int, tuple[End, Layer]] = {}
        for end in self.group.producers:
            module = self.model.get_submodule(end.path)
            found.setdefault(id(plain_layers(module)[-1].weight), (end, module))
        return list(found.values())

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """What the penalty acts on: rows and biases of the layers that put the units out."""
        layers = [plain_layers(module)[-1] for _, module in self.producers]
        return tuple(p for last in layers for p in (last.weight, getattr(last, "bias", None)) if p is not None)

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(w).all()) for w in self.weights)

    @property
    def norms(self) -> tuple[End, ...]:
        """Where LayerNorm takes its statistics over the units. So it is with the residual stream of a transformer, which every block reads and adds to."""
        return tuple(end for end in self.group.carriers if is_layer_norm(self.model.get_submodule(end.path)))

    @property
    def of_heads(self) -> bool:
        return self.group.of_heads

    @property
    def kind(self) -> str:
        """What a unit is, in the plural."""
        if len(self.norms) > 1:
            return "channels of the stream"
        return "dimensions of each head" if self.group.queries else "heads" if self.of_heads else "units"

    @property
    def multiple(self) -> int:
        """Of how many units the structure keeps a multiple: its own number counts channels, of which a unit (a head) may have several. Of places within
        heads it counts places: kernels of attention care how wide a head is."""
        multiple = self.structure.multiple or 1
        if self.group.queries:
            return multiple
        of_unit = math.gcd(*(end.index.shape[1] for end in self.group.producers))
        return multiple // math.gcd(multiple, of_unit)

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
        multiple: keep a multiple of this number of channels (what the hardware likes: 8, 16); an attention head of 64 is one already, one that gets
            narrower keeps a multiple of its places. None: 1, and with `even` 8, or less for what is narrow, or where 8 is too coarse
            for the budget (see `laconic.widths.narrowed`).
        optional: beside `LowRank`, under a budget in parameters alone: at the first proximal step all these neurons are left alone for the
            whole run, unless ranks alone would keep less of the network (see `laconic.budget.needless`).
        even: every group keeps the same part of its neurons, so that the network is the dense one made narrower: their importance says which
            go, not how many (see `laconic.widths.narrowed`). Without `LowRank` beside it, and for all groups or none.
        principal: with `even`, where the basis of channels is free (a residual stream, the places within attention heads), it is turned before some go,
            so that those which stay hold most (see `laconic.axes`), and nothing presses them; False (and `compress` without `calibration`): channels as they are, and whole heads.
    """

    penalty: Penalty = field(default_factory=LogSum)
    strength: float | None = None
    scale: str = "relative"
    include: str | tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    multiple: int | None = None
    optional: bool = False
    even: bool = False
    principal: bool = True

    def __post_init__(self) -> None:
        check_options(self)
        if self.multiple is not None or not self.even:
            object.__setattr__(self, "multiple", whole_number("multiple", 1 if self.multiple is None else self.multiple, least=1))
        for name in ("optional", "even", "principal"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidTypeError(f"{name} = {getattr(self, name)!r}: expected True or False")

    @classmethod
    def as_published(cls, strength: float, **options: Any) -> Channels:
        """Alvarez & Salzmann 2016: group lasso, absolute threshold weighted by the square root of a group's size."""
        published: dict[str, Any] = {"penalty": L1(), "strength": strength, "scale": "absolute"}
        return cls(**published | options)

    def values(self, site: Neurons) -> Tensor:
        """Norm of each unit that is there, float64 on CPU: over its rows in every producer, and its biases."""
        total = torch.zeros(len(site.kept), dtype=torch.float64, device="cpu")
        for end, module in site.producers:
            energy = slice_energies(module, "out")
            bias = getattr(plain_layers(module)[-1], "bias", None)  # a table has none
            if bias is not None:
                energy = energy + bias.detach().double().cpu().square()
            total += energy[site.channels(end)].sum(1)
        return total.sqrt()

    @torch.no_grad()
    def shrink(self, site: Neurons, tau: float) -> Shrinkage:
        """The proximal step on the rows of all units, in place."""
        norms = self.values(site)
        check_finite(norms, site.name)
        relative = self.scale == "relative"
        unit = root_mean_square(norms) if relative else 1.0
        size = sum(w.numel() for w in site.weights) / len(site.kept)
        shrunk = InUnits(self.penalty, unit).prox(norms, tau * unit * (1.0 if relative else math.sqrt(size)))
        factors = torch.where(norms > 0, shrunk / norms.clamp_min(math.ulp(0.0)), torch.ones_like(norms))
        for end, module in site.producers:
            last = plain_layers(module)[-1]
            index = site.channels(end)
            scale = torch.ones(width(last, "out"), dtype=torch.float64, device="cpu")
            scale[index] = factors[:, None].expand(index.shape)
            axis = 1 if inputs_first(last) else 0
            shape = [-1 if d == axis else 1 for d in range(last.weight.ndim)]
            last.weight.mul_(scale.to(last.weight.device, last.weight.dtype).reshape(shape))
            if getattr(last, "bias", None) is not None:
                last.bias.mul_(scale.to(last.bias.device, last.bias.dtype))
        return Shrinkage(shrunk, int((shrunk > 0).sum()), "group", ())

    def importance(self, site: Neurons, variances: dict[str, Tensor] | None = None) -> NDArray[np.float64]:
        r"""What the consumers would lose of their input, a share for each unit that is there (float64, sums to 1).

        :math:`\sum_c \|W_{c,u}\|_2^2 v_u`, with `variances` of the consumers' inputs by path; where they are unknown, the
        squared norm of the unit's own row (or the norm's scale behind it) stands for them. Of a residual stream, which many layers read, each
        reader's share counts the same. Only a unit whose own row is zero counts nothing at all.
        """
        total = torch.zeros(len(site.kept), dtype=torch.float64, device="cpu")
        spread = self.values(site).square()
        dead = spread == 0
        if any(end.own for end in site.group.carriers):  # which may bring in something by itself
            dead = torch.zeros_like(dead)
        norms = [site.model.get_submodule(e.path) for e in site.group.carriers]
        scales = [m.weight.detach().double().cpu().square() for m in norms if isinstance(m, NORMS) and m.weight is not None]
        ends = [e for e, m in zip(site.group.carriers, norms, strict=True) if isinstance(m, NORMS) and m.weight is not None]
        if scales:
            spread = sum((s[site.channels(e)].mean(1) for s, e in zip(scales, ends, strict=True)), torch.zeros_like(total))
        for end in site.group.consumers:
            energy = slice_energies(site.model.get_submodule(end.path), "in")
            index = site.channels(end)
            known = (variances or {}).get(end.path)
            weight = (energy[index] * (known[index] if known is not None else spread[:, None])).sum(1)
            total += weight / weight.sum().clamp_min(math.ulp(0.0)) if site.norms else weight
        total = total.clamp_min(SILENT * float(total.sum())).masked_fill(dead, 0.0)
        return (total / total.sum().clamp_min(math.ulp(0.0))).numpy()


def present_unfolding(module: Layer) -> Unfolding:
    """The (first) unfolding of the weight that a layer has, or that a pair stands for, with the channels it has now."""
    mark = getattr(module, MARK, None)
    if isinstance(module, nn.Embedding):
        return unfolding_named("entry,out", tuple(module.weight.shape))
    if mark is None:
        return unfoldings(module)[0]
    return unfolding_named(mark["unfolding"], tuple(mark["shape"]), getattr(module[0], "groups", 1))


def slice_energies(module: Layer, side: str) -> Tensor:
    """Squared norm of the weight's slice of each channel on one side, float64 on CPU; of a pair that of its product."""
    unfolding = present_unfolding(module)
    weight = product(module, unfolding) if hasattr(module, MARK) else module.weight.detach()
    by_group = weight.unflatten(0, (unfolding.groups, -1)).flatten(3 if weight.ndim > 2 else 2)  # each has inputs of its own
    out_first = unfolding.name not in INPUTS_FIRST
    rows, columns = [], []
    for part in by_group.split(ROWS, 1):  # a float64 copy of the whole weight would be the largest thing in memory
        energy = part.double().square()
        energy = energy.sum(3) if energy.ndim > 3 else energy
        rows.append(energy.sum(2))
        columns.append(energy.sum(1))
    return (torch.cat(rows, 1) if (side == "out") is out_first else torch.stack(columns).sum(0)).flatten().cpu()
