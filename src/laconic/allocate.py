r"""Choose all ranks together: what to keep of every layer under limits on the whole model's cost.

**Product rule.** Maximise the product of the retained shares,

.. math:: \max \prod_l \frac{\sum_{i \le r_l} s_{l,i}^2}{\sum_i s_{l,i}^2}
          \quad \text{subject to} \quad \text{cost}(r_1, \dots, r_L) \le \text{limit}

Adding up lost energies instead starves one layer when the budget is tight; a product cannot afford to let any factor
go to zero. In logarithms the objective is a sum, concave in each rank, so a greedy walk along each layer's concave
hull is optimal up to the last step that does not fit; what is left over is then filled with the best that still fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InfeasibleBudgetError

Floats = NDArray[np.float64]
REWEIGHTINGS = 40
Option = int | tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Choice:
    """What may be kept of one weight. Entry j: `ranks[j]` (None: dense; two: of the site and of its inner one) has `gains[j]` and `costs[j]` (one per limit)."""

    name: str
    ranks: tuple[Option, ...]
    gains: Floats
    costs: Floats


def log_shares(values: Floats) -> Floats:
    """log of the share of squared values that the r largest keep, for r = 1..k (values non-increasing)."""
    top = values[0] if len(values) and values[0] > 0 else 1.0
    squares = (values / top) ** 2
    total = squares.sum()
    if total == 0:
        return np.zeros(len(values))
    lost = np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0)  # summed from the small end: no cancellation
    return np.log1p(-np.minimum(lost / total, 1 - 1e-16))


def low_rank_choice(name: str, values: Floats, ranks: Sequence[int], costs: Floats, dense_costs: Floats | None) -> Choice:
    """The given ranks (increasing) with their costs `[ranks, limits]`, then dense, unless its costs are None."""
    shares = log_shares(values)
    known = [i for i, r in enumerate(ranks) if r <= len(values)]
    options: list[Option] = [ranks[i] for i in known]
    gains = [float(shares[ranks[i] - 1]) for i in known]
    rows = [costs[i] for i in known]
    if dense_costs is not None:
        options, gains, rows = [*options, None], [*gains, 0.0], [*rows, dense_costs]
    return Choice(name, tuple(options), np.array(gains), np.array(rows, dtype=np.float64).reshape(len(gains), -1))


def product_rule(choices: Sequence[Choice], fixed: Floats, limits: Floats, prices: Floats | None = None) -> list[Option]:
    """The rank of every choice (None: dense): the largest sum of gains within all `limits`.

    Args:
        fixed: what the rest of the model costs, one number per limit.
        limits: upper bounds on the whole cost; infinite where a cost is priced alone.
        prices: of a unit of each cost; None: the costs relative to their limits.

    The costs are one in the sum of what they are worth; a limit that the cheapest choices break counts for more, until
    they hold all of them (Lagrangian relaxation).

    Raises:
        InfeasibleBudgetError: even the cheapest choices cost more than a limit.
    """
    weights = 1 / np.maximum(limits, 1e-300) if prices is None else prices
    for _ in range(REWEIGHTINGS if len(limits) > 1 else 1):
        scalar = [c.costs @ weights for c in choices]
        now = [int(np.lexsort((-c.gains, s))[0]) for c, s in zip(choices, scalar, strict=True)]  # the best of the cheapest
        spent = fixed + sum((c.costs[j] for c, j in zip(choices, now, strict=True)), np.zeros_like(fixed))
        if np.all(spent <= limits):
            break
        weights = np.where(spent > limits, 1.2 * weights, weights)  # what is cheap in one cost may be dear in another
    else:
        worst = int(np.argmax(spent / limits))
        raise InfeasibleBudgetError(f"budget: the smallest possible is {spent[worst]:.0f}, above the limit of {limits[worst]:.0f}", 0.0)

    steps = [(-slope, i, option) for i, choice in enumerate(choices) for slope, option in concave_hull(scalar[i], choice.gains, now[i])]
    stopped: set[int] = set()
    for _, i, option in sorted(steps):  # steepest first
        change = choices[i].costs[option] - choices[i].costs[now[i]]
        if i not in stopped and np.all(spent + change <= limits):
            spent, now[i] = spent + change, option
        else:
            stopped.add(i)

    while True:  # fill the rest: the best gain per cost among all that still fits
        best: tuple[float, float, int, int] | None = None
        for i, (choice, cost) in enumerate(zip(choices, scalar, strict=True)):
            fits = (cost > cost[now[i]]) & (choice.gains >= choice.gains[now[i]])
            fits &= np.all(spent + choice.costs - choice.costs[now[i]] <= limits, axis=1)
            if not fits.any():
                continue
            slopes = np.where(fits, (choice.gains - choice.gains[now[i]]) / np.where(fits, cost - cost[now[i]], 1.0), -np.inf)
            j = int(np.lexsort((cost, -slopes))[0])
            candidate = (float(slopes[j]), -float(cost[j]), i, j)
            best = candidate if best is None or candidate[:2] > best[:2] else best
        if best is None:
            return [c.ranks[j] for c, j in zip(choices, now, strict=True)]
        _, _, which, option = best
        spent, now[which] = spent + choices[which].costs[option] - choices[which].costs[now[which]], option


def concave_hull(cost: Floats, gain: Floats, start: int) -> list[tuple[float, int]]:
    """The corners of the upper concave hull of (cost, gain) from `start` on, each with the slope that leads to it."""
    corners = [start]
    slopes: list[float] = []
    for option in np.lexsort((-gain, cost)):
        if cost[option] <= cost[corners[-1]] or gain[option] <= gain[corners[-1]]:
            continue
        while True:
            slope = float((gain[option] - gain[corners[-1]]) / (cost[option] - cost[corners[-1]]))
            if not slopes or slopes[-1] >= slope:
                break
            corners.pop()
            slopes.pop()
        corners.append(int(option))
        slopes.append(slope)
    return list(zip(slopes, corners[1:], strict=True))


def energy_rule(values: Floats, share: float) -> int:
    """The paper's per-layer rule: the smallest r that keeps at least `share` of the squared values; at least 1."""
    squares = (values / max(values[0], 1e-300)) ** 2
    kept = np.cumsum(squares)
    return int(np.argmax(kept >= share * kept[-1])) + 1


def numerical_rank(values: Floats, epsilon: float, size: int) -> int:
    """How many values are above rounding; at least 1.

    Entries stored to a precision of `epsilon` move singular values by up to about half of epsilon times the root mean
    square value; the arithmetic, float32 at least, adds `s_max * sqrt(size)` times its own.
    """
    stored = epsilon * float(np.sqrt(np.mean(values**2)))
    computed = min(epsilon, 2.0**-23) * float(values[0]) * size**0.5
    return max(int(np.sum(values > max(stored, computed))), 1)
