"""Targets: how much the compressed model may cost."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from torch import nn

from .allocate import Choice, Floats, Option, low_rank_choice, product_rule
from .checks import check_number
from .costs import CURRENCIES, Ranks, cut_costs, dense_costs, fixed_costs, model_costs, named_ranks, present_costs
from .errors import InfeasibleBudgetError, InvalidValueError
from .latency import correct_times, measure_times
from .measure import check_inputs
from .plan import Plan
from .structures import Site
from .walk import inner_ranks, unit_costs
from .widths import LANES, choose_shapes

Shapes = tuple[dict[str, list[int]], Ranks]  # units that stay in each group, rank of each site

CORRECTIONS = 4  # rounds of measuring where a budget in milliseconds will end


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds on the cost of the compressed model; several hold at once.

    Args:
        params: fraction of the dense model's parameters, above 0 and at most 1.
        macs: fraction of its multiply-accumulates on the example inputs.
        latency: fraction of its measured time for a forward pass of the example inputs, in eval mode, on the device and
            with the threads at hand.
        max_params, max_macs, latency_ms: the same as absolute numbers.
    """

    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    max_params: int | None = None
    max_macs: int | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            given = getattr(self, f.name)
            if given is not None:
                object.__setattr__(self, f.name, check_number(f"Budget: {f.name}", given))
        for c in CURRENCIES.values():
            share, amount = getattr(self, c.fraction), getattr(self, c.absolute)
            if share is not None and not 0 < share <= 1:
                raise InvalidValueError(
                    f"Budget({c.fraction}={share}): a fraction of the dense cost, above 0 and at most 1; absolute: {c.absolute}="
                )
            least = 1 if c.whole else 0
            if amount is not None and not (math.isfinite(amount) and amount >= least and amount > 0):
                raise InvalidValueError(f"Budget({c.absolute}={amount}): must be a number, {'at least 1' if c.whole else 'above 0'}")
            if share is not None and amount is not None:
                raise InvalidValueError(
                    f"Budget({c.fraction}=, {c.absolute}=): one cost given twice; give the fraction or the absolute number"
                )
        if not self.currencies:
            keywords = ", ".join(f"{k}=" for c in CURRENCIES.values() for k in (c.fraction, c.absolute))
            raise InvalidValueError(f"Budget(): give at least one of {keywords}")

    @property
    def currencies(self) -> tuple[str, ...]:
        """The costs that are bounded: names in `laconic.costs.CURRENCIES`."""
        return tuple(
            name for name, c in CURRENCIES.items() if getattr(self, c.fraction) is not None or getattr(self, c.absolute) is not None
        )

    @property
    def multiple(self) -> int:
        """Of ranks and numbers of channels, where the structures are left to us: LANES if milliseconds count, else 1."""
        return LANES if "latency" in self.currencies else 1

    def limits(self, plan: Plan, way: float = 1.0) -> Floats:
        """The bounds as absolute numbers, one per currency; at `way` < 1 those of a run that is on its way there.

        The cost falls from dense to the bound as a geometric line: the same share of what is left at every step.
        """
        dense = model_costs(plan, self.currencies)
        final = np.array([self._limit(name, cost) for name, cost in zip(self.currencies, dense, strict=True)])
        if way == 1:
            return final
        return np.maximum(final, dense * (np.minimum(final, dense) / dense) ** way)

    def limit_ms(self, dense_ms: float) -> float | None:
        """The bound in milliseconds where the dense model takes so many; None without one."""
        return self._limit("latency", dense_ms) if "latency" in self.currencies else None

    def _limit(self, name: str, dense: float) -> float:
        currency = CURRENCIES[name]
        share = getattr(self, currency.fraction)
        if share is None:
            return float(getattr(self, currency.absolute))
        return float(math.floor(share * dense)) if currency.whole else share * dense


def prepare(
    model: nn.Module, plan: Plan, values: dict[str, Floats], importances: dict[str, Floats], budget: Budget, example_inputs: Any
) -> None:
    """Measure what the budget needs to have measured, and check that it is within reach.

    Raises:
        InvalidValueError: example inputs are missing.
        InfeasibleBudgetError: with the smallest feasible fraction in the message.
    """
    if "latency" in budget.currencies:
        plan.forgo_inner("the table of measured times has pairs only")
        if example_inputs is None:
            raise InvalidValueError(CURRENCIES["latency"].missing)
        inputs = check_inputs(example_inputs, model)
        measure_times(model, plan, inputs)

        def shapes() -> Shapes:
            try:
                return shapes_for_budget(plan, values, importances, budget)
            except InfeasibleBudgetError as error:  # by these tables: what they call the smallest is measured before that is said
                share = min(1.0, 1.02 * error.smallest) if budget.currencies == ("latency",) else 1.0
                return shapes_for_budget(plan, values, importances, replace(budget, latency=share, latency_ms=None))

        correct(model, plan, inputs, shapes, lambda: model)
    shapes_for_budget(plan, values, importances, budget)


def correct(model: nn.Module, plan: Plan, inputs: tuple[Any, ...], shapes: Callable[[], Shapes], dense: Callable[[], nn.Module]) -> None:
    """Layers one by one do not add up to the model: measure it where the budget ends by the tables, correct them, and look again.

    Where `shapes` finds the budget out of reach of the corrected tables, they are put back.
    """
    before = [s.times for s in plan.sites], [x.weight_ms for x in plan.layers], plan.fixed_ms
    try:
        for _ in range(CORRECTIONS):
            if not correct_times(model, plan, inputs, *shapes(), dense=dense):
                break
        shapes()
    except InfeasibleBudgetError:
        plan.fixed_ms = before[2]
        for site, times in zip(plan.sites, before[0], strict=True):
            site.times = times
        for layer, ms in zip(plan.layers, before[1], strict=True):
            layer.weight_ms = ms


def shapes_for_budget(
    plan: Plan, values: dict[str, Floats], importances: dict[str, Floats], budget: Budget, keep_dense: frozenset[str] = frozenset()
) -> Shapes:
    """The units that stay in each group, by their numbers in the dense model, and the rank of each site (None: dense).

    Raises:
        InfeasibleBudgetError: with the smallest feasible fraction in the message.
    """
    if not plan.neurons:
        return {}, ranks_for_budget(plan, values, budget, keep_dense)
    walk = choose_shapes(plan, values, importances, budget.currencies, budget.limits(plan), keep_dense)
    return walk.kept(), named_ranks(plan, walk.ranks, walk.inner)


def optional_groups(plan: Plan, budget: Budget | None) -> frozenset[str]:
    """Names of the groups of neurons that ranks may make needless: not where milliseconds or MACs are bounded, which neurons save most of."""
    if budget is None or not plan.sites or budget.currencies != ("params",):
        return frozenset()
    return frozenset(g.name for g in plan.neurons if g.structure.optional)


def no_options(plan: Plan, budget: Budget | None) -> list[str]:
    """What to say where neurons are optional in vain."""
    if optional_groups(plan, budget) or not any(g.structure.optional for g in plan.neurons):
        return []
    return ["Channels(optional=True) has no effect here: it takes LowRank beside it, and a budget in parameters alone"]


def needless(
    plan: Plan, values: dict[str, Floats], importances: dict[str, Floats], budget: Budget, keep_dense: frozenset[str] = frozenset()
) -> frozenset[str]:
    """The optional groups, where a walk without them keeps at least as much of the network as one that may take units from all; else none.

    The greedy walk takes neurons while layers are dense and each saves a whole row; at the ranks that come later it would save little. Where
    ranks can do the same, and keep the best directions instead of the best axes, they then keep more.
    """
    optional = optional_groups(plan, budget)
    if not optional:
        return optional
    ranks_alone = replace(plan, neurons=[g for g in plan.neurons if g.name not in optional])
    limits = budget.limits(plan)
    try:
        shapes_for_budget(ranks_alone, values, importances, budget, keep_dense)  # by the rule that the run would follow
        both, without = (choose_shapes(p, values, importances, budget.currencies, limits, keep_dense) for p in (plan, ranks_alone))
    except InfeasibleBudgetError:
        return frozenset()
    return optional if without.gain() >= both.gain() else frozenset()


def choices_for(
    plan: Plan, values: dict[str, Floats], currencies: tuple[str, ...], keep_dense: frozenset[str] = frozenset()
) -> list[Choice]:
    """What may be kept of each site, priced in the given currencies. A site that was cut has no way back."""
    choices = []
    for site in plan.sites:
        held = site.name in keep_dense
        ranks = useful_ranks(site, currencies) if not held else [site.rank] if site.rank is not None else []
        costs = cut_costs(site, ranks, currencies)
        dense = dense_costs(site, currencies) if site.rank is None else None
        choice = low_rank_choice(site.name, values[site.name], ranks, costs, dense)
        if site.inner is not None and ranks and not (held and site.inner.rank is None):
            choice = with_inner(choice, site, site.inner, values, currencies)
        choices.append(choice)
    return choices


def with_inner(choice: Choice, site: Site, inner: Site, values: dict[str, Floats], currencies: tuple[str, ...]) -> Choice:
    """The same with each rank once more for every rank of the inner site that saves something; one that is cut already stays as it is."""
    grid = inner_ranks(site.unfolding.sides[1], site.structure.multiple) if inner.rank is None else np.array([inner.rank])
    cut = np.array([r is not None for r in choice.ranks])
    ranks = np.array([r for r in choice.ranks if r is not None])
    # The two parts of the first layer cost s (in + r k), that layer itself r k in.
    one, two = (cut_costs(site.inner_at(r), [1], currencies)[0] for r in (1, 2))
    whole = dense_costs(site.inner_at(1), currencies)
    more = grid[:, None] * (one + (ranks[:, None, None] - 1) * (two - one)) - ranks[:, None, None] * whole  # [ranks, grid, currencies]
    which, at = np.nonzero(np.any(more < 0, axis=2) | (inner.rank is not None))
    joint = values[inner.name]
    gains = choice.gains[cut][which] + joint[np.minimum(ranks[which], len(joint)) - 1, grid[at] - 1]
    options = tuple(zip(ranks[which].tolist(), grid[at].tolist(), strict=True))
    costs = choice.costs[cut][which] + more[which, at]
    if inner.rank is not None:
        return Choice(choice.name, options, gains, costs)
    return Choice(choice.name, choice.ranks + options, np.append(choice.gains, gains), np.append(choice.costs, costs, axis=0))


def useful_ranks(site: Site, currencies: tuple[str, ...]) -> list[int]:
    """Ranks below break-even in parameters and in one of the bounded costs, in the structure's multiples where there are any."""
    if site.inner is not None and site.inner.rank is not None:
        below = [site.rank or 1]  # three layers: final
    elif site.rank is not None:
        below = list(range(1, site.rank + 1))
    else:
        every = np.arange(1, site.break_even + 1, dtype=np.float64)
        below = [int(r) for r in every[np.any(cut_costs(site, every, currencies) < dense_costs(site, currencies), axis=1)]]
    rounded = [r for r in below if r % site.structure.multiple == 0 or r == site.rank]
    return rounded or below[-1:]


def is_met(plan: Plan, budget: Budget) -> bool:
    """Does the model, as it is cut now, keep within the budget?"""
    return bool(np.all(present_costs(plan, budget.currencies) <= budget.limits(plan)))


def cost_weights(plan: Plan, budget: Budget | None) -> dict[str, float]:
    r"""How much stronger a weight or a group is pressed, by what its units (of rank, or neurons) cost.

    In units of the root mean square value, dropping the value s of a k x n weight lowers the mean log share by about
    :math:`s^2 / k`; per cost c that is :math:`s^2 / (k c)`. One threshold on *this* for all weights is a threshold
    proportional to :math:`\sqrt{k c}` on s. The weights are scaled to a mean of 1; without a budget they are 1.
    """
    if budget is None:
        return dict.fromkeys([s.name for s in plan.sites] + [g.name for g in plan.neurons], 1.0)
    limits = budget.limits(plan)
    raw = {}
    for site in plan.sites:
        most = max(site.break_even, 2)
        first, last = cut_costs(site, [1, most], budget.currencies)
        raw[site.name] = math.sqrt(site.unfolding.full_rank * float(((last - first) / (most - 1) / limits).sum()))
    for group in plan.neurons:
        units = len(group.kept)
        raw[group.name] = math.sqrt(units * float((unit_costs(plan, group, budget.currencies) / limits).sum()))
    mean = sum(raw.values()) / len(raw)
    return {name: weight / mean for name, weight in raw.items()} if mean > 0 else dict.fromkeys(raw, 1.0)


def ranks_for_budget(
    plan: Plan,
    values: dict[str, Floats],
    budget: Budget,
    keep_dense: frozenset[str] = frozenset(),
    way: float = 1.0,
    trains_on: bool = False,
) -> Ranks:
    """Global rank choice by the product rule; None: stays dense.

    Args:
        way: see `Budget.limits`.
        trains_on: the network trains on afterwards. What a cut loses comes back then, and what a step costs counts: see `with_macs`.

    Raises:
        InfeasibleBudgetError: with the smallest feasible fraction in the message.
    """
    limits = budget.limits(plan, way)
    choices = choices_for(plan, values, budget.currencies, keep_dense)
    try:
        chosen = product_rule(choices, fixed_costs(plan, budget.currencies), limits)
    except InfeasibleBudgetError:
        raise infeasible(plan, budget, choices, limits) from None
    if trains_on and budget.currencies == ("params",) and plan.macs:
        with contextlib.suppress(InfeasibleBudgetError):  # where the bound leaves no choice
            choices, chosen = with_macs(plan, values, limits, keep_dense)
    pairs = {c.name: option if isinstance(option, tuple) else (option, 0) for c, option in zip(choices, chosen, strict=True)}
    return named_ranks(plan, {name: rank for name, (rank, _) in pairs.items()}, {name: inner for name, (_, inner) in pairs.items()})


def with_macs(plan: Plan, values: dict[str, Floats], limits: Floats, keep_dense: frozenset[str]) -> tuple[list[Choice], list[Option]]:
    """Where parameters alone are bounded, MACs are priced beside them, as a bound to the same share of them would, which need not hold.

    A layer that has few parameters and computes much (the early convolutions) else stays as it is: a budget in parameters does not see what it
    costs in training and in use (decision 0017).
    """
    names = ("params", "macs")
    choices = choices_for(plan, values, names, keep_dense)
    dense = model_costs(plan, names)
    prices = dense[0] / limits[0] / dense
    return choices, product_rule(choices, fixed_costs(plan, names), np.append(limits, math.inf), prices)


def infeasible(plan: Plan, budget: Budget, choices: list[Choice], limits: Floats) -> InfeasibleBudgetError:
    """The error that says what would be feasible."""
    parts, smallest = [], 0.0
    names = budget.currencies
    for k, (name, fixed, dense) in enumerate(zip(names, fixed_costs(plan, names), model_costs(plan, names), strict=True)):
        least = fixed + sum(c.costs[:, k].min() for c in choices)
        if least > limits[k]:
            currency = CURRENCIES[name]
            fraction = math.ceil(least / dense * 1e4) / 1e4
            smallest = max(smallest, fraction)
            asked, left = (f"{x:.0f}" if currency.whole else f"{x:.3g}" for x in (limits[k], least))
            parts.append(
                f"at most {asked} {currency.unit} are asked for, but {left} are left with every weight at its lowest rank; smallest feasible: {name}={fraction}"
            )
            parts[-1] += plan.out_of_reach if name == "params" else ""
    if not parts:
        factor = _smallest_factor(choices, fixed_costs(plan, names), limits)
        parts = [f"the bounds cannot hold together; feasible: each of them times {factor:.2f}"]
    return InfeasibleBudgetError("budget out of reach: " + "; ".join(parts), smallest)


def _smallest_factor(choices: list[Choice], fixed: Floats, limits: Floats) -> float:
    """How much more of everything would do, to one percent."""
    factor = 1.0
    while True:
        factor *= 1.01
        try:
            product_rule(choices, fixed, limits * factor)
        except InfeasibleBudgetError:
            continue
        return factor
