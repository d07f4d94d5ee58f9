r"""Choose how many units every group keeps, and a rank for each weight: by what they are worth (`laconic.walk`), or all widths by the same part,

.. math:: \max p \quad \text{subject to} \quad \text{cost}(K(p)) \le \text{limit}, \qquad K_g(p) = \lfloor p\, n_g \rfloor

and what is left over to the groups that kept least. Groups that are alike (the hidden layers of all blocks, their heads) keep the same
number, and where that changes their parts by little the residual stream is as wide as its heads together: the network is the dense one with
other numbers in its configuration.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from .allocate import Floats
from .errors import InfeasibleBudgetError
from .plan import Plan
from .structures import Neurons
from .walk import Walk

Alike = list[Neurons]
APART = 4 / 3  # for the sake of a stream as wide as its heads the parts of these and of other groups may differ by this factor


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
    """The largest part of every width that the limits allow.

    Tried in this order: the stream as wide as its heads, a whole number of them (that next to the part which would stay of all, above or below,
    at which the parts differ least), where the parts are not too far apart; a whole number of heads alone; all by one part.

    Raises:
        InfeasibleBudgetError: not even one unit of each group fits.
    """
    if np.all(walk.spent <= walk.limits):
        return walk
    classes = alike(walk.plan.neurons)
    part, end = _largest(walk, classes)
    if end is None:
        raise InfeasibleBudgetError(*_at(walk, classes, 0.0).smallest())
    heads = [kind for kind in classes if kind[0].of_heads]
    streams = _as_wide_as_heads(classes)
    for fixed, most in ((heads + streams, APART), (heads, math.inf)) if streams else ((heads, math.inf),):
        free = [kind for kind in classes if kind not in fixed]
        tried = [at for whole in _next_to(part, heads, fixed) if (at := _largest(_at(walk, fixed, whole), free)[1]) is not None]
        fitting = [(_apart(at), at) for at in tried if any(_part(at, kind) < 1 for kind in free)]  # else more could have stayed
        if fitting and (least := min(fitting, key=lambda pair: pair[0]))[0] <= most:
            return _filled(least[1], walk.units, free)
    return _filled(end, walk.units, classes)


def alike(groups: list[Neurons]) -> list[Alike]:
    """Groups of as many units each, of as many channels in as many places."""
    classes: dict[tuple[int, ...], Alike] = defaultdict(list)
    for group in groups:
        classes[group.group.units, group.multiple, *sorted(end.index.shape[1] for end in group.group.ends)].append(group)
    return list(classes.values())


def _as_wide_as_heads(classes: list[Alike]) -> list[Alike]:
    """Residual streams of as many channels as the readers of all heads take in; none where there are heads of several sizes."""
    heads = {
        (g.group.units, g.group.units * max(end.index.shape[1] for end in g.group.consumers)) for kind in classes if (g := kind[0]).of_heads
    }
    return [kind for kind in classes if kind[0].norms and {width for _, width in heads} == {kind[0].group.units}] if len(heads) == 1 else []


def _next_to(part: float, heads: list[Alike], fixed: list[Alike]) -> list[float]:
    """The parts below and above at which there are whole heads, where all that is fixed has a whole number of its multiples."""
    count = min((kind[0].group.units for kind in heads), default=0)
    counts = sorted({math.floor(part * count), math.ceil(part * count)} - {0})
    return [c / count for c in counts if all(c * kind[0].group.units % (count * kind[0].multiple) == 0 for kind in fixed)]


def _part(walk: Walk, kind: Alike) -> float:
    """That these groups have kept."""
    return walk.units[kind[0].name] / kind[0].group.units


def _apart(walk: Walk) -> float:
    """The largest part of a group over the smallest."""
    parts = [walk.units[group.name] / group.group.units for group in walk.plan.neurons]
    return max(parts) / min(parts)


def _count(group: Neurons, part: float) -> int:
    """As many units, in multiples; one multiple at least."""
    return max(int(part * group.group.units / group.multiple + 1e-9), 1) * group.multiple


def _at(walk: Walk, classes: list[Alike], part: float) -> Walk:
    """With this part of these groups, or what is left of them."""
    walk = walk.copy()
    for group in itertools.chain(*classes):
        if (count := _count(group, part)) < walk.units[group.name]:
            walk.go(group, (count, 0))
    return walk


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
            more = walk.copy()
            for group in kind:
                if (count := more.units[group.name] + group.multiple) <= most[group.name]:
                    more.go(group, (count, 0))
            if more.units != walk.units and np.all(more.spent <= more.limits):
                walk = more
                break
        else:
            return walk
