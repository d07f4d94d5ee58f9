"""What became of every layer, and what is to be said of the run: the report on all cuts so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from .budget import Budget
from .cuts import CutResult
from .errors import first_line
from .matricize import Layer
from .measure import count_macs, count_params, relative_latency
from .plan import Plan
from .report import CompactReport, GroupReport, LayerReport
from .state import RunState
from .structures import Site


def _costs_now(site: Site) -> tuple[int, int | None]:
    """Parameters and MACs of a site's weight as it is cut."""
    if site.rank is None:
        return site.unfolding.dense_params, site.dense_macs
    params, macs = site.rank * site.unfolding.unit_params, None if site.unit_macs is None else site.rank * site.unit_macs
    if site.inner is None or site.inner.rank is None:
        return params, macs
    now, before = _costs_now(site.inner), (site.inner.unfolding.dense_params, site.inner.dense_macs)
    less = None if macs is None or now[1] is None or before[1] is None else macs + now[1] - before[1]
    return params + now[0] - before[0], less


def run_notes(model: nn.Module, plan: Plan, state: RunState) -> list[str]:
    """What is to be said of a run at its end: zeros that storage alone gains from, changed gradients, the solvers of the last
    proximal step of each weight, and every failure that was survived."""
    trained = dict(model.named_parameters())
    zeros = [(x.name, float((x.structure.values(x) == 0).double().mean())) for x in plan.entries if x.path in trained]
    notes = [f"{share:.1%} of the {name} are zero, which saves storage at most" for name, share in zeros]
    if state.gradient_scales:
        notes.append(
            f"{', '.join(f'{name} ({1 / scale:.2g})' for name, scale in state.gradient_scales.items())}: trained by an optimizer that steps in "
            "proportion to the gradient, so that in the run the gradients of its two layers were divided by its largest singular value (in brackets); "
            "from here on they are not: if you train on, divide the learning rate by the largest of them"
        )
    if any(group.structure.even for group in plan.neurons):
        notes.append("all widths were to shrink by the same part, and no rank: Channels(even=True)")
    for solver in sorted(set(state.solvers.values())):
        weights = ", ".join(name for name, used in state.solvers.items() if used == solver)
        notes.append(f"proximal steps every {state.every} steps, by the solver {solver}: {weights}")
    return notes + [f"a solver failed and another was used: {line}" for line in state.failures]


def make_report(
    model: nn.Module,
    plan: Plan,
    cuts: CutResult,
    example_inputs: Any,
    budget: Budget | None = None,
    dense: Callable[[], nn.Module] | None = None,
    **extra: Any,
) -> CompactReport:
    """The report on everything that was cut so far; with a `dense` model, both are timed beside each other now.

    It says where the model takes longer than the budget allows, by more than clocks wander.
    """
    layers = []
    for site in plan.sites:
        u, rank = site.unfolding, site.rank
        after, macs = _costs_now(site)
        spectrum = cuts.values.get(site.name)
        ms = cuts.timings.get(site.name, (None, None))
        layers.append(
            LayerReport(
                name=site.layer,
                kind=site.kind,
                shape=site.whole.shape,
                rank=rank,
                inputs=site.inner.rank if site.inner is not None else None,
                full_rank=u.full_rank,
                params_before=site.whole.dense_params,
                params_after=after,
                macs_before=None if site.positions is None else site.positions[0] * site.whole.dense_params,
                macs_after=macs,
                energy=cuts.energies.get(site.name, 1.0) * (cuts.energies.get(site.inner.name, 1.0) if site.inner is not None else 1.0),
                spectrum=tuple(float(f"{v:.6g}") for v in spectrum) if spectrum is not None else (),
                ms_before=ms[0],
                ms_after=ms[1],
                price=cuts.prices.get(site.name),
                slim=u.shape if u.shape != site.whole.shape else None,
                note=""
                if rank is not None or u.shape != site.whole.shape
                else f"two layers are smaller up to rank {site.break_even} only, which would lose more than is asked for",
            )
        )
    reasons = {alone.name: alone for alone in plan.left_alone}
    for layer in plan.layers:  # slim or not, but under no site
        if layer.site is None and len(layer.shape) > 1:
            reason = reasons.pop(layer.tensor).reason if layer.tensor in reasons else ""
            module: Layer = model.get_submodule(layer.path)
            weight = getattr(module, layer.side) if layer.own else module.weight
            now, size = tuple(weight.shape), math.prod(layer.shape)
            layers.append(
                LayerReport(
                    layer.name, type(weight if layer.own else module).__name__, layer.shape, None, None, size, weight.numel(),
                    note=reason, slim=now if now != layer.shape else None,
                )
            )  # fmt: skip
    for alone in reasons.values():
        size = math.prod(alone.shape)
        layers.append(LayerReport(alone.name.rpartition(".")[0] or alone.name, "", alone.shape, None, None, size, size, note=alone.reason))
    dense_ms = latency = None
    untimed: list[str] = []
    if dense is not None:
        try:
            share, dense_ms = relative_latency(model, dense(), example_inputs)
            latency = share * dense_ms
        except (MemoryError, RuntimeError) as error:  # the cut is made and verified: the report must not be lost with the clock
            untimed.append(f"not timed beside the dense model: {first_line(error)}")
    stay: dict[str, list[str]] = {}
    for name, reason in plan.whole.items():
        stay.setdefault(reason, []).append(name)
    notes = [*cuts.notes, *untimed, *(f"neurons of {', '.join(names)} all stay: {reason}" for reason, names in stay.items())]
    limit_ms = budget.limit_ms(dense_ms) if budget is not None and dense_ms is not None else None
    if limit_ms is not None and latency is not None and latency > 1.05 * limit_ms:
        notes.append(
            f"{latency:.3g} ms were measured at the end, {limit_ms:.3g} ms asked for, {dense_ms:.3g} ms taken by the dense model beside it "
            f"({plan.latency_ms:.3g} ms at the start): where that has changed, so has the pace of the machine"
        )
    return CompactReport(
        params_before=plan.params,
        params_after=count_params(model),
        macs_before=plan.macs,
        macs_after=count_macs(model, example_inputs) if example_inputs is not None else None,
        latency_before=dense_ms,
        latency_after=latency,
        max_abs_diff=cuts.max_abs_diff,
        surgery_error=max(cuts.errors.values(), default=0.0),
        layers=tuple(layers),
        groups=tuple(
            GroupReport(
                g.name,
                g.group.units,
                len(g.kept),
                cuts.shares.get(g.name, 1.0),
                tuple(dict.fromkeys(e.name for e in g.group.ends)),
                cuts.prices.get(g.name),
                g.kind,
            )
            for g in plan.neurons
        ),
        notes=tuple(notes),
        **extra,
    )
