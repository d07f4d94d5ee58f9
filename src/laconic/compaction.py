"""Cut a model to given ranks: build, verify, swap, re-estimate; all of it or nothing.

Shared by `Compressor.compact` (after training under pressure), its cut in mid-run, and `laconic.compress` (post hoc).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .allocate import Floats, energy_rule, log_shares
from .budget import Budget, prepare, ranks_for_budget
from .costs import Ranks
from .errors import InfeasibleBudgetError, InvalidValueError, NonFiniteError, SurgeryError
from .matricize import Layer
from .measure import check_inputs, count_macs, count_params, evaluating, input_shapes, measure_latency
from .penalties import check_share
from .plan import Plan, check_structures, make_plan
from .report import CompactReport, LayerReport
from .structures import LowRank, Site
from .surgery.batchnorm import batch_norms, reestimate
from .surgery.factorize import pair_matrices, pair_weights
from .surgery.factorize import weights as pair_parameters
from .surgery.optimizer import carry, unknown_state
from .surgery.record import put, undo


@dataclasses.dataclass(slots=True)
class CutResult:
    """What the cuts of a run did so far, by site name.

    Attributes:
        ranks: of the sites that were cut.
        values: singular values just before a site's last cut; of sites that stayed dense, where known.
        energies: share of the squared singular values that a site's cuts have kept, multiplied up.
        errors: largest `surgery_error` of a site's cuts.
        timings: (dense ms, cut ms), where measured.
        max_abs_diff: largest change of an output by a single round of cuts; None without example inputs.
    """

    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    values: dict[str, Floats] = dataclasses.field(default_factory=dict)
    energies: dict[str, float] = dataclasses.field(default_factory=dict)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    timings: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    max_abs_diff: float | None = None

    def add(self, later: CutResult) -> None:
        """Take in the next round of cuts."""
        for name, energy in later.energies.items():
            self.energies[name] = self.energies.get(name, 1.0) * energy
        for name, error in later.errors.items():
            self.errors[name] = max(self.errors.get(name, 0.0), error)
        self.ranks |= later.ranks
        self.values |= {name: v for name, v in later.values.items() if name in later.ranks or name not in self.ranks}
        self.timings |= later.timings
        self.notes += [note for note in later.notes if note not in self.notes]
        if later.max_abs_diff is not None:
            self.max_abs_diff = max(later.max_abs_diff, self.max_abs_diff or 0.0)


def spectra(plan: Plan) -> dict[str, Floats]:
    """Singular values of every site, float64, non-increasing.

    Raises:
        NonFiniteError: a weight holds NaN or Inf.
    """
    for site in plan.sites:
        if not site.finite:
            raise NonFiniteError(f"{site.name} holds NaN or Inf: load the last good checkpoint of the model")
    return {site.name: site.structure.values(site).numpy() for site in plan.sites}


def energy_ranks(plan: Plan, values: dict[str, Floats], share: float) -> Ranks:
    """The per-layer energy rule, with the break-even guard: above it a layer stays dense."""
    check_share(share)
    return {site.name: guarded(site, energy_rule(values[site.name], share)) for site in plan.sites}


def guarded(site: Site, rank: int) -> int | None:
    """`rank` rounded up to the structure's multiple; None (dense) where that would not be smaller."""
    multiple = site.structure.rank_multiple
    rank = -(-rank // multiple) * multiple
    return rank if rank <= site.break_even else None


def cut_sites(
    model: nn.Module,
    plan: Plan,
    values: dict[str, Floats],
    ranks: Ranks,
    *,
    example_inputs: Any = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    calibration: Iterable[Any] | None = None,
) -> CutResult:
    """Cut every site whose rank is a number below its own. On any failure model, plan and optimizers are as they were.

    Raises:
        SurgeryError: a pair of layers differs from the truncated layer by more than rounding, the model no longer
            runs on the example inputs, or a layer is no longer the one that was planned.
    """
    notes: list[str] = []
    inputs = check_inputs(example_inputs) if example_inputs is not None else None
    before = _outputs(model, inputs) if inputs is not None else []

    to_cut = [(site, rank) for site in plan.sites if (rank := ranks[site.name]) is not None and rank != site.rank]
    for site, _ in to_cut:
        check_in_place(model, site)
    pairs = {site.name: site.structure.cut(site, rank) for site, rank in to_cut}
    errors = {site.name: surgery_error(site, pairs[site.name][0]) for site, _ in to_cut}
    for site, _ in to_cut:
        tolerance = 32 * torch.finfo(site.dtype).eps
        if not errors[site.name] <= tolerance:
            raise SurgeryError(
                f"{site.layer}: the factors differ from the truncated layer by {errors[site.name]:.2g} (relative), more than rounding ({tolerance:.2g}); the model was left as it was"
            )

    done: list[tuple[str, nn.Module]] = []
    hint = "exclude the layer that something reads directly: LowRank(exclude=...)"
    try:
        for site, _ in to_cut:
            for pair, paths in zip(pairs[site.name], site.paths, strict=True):
                done.extend((path, put(model, path, pair)) for path in paths)
        after = _outputs(model, inputs) if inputs is not None else []
        if calibration is not None:
            hint = "check that every batch of calibration is what the model takes: a tensor, or a tuple of its positional arguments"
            batches = reestimate(model, calibration)
            notes.append(
                f"BatchNorm statistics re-estimated on {batches} batches"
                if batches
                else "calibration had no effect: the model has no BatchNorm with running statistics"
            )
            if batches and inputs is not None:
                after = _outputs(model, inputs)
    except BaseException as error:
        undo(model, done)
        if isinstance(error, InvalidValueError) or not isinstance(error, Exception):
            raise
        what = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise SurgeryError(f"the model no longer runs after the cut ({what}); it was left as it was; {hint}") from error
    if calibration is None and to_cut and batch_norms(model) and not optimizers:
        notes.append("BatchNorm statistics are those of the uncut model: pass calibration= (an iterable of inputs) to re-estimate them")
    for site, rank in to_cut:
        accept(site, rank, pairs[site.name], optimizers)
    kept = {site.name: math.exp(log_shares(values[site.name])[rank - 1]) for site, rank in to_cut}
    difference = _largest_difference(before, after) if inputs is not None else None
    return CutResult({site.name: rank for site, rank in to_cut}, values, kept, errors, {}, notes, difference)


def check_in_place(model: nn.Module, site: Site) -> None:
    """A layer that the user has replaced or removed in mid-run must not be overwritten."""
    for module, paths in zip(site.modules, site.paths, strict=True):
        for path in paths:
            try:
                same = model.get_submodule(path) is module
            except AttributeError:
                same = False
            if not same:
                raise SurgeryError(
                    f"{path} is no longer the layer that was planned (replaced or removed since): build a new Compressor after changing the model"
                )


def accept(site: Site, rank: int, pairs: Sequence[nn.Sequential], optimizers: Sequence[Any]) -> None:
    """The pairs are in the model: hand them the optimizers' state, and let go of what they replace."""
    for optimizer in optimizers:
        carry(optimizer, site.weights, pairs[0], site.unfolding)
    site.modules, site.rank = tuple(pairs), rank


def replay_cuts(model: nn.Module, plan: Plan, ranks: dict[str, int], optimizers: Sequence[Any]) -> None:
    """The same cuts on a fresh dense model and its optimizers; the values are loaded afterwards."""
    for site in plan.sites:
        if site.name in ranks:
            pairs = site.structure.cut(site, ranks[site.name])
            for pair, paths in zip(pairs, site.paths, strict=True):
                for path in paths:
                    put(model, path, pair)
            accept(site, ranks[site.name], pairs, optimizers)


def not_carried(plan: Plan, optimizers: Sequence[Any]) -> dict[str, str]:
    """Sites whose optimizer state has an entry that cannot be carried over a cut, each with the reason."""
    found: dict[str, str] = {}
    for site in plan.sites:
        for optimizer in optimizers:
            entry = next((e for w in site.weights if (e := unknown_state(optimizer, w)) is not None), None)
            if entry is not None:
                found[site.name] = f"{type(optimizer).__name__} keeps a state {entry!r} that cannot be carried over a cut"
    return found


def slower_when_cut(
    model: nn.Module, plan: Plan, ranks: Ranks, example_inputs: Any, seconds: float = 0.1
) -> tuple[set[str], dict[str, tuple[float, float]]]:
    """Time every layer that would be cut, dense and cut, on inputs of the shapes it sees.

    Returns the names of those that would not get faster, and all times (dense ms, cut ms).
    """
    to_cut = [(site, rank) for site in plan.sites if (rank := ranks[site.name]) is not None and site.rank is None]
    shapes = input_shapes(model, [site.modules[0] for site, _ in to_cut], example_inputs)
    times: dict[str, tuple[float, float]] = {}
    for site, rank in to_cut:
        module = site.modules[0]
        if not shapes[module]:
            continue
        x = (torch.zeros(shapes[module][0], dtype=site.dtype, device=site.weights[0].device),)
        pair = site.structure.cut(site, rank)[0]
        times[site.name] = (measure_latency(module, x, seconds).median_ms, measure_latency(pair, x, seconds).median_ms)
    return {name for name, (dense, cut) in times.items() if cut >= dense}, times


def choose_ranks(
    model: nn.Module,
    plan: Plan,
    values: dict[str, Floats],
    choose: Callable[[frozenset[str]], Ranks],
    only_faster: bool,
    example_inputs: Any,
) -> tuple[Ranks, dict[str, tuple[float, float]], list[str]]:
    """Ranks from `choose(names kept dense)`; with `only_faster`, layers that measure slower are kept dense, if they can be."""
    ranks = choose(frozenset())
    if not only_faster:
        return ranks, {}, []
    if example_inputs is None:
        raise InvalidValueError("only_faster=True needs example_inputs=(...), to time the layers on")
    kept: frozenset[str] = frozenset()
    times: dict[str, tuple[float, float]] = {}
    for _ in range(len(plan.sites)):
        slower, measured = slower_when_cut(model, plan, ranks, example_inputs)
        times |= measured
        if not slower:
            break
        try:
            ranks = choose(kept | slower)
        except InfeasibleBudgetError:
            names = ", ".join(sorted(slower))
            return ranks, times, [f"cut although not faster, because the budget needs it: {names}"]
        kept |= slower
    times = {name: t for name, t in times.items() if ranks[name] is not None}
    return ranks, times, [f"{name} stays dense: cut, it measured no faster" for name in sorted(kept)]


def surgery_error(site: Site, pair: nn.Sequential) -> float:
    """How far a pair is from the layer with the truncated weight: the larger of two relative errors, both rounding.

    - The pair's output on noise against that of the layer (or of the wider pair) with the weight that the pair stands for.
    - That weight against a truncation of the old one: what was cut off, R, is orthogonal to what was kept, P Q, on both
      sides: :math:`P^T R = 0` and :math:`R Q^T = 0`.

    All in float64 with the weights as stored, so that what remains is the rounding of the stored factors.
    """
    left, right = pair_matrices(site.unfolding, *(w.detach().double() for w in pair_parameters(pair)))
    if site.rank is None:
        old = site.matrix.to(torch.float64, copy=True)
    else:
        wide_left, wide_right = (f.double() for f in site.factors)
        old = wide_left @ wide_right
    size = torch.linalg.vector_norm(old) or torch.ones(())
    rest = old.sub_(left @ right)
    slanted = max(
        float(torch.linalg.vector_norm(left.mT @ rest) / (size * torch.linalg.vector_norm(left)).clamp_min(math.ulp(0.0))),
        float(torch.linalg.vector_norm(rest @ right.mT) / (size * torch.linalg.vector_norm(right)).clamp_min(math.ulp(0.0))),
    )
    del old, rest  # as large as the layer, twice as wide
    module: Layer
    if site.rank is None:
        module = copy.copy(site.modules[0])
        module._parameters = {
            k: None if p is None else nn.Parameter(p.detach().double()) for k, p in module._parameters.items() if k != "weight"
        }
        module.weight = nn.Parameter(site.unfolding.fold(left @ right).to(site.weights[0].device))
    else:
        module = copy.deepcopy(site.modules[0]).double()
        gap = site.rank - left.shape[-1]
        padded = F.pad(left, (0, gap)), F.pad(right, (0, 0, 0, gap))
        for layer, weight in zip(module, pair_weights(site.unfolding, *padded), strict=True):
            layer.weight = nn.Parameter(weight.to(layer.weight.device))
    twin = copy.deepcopy(pair).double()
    probe = probe_shape([module] if site.rank is None else module)
    x = torch.randn(probe, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(site.weights[0].device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        wanted, got = module(x), twin(x)
    scale = float(wanted.abs().max()) or 1.0
    return max(float((wanted - got).abs().max()) / scale, slanted)


def probe_shape(layers: Iterable[Layer]) -> tuple[int, ...]:
    """A small input shape that a chain of layers accepts, wide enough for kernels, strides and paddings to matter."""
    layers = list(layers)
    first = layers[0]
    if not hasattr(first, "kernel_size"):
        width = first.nx if hasattr(first, "nx") else getattr(first, "in_features", None)
        return (4, int(width if width is not None else first.weight.shape[0]))
    sides = [0] * len(first.kernel_size)
    for layer in layers:
        padding = layer.padding if not isinstance(layer.padding, str) else (0,) * len(sides)
        extents = [d * (k - 1) + 1 + 2 * s for k, s, d in zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)]
        sides = [max(side, e, p + 2) for side, e, p in zip(sides, extents, padding, strict=True)]
    return (2, first.in_channels, *sides)


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with evaluating(model):
        return [x.detach().clone() for x in tree_leaves(_plain(model(*inputs))) if isinstance(x, Tensor)]


def _plain(output: Any) -> Any:
    """Mappings and dataclass-like model outputs as plain containers that can be walked."""
    return dict(output) if hasattr(output, "keys") else output


def _largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    return max((float((a.double() - b.double()).abs().max()) for a, b in zip(before, after, strict=True) if a.numel()), default=0.0)


def make_report(model: nn.Module, plan: Plan, cuts: CutResult, example_inputs: Any, **extra: Any) -> CompactReport:
    """The report on everything that was cut so far."""
    layers = []
    for site in plan.sites:
        u, rank = site.unfolding, site.rank
        spectrum = cuts.values.get(site.name)
        ms = cuts.timings.get(site.name, (None, None))
        layers.append(
            LayerReport(
                name=site.layer,
                kind=site.kind,
                shape=u.shape,
                rank=rank,
                full_rank=u.full_rank,
                params_before=u.dense_params,
                params_after=u.dense_params if rank is None else rank * u.unit_params,
                macs_before=site.dense_macs,
                macs_after=site.dense_macs if rank is None or site.unit_macs is None else rank * site.unit_macs,
                energy=cuts.energies.get(site.name, 1.0),
                spectrum=tuple(float(f"{v:.6g}") for v in spectrum) if spectrum is not None else (),
                ms_before=ms[0],
                ms_after=ms[1],
                note="" if rank is not None else f"no rank up to {site.break_even}, where two layers stop being smaller, was enough",
            )
        )
    for alone in plan.left_alone:
        size = 1
        for d in alone.shape:
            size *= d
        layers.append(LayerReport(alone.name.rpartition(".")[0] or alone.name, "", alone.shape, None, None, size, size, note=alone.reason))
    return CompactReport(
        params_before=plan.params,
        params_after=count_params(model),
        macs_before=plan.macs,
        macs_after=count_macs(model, example_inputs) if example_inputs is not None else None,
        latency_before=plan.latency_ms,
        latency_after=measure_latency(model, check_inputs(example_inputs)).median_ms if plan.latency_ms is not None else None,
        max_abs_diff=cuts.max_abs_diff,
        surgery_error=max(cuts.errors.values(), default=0.0),
        layers=tuple(layers),
        **{"notes": tuple(cuts.notes), **extra},
    )


def compress(
    model: nn.Module,
    structures: LowRank | Sequence[LowRank] | None = None,
    budget: Budget | None = None,
    *,
    energy: float | None = None,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    only_faster: bool = False,
) -> CompactReport:
    """Cut a trained model as it is, in place, without training.

    Args:
        model: any module; on an error it is left as it was.
        structures: what may be cut; None: `[LowRank()]`.
        budget: ranks are chosen together by the product rule (see `laconic.allocate`).
        energy: instead of a budget, the share of squared singular values that every layer keeps (per-layer rule).
        example_inputs: tuple of positional arguments; needed for MACs, timings and `max_abs_diff`.
        calibration: batches of inputs on which BatchNorm statistics are re-estimated after the cut.
        only_faster: time every layer and leave dense what does not get faster.

    Raises:
        InfeasibleBudgetError, InvalidValueError, NothingToCompressError, PatternError, SurgeryError.
    """
    if (budget is None) == (energy is None):
        raise InvalidValueError("compress needs exactly one of budget=laconic.Budget(...) and energy=0.99")
    plan = make_plan(model, check_structures(structures), example_inputs)
    values = spectra(plan)
    if budget is not None:
        prepare(model, plan, values, budget, example_inputs)

    def choose(keep_dense: frozenset[str]) -> Ranks:
        if budget is not None:
            return ranks_for_budget(plan, values, budget, keep_dense)
        assert energy is not None
        return {n: None if n in keep_dense else r for n, r in energy_ranks(plan, values, energy).items()}

    ranks, times, notes = choose_ranks(model, plan, values, choose, only_faster, example_inputs)
    result = cut_sites(model, plan, values, ranks, example_inputs=example_inputs, calibration=calibration)
    result.timings = times
    result.notes[:0] = notes
    return make_report(model, plan, result, example_inputs)
