r"""Choose how many units every group keeps, with the ranks in view: both structures under one budget.

The product rule of `allocate`, with two kinds of factors: the share of its energy that each weight keeps at its rank, and
the share of what the consumers of a group's units receive that the remaining units keep,

.. math:: \max \prod_l \frac{\sum_{i \le r_l} s_{l,i}^2}{\sum_i s_{l,i}^2} \prod_g \Bigl(\frac{\sum_{u \in K_g} v_{g,u}}{\sum_u v_{g,u}}\Bigr)^2
          \quad \text{subject to} \quad \text{cost}(r, K) \le \text{limit}

squared, since a unit that goes is lost to the weights that put it out as well as to those that read it.

The cost couples the two, since a pair of layers costs r (in + out) and a dense one in x out. So from where the model is
now a greedy walk goes down: again and again the step (a few units of one group less, or a few ranks of one weight) that
loses least per cost that it saves. The widths are kept, and the ranks are then chosen by the product rule for these widths.
One walk, all of whose steps share where it is, and therefore one long file.
"""

from __future__ import annotations

import copy
import functools
import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .allocate import Floats, log_shares
from .costs import CURRENCIES, Rates, layer_costs, model_costs, present_costs
from .errors import InfeasibleBudgetError
from .matricize import Unfolding
from .plan import Plan
from .structures import Neurons, Site, WideLayer, inner_site
from .surgery.channels import End

Widths = dict[str, int]
Step = tuple[float, tuple[int, int]]  # what it loses per cost that it saves; to how many units, 0, or to which ranks
STEP = 32  # a step takes this part of the units, or of the ranks, that are left
COUNTED = 2  # a unit of a convolution counts twice: lost to the weights that put it out, and to those that read it
GRID = 24  # ranks that are tried for a weight that is still dense, or for an inner site that is whole


def unit_costs(plan: Plan, group: Neurons, currencies: Sequence[str]) -> Floats:
    """What one unit of a group costs now, on the average."""
    zero = np.zeros(len(tuple(currencies)))
    walk = Walk(plan, {}, {}, tuple(currencies), zero + math.inf, frozenset())
    count = len(group.kept)
    return -walk.change(walk.resized(group, 0)) / count if count else zero


def most_important(importance: Floats, count: int) -> NDArray[np.int64]:
    """Positions of the `count` most important units, increasing; of equals the first."""
    order = np.argsort(-importance, kind="stable")
    return np.sort(order[:count])


def inner_ranks(taken: int, multiple: int) -> NDArray[np.int64]:
    """Ranks that are tried for an inner site that is whole, in multiples; none where the smallest is not below `taken`."""
    return _in_multiples(max(taken - 1, 1), multiple)


@functools.lru_cache(maxsize=4096)  # a walk asks for the same ones again and again
def _in_multiples(highest: int, multiple: int) -> NDArray[np.int64]:
    """A grid up to `highest`, rounded down to multiples, from the smallest; none where `highest` is below that."""
    grid = np.append(multiple, np.linspace(1, highest, GRID).round().astype(np.int64))
    return np.unique(grid[(grid >= multiple) & (grid <= highest)] // multiple * multiple)


@functools.lru_cache(maxsize=4096)
def _break_even(unfolding: Unfolding, out: int, taken: int) -> int:
    """Of a layer with these numbers of channels."""
    unfolding = unfolding.resized(out, taken)
    return min((unfolding.dense_params - 1) // unfolding.unit_params, unfolding.full_rank)


def _step_down(count: int, multiple: int = 1) -> int:
    """A few less, in multiples; 0 where that leaves none."""
    return (count - max(1, count // STEP)) // multiple * multiple


@dataclass(slots=True)
class Walk:
    """Where the walk is.

    Attributes:
        plan, values, importances, currencies, limits, keep_dense: as given to `choose_shapes`.
        units: that each group keeps.
        ranks: of each site; inner: of the site within it, 0 where that stays whole.
        shares: logarithms of what is kept, by the number of units or the rank.
        layers, rates, sizes, costs: of every layer, by name: itself, its prices, its channels, what it costs.
        spent: what the model costs; weights: of the currencies.
        again: sites that became whole again, see `whole_again`.
        known: costs of layers that were asked for before: the steps of all groups at a layer ask for those of the others' layers.
        touching: groups and sites that change a layer.
    """

    plan: Plan
    values: dict[str, Floats]
    importances: dict[str, Floats]
    currencies: tuple[str, ...]
    limits: Floats
    keep_dense: frozenset[str]
    units: Widths = field(init=False)
    ranks: dict[str, int | None] = field(init=False)
    inner: dict[str, int] = field(init=False)
    shares: dict[str, Floats] = field(init=False)
    layers: dict[str, WideLayer] = field(init=False)
    rates: dict[str, Rates] = field(init=False)
    sizes: dict[str, tuple[int, int]] = field(init=False)
    costs: dict[str, Floats] = field(init=False)
    spent: Floats = field(init=False)
    weights: Floats = field(init=False)
    touching: dict[str, set[str]] = field(init=False)
    again: set[str] = field(default_factory=set)
    known: dict[tuple[str, int, int, int | None, int], Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plan = self.plan
        self.units = {g.name: len(g.kept) for g in plan.neurons}
        self.ranks = {s.name: s.rank for s in plan.sites}
        self.inner = {s.name: s.inner.rank or 0 if s.inner is not None else 0 for s in plan.sites}
        self.layers = {layer.name: layer for layer in plan.layers}
        self.rates = {layer.name: Rates.of(layer) for layer in plan.layers}
        self.sizes = {layer.name: (layer.out, layer.taken) for layer in plan.layers}
        self.shares = {
            g.name: self.counted(g) * log_shares(np.sqrt(np.sort(self.importances[g.name])[::-1]))
            for g in plan.neurons
            if g.name in self.importances
        }
        self.shares |= {s.name: log_shares(self.values[s.name]) for s in plan.sites if s.name in self.values}
        self.costs = {path: self.cost(path) for path in self.layers}
        self.spent = present_costs(plan, self.currencies)
        self.weights = self.currency_weights()
        self.touching = defaultdict(set)
        for group in plan.neurons:
            for end in self.priced(group):
                self.touching[end.name].add(group.name)
        for site in plan.sites:
            self.touching[site.layer].add(site.name)
        for group in plan.neurons:
            self.bury(group)

    @property
    def has_heads(self) -> bool:
        return any(group.of_heads for group in self.plan.neurons)

    def priced(self, group: Neurons) -> list[End]:
        """Without buffers, which cost nothing."""
        return [end for end in group.group.ends if end.name in self.layers]

    def counted(self, group: Neurons) -> int:
        """How often a unit's share counts: where a pair can be cut along its inputs, ranks do what neurons do, and keep the best directions
        instead of the best axes. A unit of a residual stream is lost each time that the stream is read: as often as it is normalised."""
        if group.norms:
            return len(group.norms)
        sites = [self.layers[end.name].site for end in self.priced(group)]
        return COUNTED if any(site is not None and inner_site(site) is not None for site in sites) else 1

    def cost(self, path: str, size: tuple[int, int] | None = None) -> Floats:
        """Of a layer at its rank, with these numbers of channels (None: its own)."""
        site = self.layers[path].site
        out, taken = size or self.sizes[path]
        return self.cost_at(path, out, taken, *((self.ranks[site.name], self.inner[site.name]) if site is not None else (None, 0)))

    def cost_at(self, path: str, out: int, taken: int, rank: int | None, inner: int) -> Floats:
        key = path, out, taken, rank, inner
        if key not in self.known:
            self.known[key] = layer_costs(self.rates[path], out, taken, None if rank is None else [rank], self.currencies, inner)[0]
        return self.known[key]

    def currency_weights(self) -> Floats:
        """Of the costs, which become one in their sum: each counts relative to its limit, and 0 where the limit holds already."""
        return np.where(self.spent > self.limits, 1 / np.maximum(self.limits, 1e-300), 0.0)

    def kept(self) -> dict[str, list[int]]:
        """The units that stay, the most important ones, by their numbers in the dense model."""
        return {g.name: g.kept[most_important(self.importances[g.name], self.units[g.name])].tolist() for g in self.plan.neurons}

    def gain(self) -> float:
        """The sum of the logarithms of all shares that are kept."""
        kept = [self.kept_at(s, [r], [self.inner[s.name]])[0] for s in self.plan.sites if (r := self.ranks[s.name]) is not None]
        return float(sum(kept) + sum(self.shares[n][u - 1] for n, u in self.units.items()))

    def kept_at(self, site: Site, ranks: Sequence[int] | NDArray[np.int64], inner: Sequence[int] | NDArray[np.int64]) -> Floats:
        """The logarithm of what a site keeps at these ranks."""
        r, s = np.asarray(ranks), np.asarray(inner)
        kept = self.shares[site.name][np.minimum(r, len(self.shares[site.name])) - 1]
        if site.inner is None or not s.any():
            return kept
        joint = self.values[site.inner.name]
        return kept + np.where(s > 0, joint[np.minimum(r, len(joint)) - 1, np.minimum(s, joint.shape[1]) - 1], 0.0)

    def resized(self, group: Neurons, count: int) -> dict[str, tuple[int, int]]:
        """Numbers of channels of all layers of a group that keeps so many units."""
        less = self.units[group.name] - count
        sizes: dict[str, tuple[int, int]] = {}
        for end in self.priced(group):
            out, taken = sizes.get(end.name, self.sizes[end.name])
            width = less * end.index.shape[1]
            sizes[end.name] = (out, taken - width) if end.side == "in" else (out - width, taken)
        return sizes

    def change(self, sizes: dict[str, tuple[int, int]]) -> Floats:
        return sum((self.cost(path, size) - self.costs[path] for path, size in sizes.items()), np.zeros_like(self.spent))

    def best(self, item: Neurons | Site) -> Step | None:
        """The best step down of a group or a weight: what it loses per cost that it saves, and to how many units or which ranks."""
        if isinstance(item, Site):
            return self.best_ranks(item)
        now, shares = self.units[item.name], self.shares[item.name]
        count = _step_down(now, item.multiple)
        if count < 1:
            return None
        saved = -float(self.change(self.resized(item, count)) @ self.weights)
        if saved <= 0:
            return None
        return (shares[now - 1] - shares[count - 1]) / saved, (count, 0)

    def best_ranks(self, site: Site) -> Step | None:
        if site.name in self.keep_dense:
            return None
        options = [option for option in self.options(site) if option[0] >= 1]
        if not options:
            return None
        rank, inner = self.ranks[site.name], self.inner[site.name]
        here = 0.0 if rank is None else self.kept_at(site, [rank], [inner])[0]
        ranks, inners = zip(*options, strict=True)
        costs = layer_costs(self.rates[site.layer], *self.sizes[site.layer], ranks, self.currencies, inners)
        savings = (self.costs[site.layer] - costs) @ self.weights
        losses = here - self.kept_at(site, ranks, inners)
        slopes = np.where(savings > 0, losses / np.where(savings > 0, savings, 1.0), np.inf)
        best = int(np.argmin(slopes))
        return (float(slopes[best]), options[best]) if np.isfinite(slopes[best]) else None

    def options(self, site: Site) -> list[tuple[int, int]]:
        """Ranks, of the site and of the inner one, that a step may lead to."""
        rank, inner, multiple = self.ranks[site.name], self.inner[site.name], site.structure.multiple
        if rank is None:
            highest = min(_break_even(site.unfolding, *self.sizes[site.layer]), len(self.shares[site.name]))
            return [(r, 0) for r in _in_multiples(highest, multiple).tolist()] or ([(highest, 0)] if highest >= 1 else [])
        lower = [(_step_down(rank, multiple), inner)]
        if site.inner is None or site.inner.rank is not None:
            return lower if site.inner is None else []
        if inner == 0:
            return lower + [(rank, s) for s in inner_ranks(self.sizes[site.layer][1], multiple).tolist()]
        # One that has become so small that it would cost less whole is whole again: 0.
        return [*lower, (rank, _step_down(inner, multiple)), (rank, 0)]

    def bury(self, group: Neurons) -> None:
        """Units that count nothing go whatever the limits say: nothing is lost. (Of even groups as many as of others like them.)"""
        if group.structure.even:
            return
        alive = np.count_nonzero(self.importances.get(group.name, [1.0] * self.units[group.name]))
        least = -(-max(int(alive), 1) // group.multiple) * group.multiple
        if least < self.units[group.name]:
            self.go(group, (least, 0))

    def prices(self) -> dict[str, float]:
        """Why it ends here: what the next step of each weight and group would lose, as a logarithm of what is kept, for each percent of the limits
        that it saves; what has no step left is missing."""
        before, self.weights = self.weights, 1 / np.maximum(self.limits, 1e-300)
        items: list[Neurons | Site] = [*self.plan.neurons, *self.plan.sites]
        steps = {item.name: self.best(item) for item in items}
        self.weights = before
        even = {group.name for group in self.plan.neurons if group.structure.even}  # which go by no price
        return {name: 0.01 * float(step[0]) for name, step in steps.items() if step is not None and name not in even}

    def down(self) -> list[Walk]:
        """The walk, until the limits hold. Returns where it may end: a head that saves more than is still needed may be the last step, or stay
        while smaller ones go instead; which of them keeps more is seen at the end."""
        items: dict[str, Neurons | Site] = {g.name: g for g in self.plan.neurons} | {s.name: s for s in self.plan.sites}
        version = dict.fromkeys(items, 0)
        heap: list[tuple[float, str, tuple[int, int], int]] = []
        stay: set[str] = set()
        ends: list[Walk] = []

        def push(name: str) -> None:
            version[name] += 1
            step = self.best(items[name]) if name not in stay else None
            if step is not None:
                heapq.heappush(heap, (step[0], name, step[1], version[name]))

        for name in items:
            push(name)
        while np.any(self.spent > self.limits):
            if not heap:
                if ends:
                    return ends
                raise InfeasibleBudgetError(*self.smallest())
            _, name, to, stamp = heapq.heappop(heap)
            if stamp != version[name]:
                continue
            if self.is_too_much(items[name], to):
                stay.add(name)
                ends.append(self.copy())
                ends[-1].go(items[name], to)
                continue
            changed = self.go(items[name], to)
            weights = self.currency_weights()
            if np.any((weights > 0) != (self.weights > 0)):
                self.weights, affected = weights, set(items)
            else:
                affected = {n for path in changed for n in self.touching[path]} | {name}
            for n in affected:
                push(n)
        return [*ends, self]

    def copy(self) -> Walk:
        """Goes on by itself."""
        other = copy.copy(self)
        other.units, other.ranks, other.inner, other.again = dict(self.units), dict(self.ranks), dict(self.inner), set(self.again)
        other.sizes, other.costs = dict(self.sizes), dict(self.costs)
        return other

    def is_too_much(self, item: Neurons | Site, to: tuple[int, int]) -> bool:
        """Is this a head, and does it save more than is needed? (Of a single channel, of several units that go in one step, and of ranks, what is
        left over is little, or comes back in the end.)"""
        if isinstance(item, Site) or not item.of_heads or self.units[item.name] - to[0] > item.multiple:
            return False
        return bool(np.all(self.spent + self.change(self.resized(item, to[0])) < self.limits))

    def smallest(self) -> tuple[str, float]:
        """What to say, and the smallest feasible fraction, where the walk has come to its end."""
        dense = model_costs(self.plan, self.currencies)
        worst = int(np.argmax(self.spent / np.maximum(self.limits, 1e-300)))  # a limit may be less than one parameter
        fraction = math.ceil(float((self.spent / dense)[worst]) * 1e4) / 1e4
        name = self.currencies[worst]
        currency = CURRENCIES[name]
        asked, left = (f"{x[worst]:.0f}" if currency.whole else f"{x[worst]:.3g}" for x in (self.limits, self.spent))
        ranks = " and every weight at its lowest rank" if self.plan.sites else ""
        return (
            f"budget out of reach: at most {asked} {currency.unit} are asked for, but {left} are left with every layer at its narrowest{ranks}; "
            f"smallest feasible: {name}={fraction}{self.plan.out_of_reach if name == 'params' else ''}",
            fraction,
        )

    def go(self, item: Neurons | Site, to: tuple[int, int]) -> list[str]:
        """Take a step; returns the layers that it changed."""
        if isinstance(item, Neurons):
            self.sizes |= (sizes := self.resized(item, to[0]))
            self.units[item.name] = to[0]
            changed = list(sizes)
        else:
            self.ranks[item.name], self.inner[item.name] = to
            changed = [item.layer]
        for path in changed:
            self.whole_again(path)
            before, self.costs[path] = self.costs[path], self.cost(path)
            self.spent = self.spent + self.costs[path] - before
        return changed

    def whole_again(self, path: str) -> None:
        """Where milliseconds count: a layer that has become so narrow that a pair would take longer stays whole after all.

        (A pair has a least time however low its rank. In the other currencies the product rule at the end sees to it.) Once: where another bound
        then makes it a pair once more, it stays one, or the walk would have no end.
        """
        site = self.layers[path].site
        if "latency" not in self.currencies or site is None or site.rank is not None or self.ranks[site.name] is None:
            return
        if site.name in self.again:
            return
        rank, self.ranks[site.name] = self.ranks[site.name], None
        dense = self.cost(path)
        self.ranks[site.name] = rank
        if float((dense - self.cost(path)) @ self.weights) < 0:
            self.ranks[site.name] = None
            self.again.add(site.name)

    def fill(self) -> None:
        """What a step was too long by: units back, the most important first, while they fit."""
        start = {g.name: len(g.kept) for g in self.plan.neurons}
        weights = 1 / np.maximum(self.limits, 1e-300)
        while True:
            found = []
            for group in self.plan.neurons:
                count = self.units[group.name] + group.multiple
                if count > start[group.name]:
                    continue
                more = self.change(self.resized(group, count))
                gain = self.shares[group.name][count - 1] - self.shares[group.name][self.units[group.name] - 1]
                if gain > 0 and np.all(self.spent + more <= self.limits):
                    found.append((gain / float(more @ weights), group.name, count))
            if not found:
                return
            _, name, count = max(found)
            self.go(next(g for g in self.plan.neurons if g.name == name), (count, 0))
