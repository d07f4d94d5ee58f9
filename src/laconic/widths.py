r"""Choose how many units every group keeps, and a rank for each weight: by what they are worth (`laconic.walk`), or all widths by the same part,

.. math:: \max p \quad \text{subject to} \quad \text{cost}(K(p)) \le \text{limit}, \qquad K_g(p) = \lfloor p\, n_g \rfloor

and what is left over to the groups that kept least. Groups that are alike (the hidden layers of all blocks, their heads) keep the same
number, and where that changes their parts by little the residual stream is as wide as its heads together: the network is the dense one with
other numbers in its configuration, and in multiples that the hardware likes where these leave little of the budget unused.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .allocate import Floats
from .errors import InfeasibleBudgetError
from .plan import Plan
from .structures import Neurons
from .walk import Walk

Alike = list[Neurons]
APART = 1.45  # for the sake of a stream as wide as its heads the parts of these and of other groups may differ by this factor
LANES = 8  # numbers that a vector unit, or a tensor core, takes at once: 17 channels take as long as 24
MULTIPLES = (LANES, 4, 2, 1)  # that are tried where nobody asked for one
FINE = 6  # a multiple that nobody asked for is at most this part of a group: 4 of the 32 places within a head, 8 of 64
USED = 0.97  # of the budget; a multiple that nobody asked for is not worth more


def choose_shapes(
    plan: Plan,
    values: dict[str, Floats],
    importances: dict[str, Floats],
    currencies: Sequence[str],
    limits: Floats,
    keep_dense: frozenset[str] = frozenset(),
) -> Walk:
    """How many units each group keeps, and a rank for each weight that goes with them, as a walk that has come to its end.

    Args:
        values: singular values by site; importances: shares of the units that are there, by group.
        limits: upper bounds on the whole cost, one for each currency.
        keep_dense: sites that must not be factorised.

    Raises:
        InfeasibleBudgetError: one unit of each group and rank 1 of each weight still cost too much.
    """
    start = Walk(plan, values, importances, tuple(currencies), limits, keep_dense)
    if any(group.structure.even for group in plan.neurons):
        return narrowed(start)
    ends = start.down()
    for walk in ends:
        walk.fill()
    return max(ends, key=Walk.gain)


def narrowed(walk: Walk) -> Walk:
    """The largest part of every width that the limits allow, or what is left of it. What has gone already makes no difference, so that a run that looks
    again and again on its way comes to the same end.

    Where the structure leaves the multiples to us: the largest that use the budget up, but for a little, and keep the stream as wide as its heads and the
    parts near each other; where none do all of that, those that do most of it, in the reverse of this order.

    Raises:
        InfeasibleBudgetError: not even one unit of each group fits.
    """
    dense = _with(walk, {group.name: group.group.units for group in walk.plan.neurons})
    if np.all(walk.spent <= walk.limits):
        return walk
    free = any(group.structure.multiple is None for group in walk.plan.neurons)
    ends: list[tuple[tuple[bool, bool, float], Walk]] = []
    for lanes in MULTIPLES if free else (1,):
        grid = _in_multiples(dense, lanes)
        try:
            tied, end = _narrowed(grid)
        except InfeasibleBudgetError:
            if lanes == 1:
                raise
            continue
        ends.append(((tied, _apart(end) <= APART, _used(end)), end))
        if ends[-1][0] >= (True, True, USED):
            break
    end = max(ends, key=lambda pair: pair[0])[1]
    left = _with(end, {name: min(count, walk.units[name]) for name, count in end.units.items()})
    if left.units != end.units:
        left = _filled(left, walk.units, alike(end.plan.neurons))
    return _with(walk, left.units)


def fine(units: int, lanes: int) -> int:
    """The largest power of two that is at most `lanes`, and a sixth of the units."""
    return min(lanes, 2 ** (max(units // FINE, 1).bit_length() - 1))


def _in_multiples(walk: Walk, lanes: int) -> Walk:
    """The same, where a group whose multiple is left to us keeps one of `lanes`, or less (`fine`)."""
    walk = walk.copy()
    walk.plan = replace(
        walk.plan,
        neurons=[
            group
            if group.structure.multiple is not None
            else replace(group, structure=replace(group.structure, multiple=fine(group.group.units, lanes)))
            for group in walk.plan.neurons
        ],
    )
    return walk


def _used(walk: Walk) -> float:
    """Of the tightest limit."""
    return float(np.max(walk.spent / walk.limits))


def _narrowed(dense: Walk) -> tuple[bool, Walk]:
    """Whether the stream is as wide as its heads where it was, and the end. Tried in this order: the stream as wide as its heads, a whole number of them (that next to the part which would stay of all, above or below,
    at which the parts differ least), where the parts are not too far apart; a whole number of heads alone; all by one part."""
    classes = alike(dense.plan.neurons)
    part, end = _largest(dense, classes)
    if end is None:
        raise InfeasibleBudgetError(*_at(dense, classes, 0.0).smallest())
    heads = [kind for kind in classes if kind[0].of_heads]
    streams = _as_wide_as_heads(classes)
    free, tied = classes, not streams
    for fixed, most in ((heads + streams, APART), (heads, math.inf)) if streams else ((heads, math.inf),):
        others = [kind for kind in classes if kind not in fixed]
        tried = [at for whole in _next_to(part, heads, fixed) if (at := _largest(_at(dense, fixed, whole), others)[1]) is not None]
        fitting = [(_apart(at), at) for at in tried if any(_part(at, kind) < 1 for kind in others)]  # else more could have stayed
        if fitting and (least := min(fitting, key=lambda pair: pair[0]))[0] <= most:
            end, free, tied = least[1], others, tied or fixed != heads
            break
    return tied, _filled(end, dense.units, free)


def alike(groups: list[Neurons]) -> list[Alike]:
    """Groups of as many units each, heads apart from others: as a configuration has one number for them. Without a residual stream each by itself."""
    if not any(group.norms for group in groups):
        return [[group] for group in groups]
    classes: dict[tuple[int, int, bool], Alike] = defaultdict(list)
    for group in groups:
        classes[group.group.units, group.multiple, group.of_heads].append(group)
    return list(classes.values())


def _as_wide_as_heads(classes: list[Alike]) -> list[Alike]:
    """Residual streams, and what is as wide, of as many channels as the readers of all heads take in; none where there are heads of several sizes."""
    heads = [kind[0].group for kind in classes if kind[0].of_heads]
    widths = {group.units * max(end.index.shape[1] for end in group.consumers) for group in heads}
    if len({group.units for group in heads}) != 1 or len(widths) != 1:
        return []
    return [kind for kind in classes if {kind[0].group.units} == widths and any(group.norms for group in kind)]


def _next_to(part: float, heads: list[Alike], fixed: list[Alike]) -> list[float]:
    """The parts below and above at which there are whole heads, and all that is fixed has a whole number of its multiples."""
    count = min((kind[0].group.units for kind in heads), default=0)
    step = math.lcm(*((most := count * kind[0].multiple) // math.gcd(most, kind[0].group.units) for kind in fixed)) if count else 1
    return [c / count for c in sorted({math.floor(part * count / step) * step, math.ceil(part * count / step) * step} - {0}) if c <= count]


def _part(walk: Walk, kind: Alike) -> float:
    """That these groups have kept."""
    return walk.units[kind[0].name] / kind[0].group.units


def _apart(walk: Walk) -> float:
    """The largest part of a group over the smallest."""
    parts = [walk.units[group.name] / group.group.units for group in walk.plan.neurons]
    return max(parts) / min(parts)


def _count(group: Neurons, part: float) -> int:
    """As many units, in multiples; one multiple at least."""
    return min(max(int(part * group.group.units / group.multiple + 1e-9), 1) * group.multiple, group.group.units)


def _with(walk: Walk, units: dict[str, int]) -> Walk:
    walk = walk.copy()
    for group in walk.plan.neurons:
        if units[group.name] != walk.units[group.name]:
            walk.go(group, (units[group.name], 0))
    return walk


def _at(walk: Walk, classes: list[Alike], part: float) -> Walk:
    """With this part of these groups."""
    return _with(walk, walk.units | {group.name: _count(group, part) for group in itertools.chain(*classes)})


def _largest(walk: Walk, classes: list[Alike]) -> tuple[float, Walk | None]:
    """The largest part of these groups that fits beside the others, by bisection; None where none does."""
    if np.all(walk.spent <= walk.limits):
        return 1.0, walk
    finest = max((group.group.units for group in itertools.chain(*classes)), default=1)
    low, high, found = 0.0, 1.0, _at(walk, classes, 0.0)
    if np.any(found.spent > found.limits):
        return low, None
    while high - low > 0.5 / finest:
        middle = (low + high) / 2
        there = _at(walk, classes, middle)
        if np.all(there.spent <= there.limits):
            low, found = middle, there
        else:
            high = middle
    return low, found


def _filled(walk: Walk, most: dict[str, int], classes: list[Alike]) -> Walk:
    """What rounding has left over: a class at a time, the one that has kept least first, while it fits."""
    while True:
        for kind in sorted(classes, key=lambda kind: _part(walk, kind)):
            counts = {group.name: min(walk.units[group.name] + group.multiple, most[group.name]) for group in kind}
            more = _with(walk, walk.units | counts)
            if more.units != walk.units and np.all(more.spent <= more.limits):
                walk = more
                break
        else:
            return walk
