"""Which layers were cut, read from the model itself, and the same cuts again on a fresh dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..errors import ArchitectureMismatchError
from ..matricize import Layer, unfoldings
from .factorize import MARK, empty_pair, finish_pair


@dataclass(frozen=True, slots=True)
class Cut:
    """One factorised layer.

    Attributes:
        names: every path at which the layer sits in the model (several where a module is shared).
        kind: class name of the dense layer.
        unfolding: name of the unfolding (see `laconic.matricize`).
        shape: shape of the dense weight.
        rank: width between the two layers, per group.
    """

    names: tuple[str, ...]
    kind: str
    unfolding: str
    shape: tuple[int, ...]
    rank: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Cut:
        return Cut(tuple(data["names"]), str(data["kind"]), str(data["unfolding"]), tuple(data["shape"]), int(data["rank"]))


def find_cuts(model: nn.Module) -> list[Cut]:
    """The cuts in a model, outer ones first (a factor may itself have been cut again)."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, MARK):
            names.setdefault(module, []).append(name)
    return [Cut.from_json({"names": tuple(paths), **getattr(module, MARK)}) for module, paths in names.items()]


def put(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` at the path `name`; returns what was there."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    before = parent._modules[child]
    parent._modules[child] = module
    assert before is not None
    return before


def replay(model: nn.Module, cuts: Sequence[Cut]) -> list[tuple[str, nn.Module]]:
    """Make the same cuts on a fresh dense model; the factors' values are left unset.

    Returns what was replaced, so that `undo` can put it back. On a mismatch the model is as it was.
    """
    done: list[tuple[str, nn.Module]] = []
    try:
        for cut in cuts:
            name = cut.names[0]
            try:
                module: Layer = model.get_submodule(name)
            except AttributeError:
                raise ArchitectureMismatchError(f"the saved model has a layer {name!r} ({cut.kind}), which this model lacks") from None
            fitting = [u for u in unfoldings(module) if u.name == cut.unfolding]
            if type(module).__name__ != cut.kind or not fitting or fitting[0].shape != cut.shape:
                shape = tuple(module.weight.shape) if hasattr(module, "weight") else "no weight"
                raise ArchitectureMismatchError(
                    f"layer {name!r}: saved from a {cut.kind} with weight {cut.shape}, this model has a {type(module).__name__} with {shape}"
                )
            pair = finish_pair(empty_pair(module, fitting[0], cut.rank), module, fitting[0], cut.rank)
            done.extend((path, put(model, path, pair)) for path in cut.names)
    except (ArchitectureMismatchError, AttributeError, KeyError):
        undo(model, done)
        raise
    return done


def undo(model: nn.Module, done: Sequence[tuple[str, nn.Module]]) -> None:
    """Put replaced modules back, last first."""
    for name, module in reversed(done):
        put(model, name, module)
