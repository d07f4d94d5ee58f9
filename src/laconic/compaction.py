"""Cut a model to given ranks: build, verify, swap, re-estimate; all of it or nothing.

Shared by `Compressor.compact` (after training under pressure), its cut in mid-run, and `laconic.compress` (post hoc).
One cut from the first check to the last, and therefore one long file.
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

from .allocate import Floats, energy_rule, log_shares
from .axes import covariances, turn
from .budget import Budget, needless, no_options, prepare, ranks_for_budget
from .checks import check_module, has_gradient_hooks, hooked
from .costs import Ranks
from .cuts import CutResult, all_or_nothing, check_in_place, hooks_lost, largest_difference, outputs_uncut
from .distributed import bare
from .errors import InfeasibleBudgetError, InvalidTypeError, InvalidValueError, NonFiniteError, SurgeryError, first_line
from .graph import outputs
from .latency import skeleton
from .matricize import Layer, an_input, takes_entries
from .measure import check_inputs, input_shapes, measure_latency
from .outcome import make_report
from .penalties import check_share
from .plan import Plan, check_structures, make_plan
from .refit import refit_layers
from .report import CompactReport
from .slimming import importances_of, slim_neurons, took_out, unseen, watch_inputs
from .solvers.gram import COLUMNS
from .structures import Channels, Entries, Site, Structure
from .surgery.batchnorm import BATCHES, as_batches, batch_norms, reestimate
from .surgery.channels import slim
from .surgery.factorize import pair_matrices, pair_weights
from .surgery.factorize import weights as pair_parameters
from .surgery.optimizer import carry, unknown_state
from .surgery.record import put, undo
from .widths import choose_shapes


def spectra(plan: Plan) -> dict[str, Floats]:
    """Singular values of every site, float64, non-increasing.

    Raises:
        NonFiniteError: a weight holds NaN or Inf.
    """
    for site in plan.sites:
        if not site.finite:
            raise NonFiniteError(f"{site.name} holds NaN or Inf: load the last good checkpoint of the model")
    return {n: v for site in plan.sites for n, v in values_of(site).items()}


def values_of(site: Site) -> dict[str, Floats]:
    """Singular values of a site, and of its inner one."""
    found = {site.name: site.structure.values(site).numpy()}
    return found if site.inner is None else found | {site.inner.name: site.joint_shares.numpy()}


def energy_ranks(plan: Plan, values: dict[str, Floats], share: float) -> Ranks:
    """The per-layer energy rule, with the break-even guard: above it a layer stays dense."""
    check_share(share)
    return {site.name: guarded(site, energy_rule(values[site.name], share)) for site in plan.sites}


def guarded(site: Site, rank: int) -> int | None:
    """`rank` rounded up to the structure's multiple; None (dense) where that would not be smaller."""
    multiple = site.structure.multiple
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
    """Cut every site whose rank is a number below its own, then the inner ones. On any failure model, plan and optimizers are as they were.

    Raises:
        SurgeryError: a pair of layers differs from the truncated layer by more than rounding, the model no longer
            runs on the example inputs, or a layer is no longer the one that was planned.
    """
    inner = {s.name: r for s in plan.inner if (r := ranks.get(s.name)) is not None}
    if not inner:
        return _cut(model, plan.sites, values, ranks, example_inputs, optimizers, calibration)
    with all_or_nothing(model, plan, optimizers):
        result = _cut(model, plan.sites, values, ranks, example_inputs, optimizers, None)
        result.add(_cut(model, plan.inner, values, ranks, example_inputs, optimizers, calibration))
    return result


def _cut(
    model: nn.Module,
    sites: Sequence[Site],
    values: dict[str, Floats],
    ranks: Ranks,
    example_inputs: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    calibration: Iterable[Any] | None,
) -> CutResult:
    inputs = check_inputs(example_inputs, model) if example_inputs is not None else None
    before = outputs_uncut(model, inputs) if inputs is not None else []

    to_cut = [(site, rank) for site in sites if (rank := ranks.get(site.name)) is not None and rank != site.rank]
    for site, _ in to_cut:
        check_in_place(model, site)
    notes = hooks_lost([s.layer for s, _ in to_cut if any(map(hooked, s.modules)) or any(map(has_gradient_hooks, s.weights))])
    pairs = {site.name: site.structure.cut(site, rank) for site, rank in to_cut}
    errors = {site.name: surgery_error(site, pairs[site.name][0]) for site, _ in to_cut}
    for site, _ in to_cut:
        tolerance = 32 * torch.finfo(site.dtype).eps
        if not errors[site.name] <= tolerance:
            raise SurgeryError(
                f"{site.layer}: the factors differ from the truncated layer by {errors[site.name]:.2g} (relative), more than rounding ({tolerance:.2g}); the model was left as it was"
            )

    done: list[tuple[str, nn.Module]] = []
    hint = f"exclude the layer that something reads directly, one of {', '.join(s.layer for s, _ in to_cut)}: LowRank(exclude=...)"
    try:
        for site, _ in to_cut:
            for pair, paths in zip(pairs[site.name], site.paths, strict=True):
                done.extend((path, put(model, path, pair)) for path in paths)
        after = outputs(model, inputs) if inputs is not None else []
        if calibration is not None:
            hint = BATCHES
            batches, missed = reestimate(model, calibration)
            notes.append(
                f"BatchNorm statistics re-estimated on {batches} batches"
                if batches
                else "calibration had no effect: the model has no BatchNorm with running statistics"
            )
            if missed:
                notes.append(f"{', '.join(missed)}: no batch of calibration reaches it; its statistics are as they were before the cut")
            if batches and inputs is not None:
                after = outputs(model, inputs)
    except BaseException as error:
        undo(model, done)
        if isinstance(error, (InvalidTypeError, InvalidValueError)) or not isinstance(error, Exception):
            raise
        what = f"{type(error).__name__}: {first_line(error)}"
        raise SurgeryError(f"the model no longer runs after the cut ({what}); it was left as it was; {hint}") from error
    if calibration is None and to_cut and batch_norms(model) and not optimizers:
        notes.append("BatchNorm statistics are those of the uncut model: pass calibration= (an iterable of inputs) to re-estimate them")
    for site, rank in to_cut:
        accept(site, rank, pairs[site.name], optimizers)
    kept = {site.name: math.exp(_shares(site, values)[rank - 1]) for site, rank in to_cut}
    difference, why = largest_difference(before, after) if inputs is not None else (None, [])
    return CutResult({site.name: rank for site, rank in to_cut}, values, kept, errors, {}, notes + why, difference)


def accept(site: Site, rank: int, pairs: Sequence[nn.Sequential], optimizers: Sequence[Any]) -> None:
    """The pairs are in the model: hand them the optimizers' state, and let go of what they replace."""
    for optimizer in optimizers:
        carry(optimizer, site.weights, pairs[0], site.unfolding)
    site.cut_to(rank, pairs)


def replay_cuts(model: nn.Module, plan: Plan, kept: dict[str, list[int]], ranks: dict[str, int], optimizers: Sequence[Any]) -> None:
    """The same cuts on a fresh dense model and its optimizers; the values are loaded afterwards."""
    slim(model, [g.group for g in plan.neurons], kept, optimizers)
    took_out(model, plan, kept)
    for site in (*plan.sites, *plan.inner):
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
        x = (an_input(module, shapes[module][0]),)
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
    slanted = _slant(site, left, right)
    module: Layer
    if site.rank is None:
        module = copy.copy(site.modules[0])
        module._parameters = {
            k: None if p is None else nn.Parameter(p.detach().double()) for k, p in module._parameters.items() if k != "weight"
        }
        module.weight = nn.Parameter(site.unfolding.fold(left @ right).to(site.weights[0].device))
        del left, right
    else:
        module = copy.deepcopy(site.modules[0]).double()
        gap = site.rank - left.shape[-1]
        padded = F.pad(left, (0, gap)), F.pad(right, (0, 0, 0, gap))
        for layer, weight in zip(module, pair_weights(site.unfolding, *padded), strict=True):
            layer.weight = nn.Parameter(weight.to(layer.weight.device))
    twin = copy.deepcopy(pair).double()
    x = _probe([module] if site.rank is None else list(module)).to(site.weights[0].device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        wanted, got = module(x), twin(x)
    scale = float(wanted.abs().max()) or 1.0
    return max(float((wanted - got).abs().max()) / scale, slanted)


def _slant(site: Site, left: Tensor, right: Tensor) -> float:
    """The larger of `||P^T R|| / (||W|| ||P||)` and `||R Q^T|| / (||W|| ||Q||)`, for `R = W - P Q`, a few columns at a time."""
    wide_left, wide = (None, site.matrix) if site.rank is None else site.factors
    size = across = torch.zeros((), dtype=torch.float64, device=left.device)
    along = torch.zeros_like(left)
    for part, columns in zip(wide.split(COLUMNS, -1), right.split(COLUMNS, -1), strict=True):
        old = part.to(torch.float64, copy=True) if wide_left is None else wide_left.double() @ part.double()
        size = size + torch.linalg.vector_norm(old).square()
        rest = old.baddbmm_(left, columns, alpha=-1)
        across = across + torch.linalg.vector_norm(left.mT @ rest).square()
        along.baddbmm_(rest, columns.mT)
    of_left, of_right = ((size.sqrt() or torch.ones(())) * torch.linalg.vector_norm(x) for x in (left, right))
    least = math.ulp(0.0)
    return max(float(across.sqrt() / of_left.clamp_min(least)), float(torch.linalg.vector_norm(along) / of_right.clamp_min(least)))


def _probe(layers: Sequence[Layer]) -> Tensor:
    """Noise that a chain of layers takes, or entries of a table from its first to its last."""
    if takes_entries(layers[0]):
        return torch.linspace(0, layers[0].num_embeddings - 1, 64).long()
    return torch.randn(probe_shape(layers), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")


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


def _shares(site: Site, values: dict[str, Floats]) -> Floats:
    """Logarithms of what a site keeps at each rank; of an inner one at the rank of the site around it."""
    found = values[site.name]
    return log_shares(found) if found.ndim == 1 else found[site.unfolding.sides[0] - 1]


@torch.inference_mode(False)  # under which new parameters could not be trained
def compress(
    model: nn.Module,
    structures: Structure | Sequence[Structure] | None = None,
    budget: Budget | None = None,
    *,
    energy: float | None = None,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    only_faster: bool = False,
    refit: bool = False,
) -> CompactReport:
    """Cut a trained model as it is, in place, without training.

    Args:
        model: any module, wrapped (DistributedDataParallel, `torch.compile`) or not; on an error it is left as it was.
        structures: what may be cut; None: `[LowRank()]`. Neurons may go too (`Channels()`), but then train on.
        budget: ranks are chosen together by the product rule (see `laconic.allocate`).
        energy: instead of a budget, the share of squared singular values that every layer keeps (per-layer rule).
        example_inputs: tuple of positional arguments, or a dict of arguments by name; needed for MACs, timings and `max_abs_diff`.
        calibration: batches of inputs on which BatchNorm statistics are re-estimated after the cut.
        only_faster: time every layer and leave dense what does not get faster.
        refit: then fit the layers by least squares on `calibration`, some hundred inputs, to what they put out before (see `laconic.refit`).

    Raises:
        InfeasibleBudgetError, InvalidValueError, NothingToCompressError, PatternError, SurgeryError.
    """
    check_module(model)
    if isinstance(structures, Budget) or (budget is not None and not isinstance(budget, Budget)):
        given = structures if isinstance(structures, Budget) else budget
        raise InvalidTypeError(f"compress: {given!r}: expected budget=laconic.Budget(params=0.5), by name")
    if (budget is None) == (energy is None):
        raise InvalidValueError("compress needs exactly one of budget=laconic.Budget(...) and energy=0.99")
    multiple = budget.multiple if isinstance(budget, Budget) else 1
    structures, unasked = check_structures(structures, example_inputs, trains_on=False, multiple=multiple)
    if any(isinstance(s, Entries) for s in structures):
        raise InvalidValueError("Entries acts in training only: leave it out of compress")
    if energy is not None and all(isinstance(s, Channels) for s in structures):
        raise InvalidValueError(
            f"Channels and energy={energy}: neurons are chosen by a budget, so give budget=laconic.Budget(params=0.5); energy is for ranks"
        )
    batches = as_batches(calibration)
    if refit and batches is None:
        raise InvalidValueError("refit=True fits layers on calibration inputs: give calibration=, some batches of inputs")
    model = bare(model)
    blind = batches is None and any(isinstance(s, Channels) and s.even and s.principal for s in structures)
    if blind:  # places within heads that were not turned are worth less than whole heads
        structures = [dataclasses.replace(s, principal=False) if isinstance(s, Channels) else s for s in structures]
    plan = make_plan(model, structures, example_inputs)
    if blind and (turnable := [group.name for group in plan.neurons if group.of_heads or group.norms]):
        unasked.append(
            f"{', '.join(turnable)}: channels go as they are, and heads as a whole: principal axes would need batches of inputs, as calibration="
        )
    values = spectra(plan)
    before = copy.deepcopy(model) if refit else None
    choosing = bool(plan.neurons) and budget is not None
    moments = watch_inputs(model, plan, batches or [example_inputs]) if choosing else {}
    importances = importances_of(plan, moments)
    if budget is not None:
        prepare(model, plan, values, importances, budget, example_inputs)
    dense = skeleton(model) if budget is not None and "latency" in budget.currencies else None
    unasked += no_options(plan, budget)
    if budget is None and plan.neurons:
        unasked.append("Channels has no effect beside energy=: neurons are chosen by a budget")

    def choose(keep_dense: frozenset[str]) -> Ranks:
        if budget is not None:
            return ranks_for_budget(plan, values, budget, keep_dense)
        assert energy is not None
        return {n: None if n in keep_dense else r for n, r in energy_ranks(plan, values, energy).items()}

    if budget is not None:
        plan.forgo(needless(plan, values, importances, budget))
    with all_or_nothing(model, plan):
        result, axes = CutResult(), None
        if budget is not None and plan.neurons:
            walk = choose_shapes(plan, values, importances, budget.currencies, budget.limits(plan))
            means = {path: m.mean for path, m in moments.items()}
            axes = turn(model, plan.neurons, walk.kept(), covariances(model, plan.neurons, batches or []), means, example_inputs)
            before = copy.deepcopy(model) if refit else None
            result = slim_neurons(
                model, plan, importances | axes.shares, axes.kept, example_inputs=example_inputs, means=means, gains=axes.gains
            )
            result.notes += axes.notes
            result.prices = walk.prices()
            values = spectra(plan)
        ranks, times, notes = choose_ranks(model, plan, values, choose, only_faster, example_inputs)
        left = None if choosing and batches and not batch_norms(model) else batches  # it has had its effect
        result.add(cut_sites(model, plan, values, ranks, example_inputs=example_inputs, calibration=left))
        if before is not None and batches is not None:
            result.notes.append(refit_layers(model, before, batches, axes.factors if axes is not None else {}))
    result.timings = times
    result.notes[:0] = [*unasked, *notes, *(unseen(plan, moments) if budget is not None else [])]
    return make_report(model, plan, result, example_inputs, budget, dense)
