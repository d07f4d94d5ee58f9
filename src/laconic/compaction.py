"""Cut a model to given ranks: build, verify, swap, re-estimate; all of it or nothing.

Shared by `Compressor.compact` (after training under pressure), its cut in mid-run, and `laconic.compress` (post hoc).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .allocate import Floats, energy_rule, log_shares
from .budget import Budget, ranks_for_budget
from .errors import InfeasibleBudgetError, InvalidValueError, NonFiniteError, SurgeryError
from .matricize import Layer
from .measure import check_inputs, count_macs, count_params, evaluating, input_shapes, measure_latency
from .penalties import check_share
from .plan import Plan, check_structures, make_plan
from .report import CompactReport, LayerReport
from .structures import LowRank, Site
from .surgery.batchnorm import batch_norms, reestimate
from .surgery.factorize import MARK
from .surgery.optimizer import carry, unknown_state
from .surgery.record import put, undo

Ranks = dict[str, int | None]


@dataclasses.dataclass(slots=True)
class CutResult:
    """What a cut did; `timings` (dense ms, cut ms) and `errors` by site name."""

    ranks: Ranks
    values: dict[str, Floats]
    errors: dict[str, float]
    max_abs_diff: float | None
    notes: list[str]
    timings: dict[str, tuple[float, float]]


def spectra(plan: Plan) -> dict[str, Floats]:
    """Singular values of every site, float64, non-increasing.

    Raises:
        NonFiniteError: a weight holds NaN or Inf.
    """
    for site in plan.sites:
        if not bool(torch.isfinite(site.weight).all()):
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
    timings: dict[str, tuple[float, float]] | None = None,
) -> CutResult:
    """Cut every site whose rank is a number. On any failure the model and the optimizers are as they were.

    Raises:
        SurgeryError: a pair of layers differs from the truncated layer by more than rounding, or the model no longer
            runs on the example inputs.
    """
    notes: list[str] = []
    ranks = dict(ranks)
    for site in plan.sites:
        for optimizer in optimizers if ranks[site.name] is not None else ():
            entry = unknown_state(optimizer, site.weight)
            if entry is not None:
                ranks[site.name] = None
                notes.append(
                    f"{site.name} stays dense: {type(optimizer).__name__} keeps a state {entry!r} that cannot be carried over a cut"
                )
    inputs = check_inputs(example_inputs) if example_inputs is not None else None
    before = _outputs(model, inputs) if inputs is not None else []

    to_cut = [(site, rank) for site in plan.sites if (rank := ranks[site.name]) is not None]
    pairs = {site.name: site.structure.cut(site, rank) for site, rank in to_cut}
    errors = {site.name: surgery_error(site, pairs[site.name][0]) for site, _ in to_cut}
    for site, _ in to_cut:
        tolerance = 32 * torch.finfo(site.weight.dtype).eps
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
    for site, _ in to_cut:
        for optimizer in optimizers:
            carry(optimizer, site.weight, pairs[site.name][0], site.unfolding)
    return CutResult(ranks, values, errors, _largest_difference(before, after) if inputs is not None else None, notes, timings or {})


def slower_when_cut(
    model: nn.Module, plan: Plan, ranks: Ranks, example_inputs: Any, seconds: float = 0.1
) -> tuple[set[str], dict[str, tuple[float, float]]]:
    """Time every layer that would be cut, dense and cut, on inputs of the shapes it sees.

    Returns the names of those that would not get faster, and all times (dense ms, cut ms).
    """
    to_cut = [(site, rank) for site in plan.sites if (rank := ranks[site.name]) is not None]
    shapes = input_shapes(model, [site.modules[0] for site, _ in to_cut], example_inputs)
    times: dict[str, tuple[float, float]] = {}
    for site, rank in to_cut:
        module = site.modules[0]
        if not shapes[module]:
            continue
        x = (torch.zeros(shapes[module][0], dtype=site.weight.dtype, device=site.weight.device),)
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
    """Largest difference between the pair and the layer with the truncated weight, on noise, relative to the output.

    Both run in float64 with their weights as stored, so that what remains is the rounding of the stored factors.
    """
    module: Layer = copy.deepcopy(site.modules[0]).double()
    u, s, vh = torch.linalg.svd(site.matrix.double(), full_matrices=False)
    rank = pair_rank(pair)
    truncated = site.unfolding.fold((u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :])
    module.weight = nn.Parameter(truncated.to(module.weight.device))
    twin = copy.deepcopy(pair).double()
    x = torch.randn(probe_shape(module), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(module.weight.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        wanted, got = module(x), twin(x)
    scale = float(wanted.abs().max()) or 1.0
    return float((wanted - got).abs().max()) / scale


def pair_rank(pair: nn.Sequential) -> int:
    return int(getattr(pair, MARK)["rank"])


def probe_shape(module: Layer) -> tuple[int, ...]:
    """A small input shape that a layer accepts, wide enough for its kernel, stride and padding to matter."""
    if not hasattr(module, "kernel_size"):
        width = module.nx if hasattr(module, "nx") else getattr(module, "in_features", None)
        return (4, int(width if width is not None else module.weight.shape[0]))
    extents = [d * (k - 1) + 1 + 2 * s for k, s, d in zip(module.kernel_size, module.stride, module.dilation, strict=True)]
    padding = module.padding if not isinstance(module.padding, str) else (0,) * len(extents)
    return (2, module.in_channels, *(max(e, p + 2) for e, p in zip(extents, padding, strict=True)))


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with evaluating(model):
        return [x.detach().clone() for x in tree_leaves(_plain(model(*inputs))) if isinstance(x, Tensor)]


def _plain(output: Any) -> Any:
    """Mappings and dataclass-like model outputs as plain containers that can be walked."""
    return dict(output) if hasattr(output, "keys") else output


def _largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    return max((float((a.double() - b.double()).abs().max()) for a, b in zip(before, after, strict=True) if a.numel()), default=0.0)


def make_report(model: nn.Module, plan: Plan, cuts: Sequence[CutResult], example_inputs: Any, **extra: Any) -> CompactReport:
    """The report on everything that was cut so far."""
    ranks: Ranks = {site.name: None for site in plan.sites}
    values: dict[str, Floats] = {}
    errors: dict[str, float] = {}
    timings: dict[str, tuple[float, float]] = {}
    notes: list[str] = []
    for cut in cuts:
        ranks |= {k: v for k, v in cut.ranks.items() if v is not None}
        values = cut.values | values
        errors |= cut.errors
        timings |= cut.timings
        notes += cut.notes
    layers = []
    for site in plan.sites:
        u, rank = site.unfolding, ranks[site.name]
        spectrum = values.get(site.name)
        energy = float(torch.tensor(log_shares(spectrum)[rank - 1]).exp()) if rank is not None and spectrum is not None else 1.0
        ms = timings.get(site.name, (None, None))
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
                energy=energy,
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
        max_abs_diff=cuts[-1].max_abs_diff if cuts else (0.0 if example_inputs is not None else None),
        surgery_error=max(errors.values(), default=0.0),
        layers=tuple(layers),
        **{"notes": tuple(notes), **extra},
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

    def choose(keep_dense: frozenset[str]) -> Ranks:
        if budget is not None:
            return ranks_for_budget(plan, values, budget, keep_dense)
        assert energy is not None
        return {n: None if n in keep_dense else r for n, r in energy_ranks(plan, values, energy).items()}

    ranks, times, notes = choose_ranks(model, plan, values, choose, only_faster, example_inputs)
    result = cut_sites(model, plan, values, ranks, example_inputs=example_inputs, calibration=calibration, timings=times)
    result.notes[:0] = notes
    return make_report(model, plan, [result], example_inputs)
