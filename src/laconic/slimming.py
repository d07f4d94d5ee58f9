"""Take neurons out of a model: which are important, what they put out on the average, and the verified removal."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .allocate import Floats
from .checks import has_gradient_hooks
from .cuts import CutResult, check_in_place, hooks_lost, largest_difference, outputs_uncut
from .errors import LaconicError, SurgeryError, first_line
from .graph import largest, outputs, unread, unsafe_convolutions
from .matricize import TRANSPOSED_CONVS, Layer
from .measure import OneDtype, call, cast, check_inputs, evaluating
from .moments import FEWEST, InputMoments, Moments
from .plan import Plan
from .surgery.basis import scale_norms, scale_queries
from .surgery.batchnorm import BATCHES
from .surgery.channels import Group, channels_kept, parameters_at, slim, slimmed, width
from .surgery.constants import response, shares_bias
from .surgery.factorize import plain_layers

UNSAFE = (
    "a strided 1x1 convolution with fewer than 8 inputs, in channels_last on the CPU, where oneDNN's backward pass may crash or "
    "give wrong gradients (its issue 6035): train on without channels_last, or on a GPU, or with Channels(multiple=8)"
)


def slim_neurons(
    model: nn.Module,
    plan: Plan,
    importances: dict[str, Floats],
    kept: dict[str, list[int]],
    *,
    example_inputs: Any,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    means: dict[str, Tensor] | None = None,
    gains: dict[str, float] | None = None,
) -> CutResult:
    """Take units out of the groups that keep fewer than they have. On any failure model, plan and optimizers are as they were.

    Args:
        kept: units that stay, by group, by their numbers in the dense model.
        means: of the consumers' inputs, by path and channel: what a unit put out on the average is added to their biases.
        gains: of norms over the units, by group: by what they are multiplied once these are gone.

    Raises:
        SurgeryError: the model without the units differs, by more than rounding, from the one in which nothing reads them.
    """
    groups = [g for g in plan.neurons if len(kept.get(g.name, g.kept)) < len(g.kept)]
    if not groups:
        return CutResult()
    kept = {g.name: list(kept[g.name]) for g in groups}
    tied, inputs = [g.group for g in groups], check_inputs(example_inputs, model)
    before = outputs_uncut(model, inputs)
    for site in plan.sites:
        check_in_place(model, site)
    try:
        off = difference(model, tied, kept, inputs)
    except Exception as error:
        names = ", ".join(kept)
        raise SurgeryError(
            f"the model no longer runs without units of {names} ({type(error).__name__}: {first_line(error)}); it was left as it was; exclude them: Channels(exclude=...)"
        ) from error
    precisions = [torch.finfo(y.dtype).eps for y in before if y.is_floating_point()]
    tolerance = 1e4 * min(torch.finfo(torch.float32).eps, *precisions)
    if not off <= tolerance:  # a second time with more digits, where rounding may be the reason
        try:
            with OneDtype(torch.float64):
                off = difference(copy.deepcopy(model).to(torch.float64), tied, kept, cast(inputs, torch.float64))
        except Exception:  # no room for it, or a device or a kernel without float64: what the outputs' own precision may do
            tolerance = max(tolerance, 32 * max(precisions))
    if not off <= tolerance:
        raise SurgeryError(
            f"without units of {', '.join(kept)} the outputs differ by {off:.2g} (relative) from those of the model in which nothing reads them, more than rounding ({tolerance:.2g}); it was left as it was; exclude them: Channels(exclude=...)"
        )
    shares = {}
    for g in groups:
        stay = np.isin(g.kept, kept[g.name])
        shares[g.name] = float(importances[g.name][stay].sum() / max(importances[g.name].sum(), math.ulp(0.0)))
    if means:
        fold_means(model, tied, kept, means)
    held = {end.name: parameters_at(model.get_submodule(end.path), end) for group in tied for end in group.ends}
    notes = hooks_lost([name for name, parameters in held.items() if any(map(has_gradient_hooks, parameters))])
    unsafe_before = set(unsafe_convolutions(model))
    name_of = {p: name for name, p in model.named_parameters()}
    if lost := sorted(name_of[p] for p in slim(model, tied, kept, optimizers)):
        notes.append(
            f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}: the optimizer's state could not be sliced with the neurons, and starts anew; Adam, AdamW and SGD keep theirs"
        )
        warnings.warn(f"laconic: {notes[-1]}", stacklevel=2)
    for g in groups:
        if gains and g.name in gains:
            scale_norms(model, g.group, gains[g.name], optimizers)
        if g.group.queries:
            scale_queries(model, g.group, math.sqrt(len(kept[g.name]) / len(g.kept)), optimizers)
    took_out(model, plan, kept)
    change, why = largest_difference(before, outputs(model, inputs))
    unsafe = ", ".join(path for path in unsafe_convolutions(model) if path not in unsafe_before)
    if unsafe:  # said at once: a crash would lose the report
        notes.append(f"{unsafe}: {UNSAFE}")
        warnings.warn(f"laconic: {notes[-1]}", stacklevel=2)
    return CutResult(
        errors={g.name: off for g in groups},
        max_abs_diff=change,
        kept={g.name: kept[g.name] for g in groups},
        shares=shares,
        notes=notes + why,
    )


def difference(model: nn.Module, groups: Sequence[Group], kept: dict[str, list[int]], inputs: tuple[Any, ...]) -> float:
    """Of the outputs without the units from those with nothing that reads them, as a part of the largest; infinite where it cannot be told."""
    with unread(model, groups, kept):
        wanted = outputs(model, inputs)
    with slimmed(model, groups, kept):
        got = outputs(model, inputs)
    scale = max(map(largest, wanted), default=1.0) or 1.0
    off, _ = largest_difference(wanted, got)
    return math.inf if off is None else off / scale


@torch.no_grad()
def fold_means(model: nn.Module, groups: Sequence[Group], kept: dict[str, list[int]], means: dict[str, Tensor]) -> None:
    """Add what units put out on the average, before they go, to the biases of the layers that read them.

    Where a consumer has no bias, its mean is left to the norm behind it; at the border of a zero-padded convolution it is
    an approximation, as the removal itself is.
    """
    for group in groups:
        for end in group.consumers:
            module: Layer = model.get_submodule(end.path)
            last = plain_layers(module)[-1]
            if last.bias is None or end.path not in means or isinstance(last, TRANSPOSED_CONVS) or getattr(last, "groups", 1) > 1:
                continue
            if shares_bias(model, module):
                continue
            gone = np.isin(channels_kept(module, "in"), np.delete(end.index, kept[group.name], axis=0).ravel())
            flow = response(module, torch.where(torch.from_numpy(gone), means[end.path], 0.0))
            last.bias.add_(flow.to(last.bias.device, last.bias.dtype))


def took_out(model: nn.Module, plan: Plan, kept: dict[str, list[int]]) -> None:
    """The units are out of the model: the plan has its layers as they are now."""
    for group in plan.neurons:
        if group.name in kept:
            group.kept = np.array(sorted(kept[group.name]), dtype=np.int64)
    for layer in plan.layers:
        module = model.get_submodule(layer.path)
        layer.out = width(module, layer.side)
        layer.taken = width(module, "in") if layer.site is not None or layer.weight else layer.out
        if layer.site is not None and layer.site.unfolding.sides != (layer.out, layer.taken):
            layer.site.resize(layer.out, layer.taken)


def importances_of(plan: Plan, moments: dict[str, Moments]) -> dict[str, Floats]:
    """Shares of the units of each group, from what the consumers were seen to take in, or else from the weights alone."""
    variances = {path: m.variance for path, m in moments.items()}
    return {g.name: g.structure.importance(g, variances) for g in plan.neurons}


def unseen(plan: Plan, moments: dict[str, Moments]) -> list[str]:
    """What to say where importances come from the weights alone."""
    blind = [g.name for g in plan.neurons if not all(end.path in moments for end in g.group.consumers)]
    why = f"too few inputs were seen (fewer than {FEWEST}; in mid-run those of a step in train mode count); calibration= takes batches of them"
    return [f"neurons of {', '.join(blind)} were chosen by the weights alone: {why}"] if blind else []


def watch_inputs(model: nn.Module, plan: Plan, batches: Iterable[Any]) -> dict[str, Moments]:
    """Moments of what the consumers of all groups take in, in eval mode."""
    watch = InputMoments(consumers(model, plan), training=False)
    try:
        with evaluating(model):
            for batch in batches:
                call(model, check_inputs(batch, model, "a batch of calibration"))
    except LaconicError:
        raise
    except Exception as error:
        raise SurgeryError(f"the model does not run on calibration ({type(error).__name__}: {first_line(error)}); {BATCHES}") from error
    finally:
        watch.drop()
    return watch.finish()


def consumers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The layers that read units of any group, by path."""
    return {end.path: model.get_submodule(end.path) for g in plan.neurons for end in g.group.consumers}
