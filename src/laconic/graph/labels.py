"""Units, which of them are tied or held, and the labels that tensors carry."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..measure import call, evaluating, seeded
from ..surgery.channels import Ints


class Units:
    """Which units are tied (union-find), and which are held, with the reason. Unit 0 means no unit.

    Attributes:
        holds: units and the reason, one entry for each time; whether it counts is seen at the end (`held`).
    """

    def __init__(self) -> None:
        self.parent = np.zeros(1, dtype=np.int64)
        self.holds: list[tuple[Ints, str]] = []

    def new(self, count: int) -> Ints:
        first = len(self.parent)
        ids = np.arange(first, first + count)
        self.parent = np.concatenate([self.parent, ids])
        return ids

    def find(self, ids: Ints) -> Ints:
        """The representatives."""
        roots = self.parent[ids]
        while not np.array_equal(roots, up := self.parent[roots]):
            roots = up
        return roots

    def tie(self, a: Ints, b: Ints) -> None:
        """Tie `a[i]` to `b[i]`."""
        a, b = self.find(a.ravel()), self.find(b.ravel())
        differ = a != b
        for x, y in {(int(x), int(y)) for x, y in zip(a[differ], b[differ], strict=True)}:
            low, high = sorted(int(r) for r in self.find(np.array([x, y])))
            if low != high:
                self.parent[high] = low

    def hold(self, ids: Ints, reason: str) -> None:
        if ids.any():
            self.holds.append((ids[ids != 0], reason))

    def held(self, counts: int) -> dict[int, str]:
        """Why units stay, by their representative: the first of the reasons whose bits are set in `counts`."""
        held: dict[int, str] = {}
        for i, (ids, reason) in enumerate(self.holds):
            for root in np.unique(self.find(ids)) if counts >> i & 1 else ():
                held.setdefault(int(root), reason)
        return held

    def meet(self, a: Ints, b: Ints, reason: str) -> Ints:
        """Tie two rows of units place by place; a unit that meets no unit is held."""
        self.hold(a[b == 0], reason)
        self.hold(b[a == 0], reason)
        both = (a != 0) & (b != 0)
        self.tie(a[both], b[both])
        return np.where(a != 0, a, b)


@dataclasses.dataclass(frozen=True, slots=True)
class Label:
    """Along this axis of a tensor, the unit of each position (0: none)."""

    axis: int
    ids: Ints


# What encoder-decoders of Hugging Face return beside what they are asked for: their decoder has read it, and its width may fall.
HANDED_ON = "encoder_last_hidden_state"


def leaves(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, dicts and dataclasses but what an encoder has handed on; other objects (caches) are not looked into."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from leaves(value) if key != HANDED_ON else ()
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from leaves(value)
    elif dataclasses.is_dataclass(values) and not isinstance(values, type):
        for field in dataclasses.fields(values):
            yield from leaves(getattr(values, field.name))


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Copies of the tensors that a model returns in eval mode; what is random there, too, is the same each time."""
    with evaluating(model), seeded():
        return [x.detach().clone() for x in leaves(call(model, inputs))]
