"""Targets: how much the compressed model may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .allocate import Choice, Floats, low_rank_choice, product_rule
from .errors import InfeasibleBudgetError, InvalidValueError
from .plan import Plan


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds on the cost of the compressed model; several hold at once.

    Args:
        params: fraction of the dense model's parameters, above 0 and at most 1.
        macs: fraction of its multiply-accumulates on the example inputs.
        max_params, max_macs: the same as absolute numbers.
    """

    params: float | None = None
    macs: float | None = None
    max_params: int | None = None
    max_macs: int | None = None

    def __post_init__(self) -> None:
        for name in ("params", "macs"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InvalidValueError(
                    f"Budget({name}={value}): a fraction of the dense cost, above 0 and at most 1; absolute: max_{name}="
                )
        for name in ("max_params", "max_macs"):
            value = getattr(self, name)
            if value is not None and not (value >= 1 and math.isfinite(value)):
                raise InvalidValueError(f"Budget({name}={value}): must be a number, at least 1")
            if value is not None and getattr(self, name.removeprefix("max_")) is not None:
                short = name.removeprefix("max_")
                raise InvalidValueError(f"Budget({short}=, {name}=): one cost given twice; give the fraction or the absolute number")
        if not self.currencies:
            raise InvalidValueError("Budget(): give at least one of params=, macs=, max_params=, max_macs=")

    @property
    def currencies(self) -> tuple[str, ...]:
        """The costs that are bounded: "params", "macs"."""
        return tuple(c for c in ("params", "macs") if getattr(self, c) is not None or getattr(self, f"max_{c}") is not None)

    @property
    def needs_inputs(self) -> bool:
        return "macs" in self.currencies

    def limits(self, plan: Plan) -> Floats:
        """The bounds as absolute numbers, one per currency."""
        return np.array(
            [
                math.floor(getattr(self, c) * dense_cost(plan, c)) if getattr(self, c) is not None else getattr(self, f"max_{c}")
                for c in self.currencies
            ],
            dtype=np.float64,
        )


def dense_cost(plan: Plan, currency: str) -> int:
    if currency == "params":
        return plan.params
    if plan.macs is None:
        raise InvalidValueError("a budget in MACs needs example_inputs=(...), to count them on")
    return plan.macs


def choices_for(
    plan: Plan, values: dict[str, Floats], currencies: tuple[str, ...], keep_dense: frozenset[str] = frozenset()
) -> list[Choice]:
    """What may be kept of each site, priced in the given currencies."""
    choices = []
    for site in plan.sites:
        units = {"params": site.unfolding.unit_params, "macs": site.unit_macs}
        dense = {"params": site.unfolding.dense_params, "macs": site.dense_macs}
        unit_costs = np.array([units[c] for c in currencies], dtype=np.float64)
        dense_costs = np.array([dense[c] for c in currencies], dtype=np.float64)
        largest = 0 if site.name in keep_dense else largest_useful_rank(site.break_even, unit_costs, dense_costs)
        choices.append(low_rank_choice(site.name, values[site.name], unit_costs, dense_costs, largest, site.structure.rank_multiple))
    return choices


def largest_useful_rank(break_even: int, unit_costs: Floats, dense_costs: Floats) -> int:
    """The largest rank below break-even in parameters and in every bounded cost."""
    below = [math.ceil(d / u) - 1 for u, d in zip(unit_costs, dense_costs, strict=True) if u > 0]
    return max(min([break_even, *below]), 0)


def ranks_for_budget(
    plan: Plan, values: dict[str, Floats], budget: Budget, keep_dense: frozenset[str] = frozenset()
) -> dict[str, int | None]:
    """Global rank choice by the product rule; None: stays dense.

    Raises:
        InfeasibleBudgetError: with the smallest feasible fraction in the message.
    """
    fixed = {"params": plan.fixed_params, "macs": plan.fixed_macs if plan.macs is not None else 0}
    limits = budget.limits(plan)
    choices = choices_for(plan, values, budget.currencies, keep_dense)
    try:
        chosen = product_rule(choices, np.array([fixed[c] for c in budget.currencies], dtype=np.float64), limits)
    except InfeasibleBudgetError:
        raise infeasible(plan, budget, choices, limits) from None
    return {c.name: r for c, r in zip(choices, chosen, strict=True)}


def infeasible(plan: Plan, budget: Budget, choices: list[Choice], limits: Floats) -> InfeasibleBudgetError:
    """The error that says what would be feasible."""
    fixed = {"params": plan.fixed_params, "macs": plan.fixed_macs if plan.macs is not None else 0}
    parts, smallest = [], 0.0
    for k, currency in enumerate(budget.currencies):
        least = fixed[currency] + sum(c.costs[:, k].min() for c in choices)
        if least > limits[k]:
            dense = dense_cost(plan, currency)
            fraction = math.ceil(least / dense * 1e4) / 1e4
            smallest = max(smallest, fraction)
            parts.append(
                f"at most {limits[k]:.0f} {currency} are asked for, but {least:.0f} are left with every weight at its lowest rank; smallest feasible: {currency}={fraction}"
            )
    return InfeasibleBudgetError("budget out of reach: " + "; ".join(parts or ["the bounds cannot hold together"]), smallest)
