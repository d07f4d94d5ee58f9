"""Which weight gets which structure, what it costs, and what was left alone and why.

The plan is made before anything is touched; `print(plan)` shows every weight of the model. One decision, weight by weight, and therefore one
long file.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .checks import has_gradient_hooks, hooked
from .distributed import full, is_sharded, own_class
from .errors import InvalidTypeError, InvalidValueError, NothingToCompressError, PatternError
from .graph import find_groups, free_bases
from .matricize import choose_unfolding, has_own_forward, takes_entries, unfoldings
from .measure import check_inputs, check_run, count_params, input_shapes, layer_macs, macs_of_batches
from .readers import not_replaceable, weight_readers
from .structures import Channels, Entries, LowRank, Neurons, Site, Structure, Weight, WideLayer, inner_site
from .surgery.basis import Heads, Stream
from .surgery.channels import End, Group, parameters_at, slimmed, width
from .surgery.factorize import MARK, empty_pair

FORGONE = "ranks alone keep as much of the network within the budget, or more; structures=[LowRank(), Channels()] takes both"


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A weight that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(slots=True)
class Plan:
    """What laconic will do with a model.

    Attributes:
        sites: weights under `LowRank`.
        neurons: groups of neurons under `Channels`; forgone: of these, the optional ones that are left alone after all.
        layers: every layer whose cost changes with the number of neurons.
        whole: why the neurons of the other layers all stay, by layer.
        entries: weights under `Entries`.
        left_alone: every weight with two or more dimensions that no structure acts on, with the reason.
        params: parameters of the dense model (biases, norms and all).
        macs: multiply-accumulates on the example inputs; None without.
        ranks: current rank of each site, by name; filled in as spectra become known.
        notes: what else there is to say.
        latency_ms: of the dense model on the example inputs; fixed_ms: what of it is not the sites'. None unless a budget
            in milliseconds asks for it.
    """

    sites: list[Site]
    left_alone: list[LeftAlone]
    params: int
    macs: int | None
    ranks: dict[str, int] = field(default_factory=dict)
    latency_ms: float | None = None
    fixed_ms: float | None = None
    neurons: list[Neurons] = field(default_factory=list)
    forgone: list[Neurons] = field(default_factory=list)
    layers: list[WideLayer] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)
    entries: list[Weight] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def inner(self) -> list[Site]:
        """The sites within the pairs of others."""
        return [s.inner for s in self.sites if s.inner is not None]

    @property
    def turns(self) -> bool:
        """Are there widths whose channels are turned to principal axes before they go? Then nothing presses them, and all go in one cut."""
        return any(group.basis is not None for group in self.neurons)

    @property
    def out_of_reach(self) -> str:
        """What to say of the largest weights that stay dense, where a budget cannot be met."""
        slimmed = {layer.tensor for layer in self.layers}
        stay: dict[str, list[LeftAlone]] = {}
        for x in sorted(self.left_alone, key=lambda x: -math.prod(x.shape)):
            if x.name not in slimmed:
                stay.setdefault(x.reason, []).append(x)
        counts = {reason: sum(math.prod(x.shape) for x in alike) for reason, alike in stay.items()}
        named = "; ".join(
            f"{stay[reason][0].name}{f' and {more} more' if (more := len(stay[reason]) - 1) else ''}, {counts[reason]:,} parameters: {reason}"
            for reason in sorted(stay, key=lambda reason: -counts[reason])[:3]
        )
        return f" (no budget reaches {named})" if named else ""

    def forgo_inner(self, why: str) -> None:
        """All pairs stay pairs."""
        names = [s.layer for s in self.sites if s.inner is not None]
        for site in self.sites:
            site.inner = None
        if names:
            self.notes.append(f"no pair is cut again along its inputs ({why}): {', '.join(names)}")

    def forgo(self, names: Collection[str]) -> None:
        """These groups of neurons stay as they are. (In new lists: the old ones are what an error goes back to.)"""
        self.forgone = [*self.forgone, *(g for g in self.neurons if g.name in names)]
        self.neurons = [g for g in self.neurons if g.name not in names]
        self.whole = self.whole | {g.name: FORGONE for g in self.forgone}

    def take_back(self, neurons: list[Neurons]) -> None:
        """These are all under their structures again."""
        self.neurons, self.forgone = neurons, []
        self.whole = {name: why for name, why in self.whole.items() if why != FORGONE}

    @property
    def fixed_params(self) -> int:
        """Parameters that are under no site, of the layers as wide as they are now."""
        gone = sum(x.params_at(*x.dense) - x.params_at(x.out, x.taken) for x in self.layers)
        return self.params - sum(s.whole.dense_params for s in self.sites) - round(gone)

    @property
    def fixed_macs(self) -> int:
        assert self.macs is not None
        gone = sum(x.macs_at(*x.dense) - x.macs_at(x.out, x.taken) for x in self.layers)
        sites = sum(s.positions[0] * s.whole.dense_params for s in self.sites if s.positions is not None)
        return self.macs - sites - round(gone)

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """One row per weight: name, structure, shape, matrix, rank (now / break-even), parameters or the reason."""
        rows = []
        for s in self.sites:
            u = s.unfolding
            matrix = (f"{u.groups} x " if u.groups > 1 else "") + f"{u.m} x {u.n}"
            rank = f"{self.ranks.get(s.name, u.full_rank)} / {s.break_even}"
            cost = f"{u.dense_params} ({u.unit_params} a unit of rank)"
            structure = f"{type(s.structure).__name__} {u.name}" + (", then inputs" if s.inner is not None else "")
            rows.append((s.name, structure, str(list(u.shape)), matrix, rank, cost))
        rows += [(x.name, "left dense", str(list(x.shape)), "", "", x.reason) for x in self.left_alone]
        for x in self.entries:
            over = f" over {x.structure.over}" if x.structure.over else ""
            rows.append((x.path, f"Entries{over}", str(list(x.weights[0].shape)), "", "", "zeros save nothing by themselves"))
        for g in self.neurons:
            readers = ", ".join(dict.fromkeys(end.path for end in g.group.consumers))
            rows.append((g.name, "Channels", "", f"{g.group.units} {g.kind}", f"{len(g.kept)} left", f"read by {readers}"))
        rows += [(path, "all units stay", "", "", "", reason) for path, reason in self.whole.items()]
        return rows

    def __str__(self) -> str:
        header = ("weight", "structure", "shape", "matrix", "rank now / break-even", "parameters, or why left dense")
        table = [header, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        total = f"{self.params} parameters" + (f", {self.fixed_params} of them out of reach" if not self.neurons else "")
        return "\n".join([*lines, total + (f"; {self.macs} MACs" if self.macs is not None else ""), *self.notes])


def check_structures(
    structures: Any, example_inputs: Any, trains_on: bool, multiple: int = 1, optional: bool = True
) -> tuple[list[Structure], list[str]]:
    """The structures as a list, and what there is to say of them. None means `[LowRank(), Channels(optional=optional)]`, or `[LowRank()]` where there
    are no example inputs to find out with what is tied to a neuron (the plan says so), and where no training follows: a truncated
    layer is the nearest one of its rank and needs none, while neurons that go leave a hole. Their sizes are then multiples of `multiple`.
    """
    if structures is None:
        notes = [f"ranks and numbers of channels are multiples of {multiple}, since milliseconds count"] if multiple > 1 else []
        ranks, neurons = LowRank(multiple=multiple), Channels(multiple=multiple, optional=optional)
        if example_inputs is None:
            return [ranks], notes
        if not trains_on:
            why = "no training follows that would repair what they leave; structures=[LowRank(), Channels()] takes them too"
            return [ranks], [*notes, f"whole neurons stay: {why}"]
        return [ranks, neurons], notes
    if isinstance(structures, Structure):
        return [structures], []
    structures = list(structures)
    for s in structures:
        if not isinstance(s, Structure):
            raise InvalidTypeError(f"structures: expected laconic.LowRank(...) or laconic.Channels(...), got {s!r}")
    if not structures:
        raise InvalidValueError("structures is empty: pass at least one, such as laconic.LowRank()")
    even = [s for s in structures if isinstance(s, Channels) and s.even]
    if even and any(isinstance(s, LowRank) or (isinstance(s, Channels) and not s.even) for s in structures):
        raise InvalidValueError(
            "Channels(even=True): the same part of all neurons stays, which says nothing of ranks or other neurons beside them; leave out LowRank, "
            "and make every Channels even, or none"
        )
    return structures, []


def make_plan(
    model: nn.Module,
    structures: Sequence[Structure],
    example_inputs: Any = None,
    trained: set[Tensor] | None = None,
    found: tuple[list[Group], dict[str, str]] | None = None,
) -> Plan:
    """Decide for every weight of two or more dimensions.

    Args:
        trained: the parameters that the optimizers own; None where no training is meant (post-hoc compression), then
            frozen weights may be cut as well.
        found: what `find_groups` gives, where it is known already.

    Raises:
        PatternError: a pattern matches nothing.
        InvalidValueError: two structures of the same kind claim one weight.
        NothingToCompressError: no weight is left to work on.
    """
    inputs = check_inputs(example_inputs, model) if example_inputs is not None else None
    modules: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(module, []).append(path)
    holders: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    parameter: Tensor
    for module in modules:
        for attribute, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append((module, attribute))
    _check_patterns(structures, modules, holders)

    readers = weight_readers(modules)
    sites: list[Site] = []
    left: list[LeftAlone] = []
    entries: list[Weight] = []
    low_rank = any(isinstance(s, LowRank) for s in structures)
    acting: set[int] = set()  # structures that select something
    for parameter, held in holders.items():
        names = [_join(path, attribute) for module, attribute in held for path in modules[module]]
        if isinstance(parameter, UninitializedParameter):
            raise InvalidValueError(f"{names[0]} is not initialised yet (a lazy layer): run the model once on real inputs first")
        if parameter.ndim < 2:
            continue
        entries += [
            Weight(s, names[0], model)
            for s in structures
            if isinstance(s, Entries) and _selected(s, modules, held, names) and (trained is None or parameter in trained)
        ]
        wanted = [s for s in structures if isinstance(s, LowRank) and _selected(s, modules, held, names)]
        if len(wanted) > 1:
            raise InvalidValueError(f"{names[0]} is claimed by {len(wanted)} LowRank structures: separate them with include= and exclude=")
        acting |= {id(s) for s in wanted}
        if not low_rank:
            continue
        reason = (
            "not selected by include= / exclude="
            if not wanted
            else _why_not(parameter, held, modules, readers, trained, wanted[0].embeddings)
        )
        if reason is None:
            owners = tuple(module for module, _ in held)
            unfolding = choose_unfolding(owners[0], wanted[0].matricization, full(parameter))
            paths = tuple(tuple(modules[module]) for module in owners)
            site = Site(names[0], wanted[0], unfolding, own_class(owners[0]).__name__, owners, paths)
            site.inner = inner_site(site)
            sites.append(site)
        else:
            left.append(LeftAlone(names[0], tuple(parameter.shape), reason))
    if inputs is not None:
        check_run(model, inputs)
    if inputs is not None and sites and not any(is_sharded(p) for p in holders):
        layers = {module: modules[module] for site in sites for module in site.modules}
        reasons = not_replaceable(model, layers, inputs)
        for site in [s for s in sites if not reasons.keys().isdisjoint(s.modules)]:
            sites.remove(site)
            left.append(LeftAlone(site.name, tuple(site.weights[0].shape), next(reasons[m] for m in site.modules if m in reasons)))
    acting |= {id(weight.structure) for weight in entries}
    plan = Plan(sites, left, count_params(model), None, entries=entries)
    if inputs is None:
        plan.notes.append("whole neurons stay: it takes example_inputs=(...) to see what is tied to them")
    if any(isinstance(s, Channels) for s in structures):
        acting |= _add_neurons(model, plan, structures, modules, inputs, trained, found)
    if not sites and not plan.neurons and not entries:
        whys = [f"{x.name}: {x.reason}" for x in left] + [f"{path}: {reason}" for path, reason in plan.whole.items()]
        why = "; ".join(whys[:5]) or "it has no weight of two or more dimensions"
        raise NothingToCompressError(f"nothing to compress in {type(model).__name__} ({why})")
    for structure in structures:
        if id(structure) not in acting and (structure.include or structure.exclude):
            kind = type(structure).__name__
            raise PatternError(
                f"{kind}(include={structure.include}, exclude={structure.exclude}): nothing that {kind} could act on is left; correct or leave out"
            )
    if inputs is not None:
        _count(model, plan, inputs)
    return plan


def _add_neurons(
    model: nn.Module,
    plan: Plan,
    structures: Sequence[Structure],
    modules: dict[nn.Module, list[str]],
    inputs: tuple[Any, ...] | None,
    trained: set[Tensor] | None,
    found: tuple[list[Group], dict[str, str]] | None,
) -> set[int]:
    """Fill in the groups of neurons, the layers that they widen, and why the neurons of other layers all stay; which structures select any."""
    acting: set[int] = set()
    if inputs is None:
        raise InvalidValueError("Channels needs example_inputs=(...), to see which layers are tied to which")
    groups, plan.whole = found or find_groups(model, inputs)
    of_site = {path: site for site in plan.sites for paths in site.paths for path in paths}
    bases: dict[str, Stream | Heads] = {}
    if any(isinstance(s, Channels) and s.even and s.principal for s in structures):
        groups, bases, whys = free_bases(model, groups, inputs)
        alike: dict[str, list[str]] = {}
        for name, why in whys.items():
            alike.setdefault(why, []).append(name)
        plan.notes += [f"{', '.join(names)}: channels go as they are, and heads as a whole: {why}" for why, names in alike.items()]
    for group in groups:
        ends = [(end, model.get_submodule(end.path)) for end in group.ends]
        held = [(model.get_submodule(end.path), "weight") for end in group.producers]
        names = [_join(end.path, "weight") for end in group.producers]
        wanted = [s for s in structures if isinstance(s, Channels) and _selected(s, modules, held, names)]
        acting |= {id(s) for s in wanted}
        reason = None
        if len(wanted) > 1:
            raise InvalidValueError(
                f"{group.name} is claimed by {len(wanted)} Channels structures: separate them with include= and exclude="
            )
        if not wanted:
            reason = "not selected by include= / exclude="
        elif cut := next((end.path for end, module in ends if hasattr(module, MARK)), None):
            reason = f"{cut} is a pair already: its rank may fall further, its neurons stay"
        elif cut := next((end.path for end, module in ends if takes_entries(module) and end.path in of_site), None):
            reason = f"{cut} becomes a smaller table by LowRank(embeddings=True): its width stays"
        elif any(path in of_site and getattr(module, "groups", 1) > 1 for end, module in ends for path in modules[module]):
            reason = "it touches a grouped convolution that may be factorised: exclude that from LowRank"
        elif trained is not None and (
            gone := next((e.name for e, m in ends for p in parameters_at(m, e) if p not in trained or not p.requires_grad), None)
        ):
            reason = f"{gone} is frozen or not in the optimizer"
        if reason is None:
            plan.neurons.append(Neurons(wanted[0], group, model, np.arange(group.units), bases.get(group.name)))
        else:
            plan.whole[group.name] = reason
    counted: dict[int, nn.Module] = {id(module.weight): module for module in modules if isinstance(module, nn.Embedding)}
    counted |= {id(module.weight): module for module in modules if isinstance(module, nn.Linear)}

    def again(module: nn.Module) -> bool:
        """Of tables that share a weight one counts, or the linear layer that has it, too."""
        return isinstance(module, nn.Embedding) and counted[id(module.weight)] is not module

    for neurons in plan.neurons:
        for end in neurons.group.ends:
            module = model.get_submodule(end.path)
            costs_nothing = end.own and end.side in module._buffers
            if not costs_nothing and all(layer.name != end.name for layer in plan.layers):
                plan.layers.append(
                    _own_layer(end, module) if end.own else _wide_layer(end.path, module, of_site.get(end.path), again(module))
                )
    plan.layers += [
        _wide_layer(site.layer, site.modules[0], site)
        for site in plan.sites
        if plan.neurons and all(x.site is not site for x in plan.layers)
    ]
    return acting


def streams_through(plan: Plan) -> bool:
    """Do residual streams run through the model: is most of it in layers that read or write one, which several norms see?"""
    names = {end.name for group in plan.neurons if len(group.norms) > 1 for end in group.group.ends}
    layers = [x for x in plan.layers if x.name in names]
    return 2 * sum(x.params_at(*x.dense) + (x.site.whole.dense_params if x.site is not None else 0) for x in layers) > plan.params


def _own_layer(end: End, module: nn.Module) -> WideLayer:
    parameter = module.get_parameter(end.side)
    size = width(module, end.side)
    beside = parameter.numel() / size
    return WideLayer(end.path, tuple(parameter.shape), (size, size), size, size, None, beside=beside, side=end.side)


def _wide_layer(path: str, module: Any, site: Site | None, again: bool = False) -> WideLayer:
    """`again`: its weight is another layer's, too, and counted there."""
    out = width(module, "out")
    taken = width(module, "in") if site is not None or unfoldings(module) else out
    biases = sum(p.numel() for name, p in module.named_parameters(recurse=False) if name != "weight")
    own = 0 if site is not None or module.weight is None or again else module.weight.numel()
    shape = () if module.weight is None else tuple(module.weight.shape)
    if site is None and (not unfoldings(module) or getattr(module, "groups", 1) > 1):  # norms, depthwise: one part for each channel
        return WideLayer(path, shape, (out, taken), out, taken, None, beside=(biases + own) / out)
    return WideLayer(path, shape, (out, taken), out, taken, site, beside=biases / out, weight=own / (out * taken))


def use_unfoldings(model: nn.Module, plan: Plan, names: dict[str, str], example_inputs: Any = None) -> None:
    """Unfold each site as named: on resume `"auto"` must not choose again, from other weights."""
    for site in plan.sites:
        site.unfolding = next(u for u in unfoldings(site.modules[0], embeddings=True) if u.name == names[site.name])
        site.inner = inner_site(site)
    if example_inputs is not None:
        _count(model, plan, check_inputs(example_inputs, model))


def _count(model: nn.Module, plan: Plan, inputs: tuple[Any, ...]) -> None:
    """Fill in the MACs: of the model, of each site dense, of one unit of its rank, and of the units of each group beside the layers."""
    plan.macs, in_batches = macs_of_batches(model, inputs)
    shapes = input_shapes(model, [m for s in plan.sites for m in s.modules], inputs)
    for site in plan.sites:
        dense = first = both = 0
        for module in site.modules:
            pair = empty_pair(module, site.unfolding, 1, device="meta")
            dense += _dense_macs(module, shapes[module])
            first += layer_macs(pair[0], shapes[module])
            both += layer_macs(pair, shapes[module])
        one, two = site.unfolding.unit_parts
        site.positions = (dense // site.unfolding.dense_params, first // one, (both - first) // two)
        if site.inner is not None:
            entries = sum(math.prod(shape) for module in site.modules for shape in shapes[module])
            site.inner.positions = (site.positions[1], entries // site.unfolding.sides[1], site.positions[1])
    others: dict[str, Any] = {x.path: model.get_submodule(x.path) for x in plan.layers if x.site is None and not x.own}
    others = {path: module for path, module in others.items() if unfoldings(module)}
    shapes = input_shapes(model, list(others.values()), inputs)
    for layer in plan.layers:
        if layer.name in others:
            macs = _dense_macs(others[layer.path], shapes[others[layer.path]])
            if layer.weight:
                layer.positions = macs / others[layer.path].weight.numel()
            else:
                layer.beside_macs = macs / layer.out
    if in_batches and plan.neurons:  # whose trial has copied the model, too
        _count_between_layers(model, plan, inputs)


def _count_between_layers(model: nn.Module, plan: Plan, inputs: tuple[Any, ...]) -> None:
    """What goes with a unit that no layer computes, attention's products with a head: seen in the model without half of a group's units."""
    layers = {layer.name: layer for layer in plan.layers}
    for layer in layers.values():
        layer.beside_macs = 0.0 if layer.weight or layer.site is not None else layer.beside_macs
    twin = copy.deepcopy(model)
    for neurons in plan.neurons:
        group, less = neurons.group, len(neurons.kept) // 2
        if not less:
            continue
        with slimmed(twin, [group], {group.name: neurons.kept[less:].tolist()}):
            left, _ = macs_of_batches(twin, inputs)
        sizes: dict[str, tuple[int, int]] = {}
        for end in (end for end in group.ends if end.name in layers):
            out, taken = sizes.get(end.name, (layers[end.name].out, layers[end.name].taken))
            gone = less * end.index.shape[1]
            sizes[end.name] = (out, taken - gone) if end.side == "in" else (out - gone, taken)
        in_layers = sum(_macs(layers[n], layers[n].out, layers[n].taken) - _macs(layers[n], *size) for n, size in sizes.items())
        assert plan.macs is not None
        first = group.producers[0]
        layers[first.name].beside_macs += max(plan.macs - left - in_layers, 0.0) / (less * first.index.shape[1])


def _macs(layer: WideLayer, out: int, taken: int) -> float:
    """Of a dense layer with these numbers of channels, as in the plan."""
    site = layer.site
    at_site = (site.dense_macs or 0) * out * taken / (layer.out * layer.taken) if site is not None else 0.0
    return layer.macs_at(out, taken) + at_site


def _dense_macs(module: nn.Module, shapes: Sequence[Any]) -> int:
    bare: Any = object.__new__(own_class(module))
    bare.__dict__.update(module.__dict__ | {"_compiled_call_impl": None})
    bare._parameters = {
        k: None if p is None else nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
        for k, p in module._parameters.items()
    }
    bare._forward_hooks, bare._forward_pre_hooks = type(module._forward_hooks)(), type(module._forward_pre_hooks)()
    return layer_macs(bare, shapes)


def _join(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


def _matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _selected(structure: Structure, modules: dict[nn.Module, list[str]], held: Sequence[tuple[nn.Module, str]], names: list[str]) -> bool:
    known = names + [path for module, _ in held for path in modules[module]]
    if structure.include and not _matches(structure.include, known):
        return False
    return not _matches(structure.exclude, known)


def _check_patterns(
    structures: Sequence[Structure], modules: dict[nn.Module, list[str]], holders: dict[Tensor, list[tuple[nn.Module, str]]]
) -> None:
    names = [path for paths in modules.values() for path in paths]
    names += [_join(path, attribute) for held in holders.values() for module, attribute in held for path in modules[module]]
    for structure in structures:
        for keyword in ("include", "exclude"):
            for pattern in getattr(structure, keyword):
                if not _matches([pattern], names):
                    some = ", ".join([n for n in names if n][:6])
                    raise PatternError(f"{keyword}={pattern!r} matches no module or parameter; there are: {some}, ...")


def _why_not(
    parameter: Tensor,
    held: Sequence[tuple[nn.Module, str]],
    modules: dict[nn.Module, list[str]],
    readers: dict[str, str],
    trained: set[Tensor] | None,
    embeddings: bool,
) -> str | None:
    """The reason to leave a weight alone, or None."""
    if not parameter.is_floating_point():
        return f"dtype {parameter.dtype} is not a real floating type"
    options = None
    for module, attribute in held:
        kind = type(module).__name__
        if type(module).__name__ == "ParametrizationList" or attribute in ("weight_g", "weight_v", "weight_orig"):
            return "parametrized (weight_norm, spectral_norm, ...): its weight is computed anew on every forward"
        if isinstance(module, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weights directly: laconic.unfuse(model) is the way out"
        if attribute == "weight" and has_own_forward(module):
            return f"{kind} has a forward of its own, set on the object, which a cut would lose"
        here = unfoldings(module, embeddings) if attribute == "weight" else []
        if len(held) > 1 and any(isinstance(m, nn.Embedding) != isinstance(module, nn.Embedding) for m, _ in held):
            return "tied between an embedding and a layer"
        if not here and isinstance(module, nn.Embedding):
            if unfoldings(module, embeddings=True):
                return f"{kind} is cut by LowRank(embeddings=True)"
            own = type(module).forward is not nn.Embedding.forward
            return f"{kind} has a forward of its own" if own else f"{kind} with max_norm, scale_grad_by_freq or sparse is not supported"
        if not here:
            beside = next(module.children(), None) is not None
            return f"it is {kind}'s own, beside its layers" if beside else f"{kind} is not supported"
        for path in modules[module]:
            if path == "":
                return "the model itself is this layer: wrap it in nn.Sequential"
            if path.endswith("._orig_mod"):  # called by what was compiled of it, whatever stands there
                return "torch.compile wraps this very layer, and would go on with it: layer.compile() is the way out"
            if path in readers:
                return readers[path]
        if hooked(module) and not is_sharded(parameter):  # a sharded model is not cut itself
            return f"{kind} has forward or backward hooks, which a cut would lose"
        if has_gradient_hooks(parameter) and not is_sharded(parameter):
            return "it has hooks on its gradient, which a cut would lose"
        if options is not None and (options.name, options.shape) != (here[0].name, here[0].shape):
            return "tied between layers of different kinds"
        options = here[0]
    assert options is not None
    if options.groups * min(options.m, options.n) > 0 and options.full_rank == 1:
        return "its matrix has one row or column: rank 1 already"
    if (options.dense_params - 1) // options.unit_params < 1 and len(unfoldings(held[0][0])) == 1:
        return f"{options.m} x {options.n} is too small: even rank 1 needs as many parameters"
    if trained is not None:
        if not parameter.requires_grad:
            return (
                "frozen (requires_grad is False) when the Compressor was built: freeze it after that, if it is to be trained and cut later"
            )
        if parameter not in trained:
            return "not in the optimizer"
    return None
