"""Milliseconds of a model: where they go now, layer by layer, and what is left of them where a budget will end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .costs import Ranks, Rates, cut_costs, dense_costs, known, layer_costs, present_costs
from .distributed import agreed
from .errors import InvalidValueError
from .graph import leaves
from .matricize import Layer, Unfolding, an_input
from .measure import input_shapes, measure_latency, relative_latency
from .plan import Plan
from .structures import WideLayer
from .surgery.channels import slim, width
from .surgery.factorize import SLIM, narrow, new_pair
from .surgery.record import put
from .timing import added, layer_times, remembered


def measure_times(model: nn.Module, plan: Plan, inputs: tuple[Any, ...], seconds: float = 0.3) -> None:
    """Fill in the latency of the model, the table of each site, and what is left for everything else."""
    shapes = input_shapes(model, [m for s in plan.sites for m in s.modules], inputs)
    for site in plan.sites:
        tables = [
            agreed(partial(layer_times, m, site.unfolding, shape, max(site.break_even, 1), training=False))
            for m in site.modules
            for shape in shapes[m]
        ]
        site.times = added(tables) if tables else None
        if site.times is not None:  # a table may be from a day when this machine was faster: what counts in it are ratios
            now = sum(agreed(partial(_module_ms, m, shapes)) for m in site.modules)
            site.times = site.times.scaled(now / site.times.dense, now / site.times.dense)
    unused = [site.name for site in plan.sites if site.times is None]
    if unused:
        raise InvalidValueError(f"latency: {', '.join(unused)} took no part in the forward pass of example_inputs; exclude it")
    plan.latency_ms = agreed(lambda: measure_latency(model, inputs, seconds).median_ms)
    # Layers in their own loop run hotter than inside the model: never more than all of its time.
    alone = sum(known(s.times).dense for s in plan.sites)
    for site in plan.sites if alone > plan.latency_ms else ():
        site.times = known(site.times).scaled(0.999 * plan.latency_ms / alone, 0.999 * plan.latency_ms / alone)
    plan.fixed_ms = max(plan.latency_ms - alone, 0.0) * (1 - 1e-9)  # together not above it by rounding
    free = [layer for layer in plan.layers if layer.site is None and not layer.own]
    shapes = input_shapes(model, [model.get_submodule(layer.path) for layer in free], inputs)
    spent = {layer.path: agreed(partial(_module_ms, model.get_submodule(layer.path), shapes)) for layer in free}
    share = min(1.0, plan.fixed_ms / max(sum(spent.values()), 1e-9))
    for layer in free:
        out, taken = layer.dense
        ms = spent[layer.path] * share
        layer.beside_ms, layer.weight_ms = (0.0, ms / (out * taken)) if layer.weight else (ms / out, 0.0)
    # What is left is mostly activations, pooling, sums: in proportion to what the layers put out.
    left = max(plan.fixed_ms - share * sum(spent.values()), 0.0)
    positions = {x.name: x.site.positions[0] if x.site is not None and x.site.positions is not None else x.positions for x in plan.layers}
    elements = sum(positions[x.name] * x.dense[0] for x in plan.layers)
    for layer in plan.layers:
        layer.beside_ms += left * positions[layer.name] / max(elements, 1)


def _module_ms(module: nn.Module, shapes: dict[nn.Module, list[torch.Size]], seconds: float = 0.05) -> float:
    """Of one layer in all its calls; a table that is looked up costs nothing."""
    if isinstance(module, nn.Embedding):
        return 0.0
    return sum(measure_latency(module, (an_input(module, s),), seconds).median_ms for s in shapes[module])


def correct_times(
    model: nn.Module, plan: Plan, inputs: tuple[Any, ...], kept: dict[str, list[int]], ranks: Ranks, dense: Callable[[], nn.Module]
) -> bool:
    """Measure the model cut to these units and ranks, and correct the tables, so that they agree there. True if they were off by over 1 %.

    That a slim layer's time falls as its parameters do is a first guess: here each layer that is changed is timed as it would
    be, and its table scaled to that. What is left is beside the layers, and goes to `plan.fixed_ms`.
    """
    cut, changed = _cut_copy(model, plan, kept, ranks)
    expected, guesses = _expected_times(cut, plan, ranks)
    if not changed:  # the dense model, whose time is known
        return False
    shares = agreed(partial(_shares_of_dense, cut, changed, inputs, dense))
    measured = known(plan.latency_ms) * shares["whole"]
    alone = {name: known(plan.latency_ms) * share for name, share in shares["layers"].items()}
    together = sum(alone.values())
    free = _free_layers(plan)
    off, fixed = measured - expected, known(plan.fixed_ms) - sum(x.weight_ms * math.prod(x.dense) for x in free)
    beside = fixed + off + sum(guesses[name] for name in changed) - together
    least = min(fixed, 0.05 * measured)
    # In their own loop layers run hotter than inside the model: where they leave nothing for the rest of it, all take less.
    share = 1.0 if beside >= least else 1.0 - (least - beside) / max(together, 1e-9)
    scales = {name: share * alone[name] / max(guesses[name], 1e-9) for name in changed}
    for site in plan.sites:
        if (scale := scales.get(site.layer)) is not None:
            site.times = known(site.times).scaled(*((scale, 1.0) if ranks[site.name] is None else (1.0, scale)))
    for layer in free:
        layer.weight_ms *= scales.get(layer.path, 1.0)
    plan.fixed_ms = max(beside, least) + sum(x.weight_ms * math.prod(x.dense) for x in free)
    return abs(off) > 0.01 * known(plan.latency_ms)


def _shares_of_dense(
    cut: nn.Module, changed: dict[str, list[nn.Module]], inputs: tuple[Any, ...], dense: Callable[[], nn.Module]
) -> dict[str, Any]:
    """Times of a cut model and of its changed layers, in units of the dense model's; from the table on disk if it has them.

    So a run that is resumed decides the same. Clocks wander: all is timed beside the dense model.
    """
    shapes = input_shapes(cut, [m for modules in changed.values() for m in modules], inputs)
    parameters = [(name, str(p.dtype), tuple(p.shape), p.stride()) for name, p in cut.named_parameters()]
    taken = {name: [tuple(s) for m in modules for s in shapes[m]] for name, modules in changed.items()}
    what = [str(cut), parameters, taken, [(str(getattr(x, "dtype", "")), tuple(getattr(x, "shape", ()))) for x in inputs]]

    def measure() -> dict[str, Any]:
        whole, of_dense = relative_latency(cut, dense(), inputs)
        return {
            "whole": whole,
            "layers": {name: sum(_module_ms(m, shapes) for m in modules) / of_dense for name, modules in changed.items()},
        }

    found: dict[str, Any] = remembered(what, next(cut.parameters()).device, measure)
    return found


def skeleton(model: nn.Module) -> Callable[[], nn.Module]:
    """A function that builds a model of the same layers when this one has been cut long since, each parameter full of one small number; until it is called they take no memory."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    return partial(_flesh, _copy(model, empty), [p.device for p in model.parameters()])


def _copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Activations that the model keeps (for a plot, a loss) have a graph behind them, which cannot be copied: in the copy they are plain numbers."""
    kept = {id(x): x.detach() for module in model.modules() for x in leaves(dict(vars(module))) if x.grad_fn is not None}
    return copy.deepcopy(model, kept | (memo or {}))


def _flesh(bones: nn.Module, devices: Sequence[torch.device]) -> nn.Module:
    full = {
        id(p): nn.Parameter(torch.full_like(p, 0.01, device=device), requires_grad=False)
        for p, device in zip(bones.parameters(), devices, strict=True)
    }
    return copy.deepcopy(bones, full)


def _cut_copy(model: nn.Module, plan: Plan, kept: dict[str, list[int]], ranks: Ranks) -> tuple[nn.Module, dict[str, list[nn.Module]]]:
    """A copy of the model cut to these units and ranks; and what stands in it for each layer that is not as in the dense model.

    New pairs hold a number that is quick to compute with.
    """
    cut = _copy(model)
    slim(cut, [g.group for g in plan.neurons], kept)
    changed: dict[str, list[nn.Module]] = {}
    for site in plan.sites:
        rank = ranks[site.name]
        for paths in site.paths:
            module: Any = cut.get_submodule(paths[0])
            if rank is not None and rank != site.rank:
                unfolding = site.unfolding.resized(width(module, "out"), width(module, "in"))
                pair = narrow(module, unfolding, rank) if site.rank is not None else _new_pair(module, unfolding, rank)
                for path in paths:
                    put(cut, path, pair)
                module = pair
            if rank is not None or hasattr(module, SLIM):
                changed.setdefault(site.layer, []).append(module)
    for layer in _free_layers(plan):
        module = cut.get_submodule(layer.path)
        if (width(module, "out"), width(module, "in")) != layer.dense:
            changed[layer.path] = [module]
    return cut, changed


def _new_pair(module: Layer, unfolding: Unfolding, rank: int) -> nn.Sequential:
    pair = new_pair(module, unfolding, rank)
    for parameter in pair.parameters():
        parameter.data = torch.full_like(parameter, 0.01)
    return pair


def _free_layers(plan: Plan) -> list[WideLayer]:
    """Those whose weights are under no site: they can only become slim."""
    return [layer for layer in plan.layers if layer.site is None and layer.weight]


def _expected_times(cut: nn.Module, plan: Plan, ranks: Ranks) -> tuple[float, dict[str, float]]:
    """What the tables say of the model that is cut so, and of the weight of each layer in it."""
    total = float(present_costs(plan, ["latency"], ranks)[0])
    of_layer = {s.layer: float(dense_costs(s, ["latency"])[0] if (r := ranks[s.name]) is None else cut_costs(s, [r], ["latency"])[0, 0]) for s in plan.sites}  # fmt: skip
    for layer in plan.layers:
        module, rank = cut.get_submodule(layer.path), ranks[layer.site.name] if layer.site is not None else None
        rates, ranked = Rates.of(layer), None if rank is None else [rank]
        out, taken = width(module, layer.side), width(module, "in") if layer.site or layer.weight else layer.taken
        slimmed = float(layer_costs(rates, out, taken, ranked, ["latency"])[0, 0])
        total += slimmed - float(layer_costs(rates, layer.out, layer.taken, ranked, ["latency"])[0, 0])
        if layer.site is not None or layer.weight:
            of_layer[layer.path] = slimmed - layer.beside_ms * out
    return total, of_layer
