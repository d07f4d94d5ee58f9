"""The currencies of a budget: what a model, a dense weight, and a weight cut to a rank cost in each of them.

A currency is a row of `CURRENCIES`; nothing else in the package asks which one it is dealing with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidValueError
from .plan import Plan
from .structures import Site, WideLayer

Floats = NDArray[np.float64]
Ranks = dict[str, int | None]


@dataclass(frozen=True, slots=True)
class Currency:
    """Attributes:
    fraction, absolute: the keywords of `Budget`.
    unit: how to print an amount.
    whole: amounts are whole numbers.
    model: cost of the dense model; None where what it takes to know it is missing.
    dense: cost of a dense weight.
    cut: cost of a weight at each of these ranks.
    fixed: what no structure can remove.
    missing: what to say where the cost of the model is None.
    """

    fraction: str
    absolute: str
    unit: str
    whole: bool
    model: Callable[[Plan], float | None]
    dense: Callable[[Site], float]
    cut: Callable[[Site, Floats], Floats]
    fixed: Callable[[Plan], float]
    missing: str = ""


def known(value: Any) -> Any:
    """A number that must have been measured or counted by now."""
    assert value is not None
    return value


CURRENCIES = {
    c.fraction: c
    for c in (
        Currency(
            "params", "max_params", "params", True,
            model=lambda plan: plan.params,
            dense=lambda site: site.unfolding.dense_params,
            cut=lambda site, ranks: ranks * site.unfolding.unit_params,
            fixed=lambda plan: plan.fixed_params,
        ),
        Currency(
            "macs", "max_macs", "macs", True,
            model=lambda plan: plan.macs,
            dense=lambda site: known(site.dense_macs),
            cut=lambda site, ranks: ranks * known(site.unit_macs),
            fixed=lambda plan: plan.fixed_macs,
            missing="a budget in MACs needs example_inputs=(...), to count them on",
        ),
        Currency(
            "latency", "latency_ms", "ms", False,
            model=lambda plan: plan.latency_ms,
            dense=lambda site: known(site.times).dense,
            cut=lambda site, ranks: np.array([known(site.times).at(int(r)) for r in ranks]),
            fixed=lambda plan: known(plan.fixed_ms) - sum(x.ms_at(*x.dense) - x.ms_at(x.out, x.taken) for x in plan.layers),
            missing="a budget in milliseconds needs example_inputs=(...), to measure on",
        ),
    )
}  # fmt: skip
COLUMNS = {name: i for i, name in enumerate(CURRENCIES)}


def model_costs(plan: Plan, names: Sequence[str]) -> Floats:
    """Costs of the dense model, one per currency."""
    for name in names:
        cost = CURRENCIES[name].model(plan)
        if cost is None:
            raise InvalidValueError(CURRENCIES[name].missing)
        if cost == 0:  # a network of lookups and sums has no MACs
            raise InvalidValueError(f"Budget({name}=): on the example inputs the model has none that are counted; bound params=")
    return np.array([CURRENCIES[name].model(plan) for name in names], dtype=np.float64)


def fixed_costs(plan: Plan, names: Sequence[str]) -> Floats:
    return np.array([CURRENCIES[name].fixed(plan) for name in names], dtype=np.float64)


def dense_costs(site: Site, names: Sequence[str]) -> Floats:
    return np.array([CURRENCIES[name].dense(site) for name in names], dtype=np.float64)


def cut_costs(site: Site, ranks: Sequence[int] | Floats, names: Sequence[str]) -> Floats:
    """Costs `[len(ranks), currencies]`."""
    given = np.asarray(ranks, dtype=np.float64)
    return np.stack([CURRENCIES[name].cut(site, given) for name in names], axis=1).astype(np.float64)


def present_costs(plan: Plan, names: Sequence[str], ranks: Ranks | None = None) -> Floats:
    """Costs of the model as it is cut now, or would be at these ranks."""
    total = fixed_costs(plan, names)
    for site in plan.sites:
        rank = site.rank if ranks is None else ranks[site.name]
        total += dense_costs(site, names) if rank is None else cut_costs(site, [rank], names)[0]
        if site.inner is None or rank is None:
            continue
        inner_rank = site.inner.rank if ranks is None else ranks.get(site.inner.name)
        if inner_rank is not None:
            inner = site.inner_at(rank)
            total += cut_costs(inner, [inner_rank], names)[0] - dense_costs(inner, names)
    return total


def named_ranks(plan: Plan, ranks: Ranks, inner: dict[str, int]) -> Ranks:
    """All ranks by the names of their sites; `inner` has those of inner sites by the site around them, 0 where it stays whole."""
    return ranks | {s.inner.name: inner[s.name] or None for s in plan.sites if s.inner is not None}


@dataclass(frozen=True, slots=True)
class Rates:
    """What a layer costs for each channel and pair of channels: what `layer_cost` needs, looked up once.

    Attributes:
        beside, weight: parameters and MACs under no site, for each output channel and for each pair of channels.
        dense: parameters and MACs of the site's weight for each pair of channels; (0, 0) without a site.
        first, second: of a unit of rank, for each channel that is taken in, and that is put out.
        entry: of a channel between the two parts of an inner site, for each channel that is taken in.
        ms: milliseconds under no site, for each output channel and for each pair of channels.
        site: with its times, if it has some; now: the channels that those were measured for.
    """

    beside: Floats
    weight: Floats
    dense: Floats
    first: Floats
    second: Floats
    entry: Floats
    ms: tuple[float, float]
    site: Site | None
    now: tuple[int, int]

    @staticmethod
    def of(layer: WideLayer) -> Rates:
        nothing = np.zeros(2)
        beside = np.array([layer.beside, layer.beside_macs])
        weight = layer.weight * np.array([1.0, layer.positions])
        site, now, ms = layer.site, (layer.out, layer.taken), (layer.beside_ms, layer.weight_ms)
        if site is None:
            return Rates(beside, weight, nothing, nothing, nothing, nothing, ms, None, now)
        (first, second), (at_dense, at_first, at_second) = site.unfolding.unit_parts, site.positions or (0, 0, 0)
        dense = site.unfolding.dense_params / (layer.out * layer.taken) * np.array([1.0, at_dense])
        return Rates(
            beside,
            weight,
            dense,
            first / layer.taken * np.array([1.0, at_first]),
            second / layer.out * np.array([1.0, at_second]),
            np.array([1.0, (site.inner.positions or (0, 0, 0))[1] if site.inner is not None else 0]),
            ms,
            site,
            now,
        )


def layer_costs(
    rates: Rates, out: int, taken: int, ranks: Sequence[int] | None, names: Sequence[str], inner: Sequence[int] | int = 0
) -> Floats:
    """What a layer would cost with these numbers of channels, `[len(ranks), currencies]`; with None for ranks dense, `[1, currencies]`.

    Parameters and MACs exactly; a time is taken to change as the parameters do.

    Args:
        inner: ranks of the inner site, one for all or as many as `ranks`; 0: it stays whole.
    """
    fixed = rates.beside * out + rates.weight * (out * taken)
    if ranks is None:
        counts = (fixed + rates.dense * (out * taken))[None]
    elif not (inner if isinstance(inner, int) else any(inner)):
        counts = fixed + np.asarray(ranks, dtype=np.float64)[:, None] * (rates.first * taken + rates.second * out)
    else:
        r, s = (np.asarray(x, dtype=np.float64)[..., None] for x in (ranks, inner))
        counts = fixed + r * (rates.first * np.where(s > 0, s, taken) + rates.second * out) + s * rates.entry * taken
    if "latency" in names:
        counts = np.column_stack([counts, _layer_times(rates, out, taken, ranks)])
    return counts[:, [COLUMNS[name] for name in names]]


def _layer_times(rates: Rates, out: int, taken: int, ranks: Sequence[int] | None) -> Floats:
    times = rates.site.times if rates.site is not None else None
    count = 1 if ranks is None else len(ranks)
    beside = np.full(count, rates.ms[0] * out + rates.ms[1] * out * taken)
    if times is None:
        return beside
    now_out, now_taken = rates.now
    if ranks is None:
        return beside + times.dense * out * taken / (now_out * now_taken)
    share = (rates.first[0] * taken + rates.second[0] * out) / (rates.first[0] * now_taken + rates.second[0] * now_out)
    return beside + np.array([times.at(r) * share for r in ranks])
