"""Which layers were slimmed and cut, read from the model itself, and the same again on a fresh dense model.

Slimming is replayed first: a cut is recorded with the shape of the slim layer, in whatever order the two were done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ArchitectureMismatchError
from ..matricize import Layer, unfoldings
from .channels import SIDES, apply, for_channels, replayed, tied, width
from .factorize import MARK, SLIM, new_pair


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


@dataclass(frozen=True, slots=True)
class Slim:
    """One layer that lost channels, or a module whose count of heads shrank.

    Attributes:
        names: every path at which it sits in the model.
        kind: class name of the dense layer.
        dense: channels of the dense layer, for each side (`"out"`, `"in"`, a parameter of the model's own) that lost some.
        kept: for each such side the channels that are left, by their dense numbers.
        sizes: the module's attributes that say how wide it is, as they are now (`out_features`, `groups`, `num_heads`, `normalized_shape`, `scaling`).
    """

    names: tuple[str, ...]
    kind: str
    dense: dict[str, int]
    kept: dict[str, list[int]]
    sizes: dict[str, int | float | tuple[int, ...]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Slim:
        dense = {str(side): int(n) for side, n in data["dense"].items()}
        sizes = {str(k): v if isinstance(v, (int, float)) else tuple(int(n) for n in v) for k, v in data["sizes"].items()}
        kept = {str(side): [int(c) for c in channels] for side, channels in data["kept"].items()}
        return Slim(tuple(data["names"]), str(data["kind"]), dense, kept, sizes)


def find_slims(model: nn.Module) -> list[Slim]:
    """The slim layers of a model, and the modules whose counts shrank with them."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, SLIM):
            names.setdefault(module, []).append(name)
    return [Slim.from_json({"names": tuple(paths), **getattr(module, SLIM)}) for module, paths in names.items()]


def replay_slims(model: nn.Module, slims: Sequence[Slim]) -> Callable[[], None]:
    """Make the same layers slim on a fresh dense model; returns what puts it back. On a mismatch the model is as it was."""
    edits = []
    for slim in slims:
        name = slim.names[0]
        module = _layer(model, name, slim.kind)
        missing = [side for side in slim.dense if side not in SIDES and not _vector(getattr(module, side, None))]
        if type(module).__name__ == slim.kind and missing:
            raise ArchitectureMismatchError(
                f"layer {name!r}: saved with a number for each channel in {missing[0]!r}, which this model's lacks"
            )
        if type(module).__name__ != slim.kind or not all(hasattr(module, size) for size in slim.sizes):
            raise ArchitectureMismatchError(
                f"layer {name!r}: saved from a {slim.kind}, this model has a {type(module).__name__}{_way_out(module)}"
            )
        for side, dense in slim.dense.items():
            if width(module, side) != dense:
                cut = "; it has lost channels already: load needs a fresh dense model" if hasattr(module, SLIM) else ""
                raise ArchitectureMismatchError(
                    f"layer {name!r}: saved from a {slim.kind} with {dense} channels on side {side!r}, this model's has {width(module, side)}{cut}"
                )
        edits += replayed(name, module, slim.kept, slim.sizes)
    return apply(tied(edits))


def _vector(value: Any) -> bool:
    return isinstance(value, Tensor) and for_channels(value)


def _layer(model: nn.Module, name: str, kind: str) -> Layer:
    try:
        layer: Layer = model.get_submodule(name)
    except AttributeError:
        parent, _, _ = name.rpartition(".")
        above = dict(model.named_modules()).get(parent)
        raise ArchitectureMismatchError(f"the saved model has a layer {name!r} ({kind}), which this model lacks{_way_out(above)}") from None
    return layer


def _way_out(module: nn.Module | None) -> str:
    return ": the saved one was unfused, laconic.unfuse(model) first" if isinstance(module, nn.MultiheadAttention) else ""


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
            module = _layer(model, name, cut.kind)
            fitting = [u for u in unfoldings(module, embeddings=True) if u.name == cut.unfolding]
            if type(module).__name__ != cut.kind or not fitting or fitting[0].shape != cut.shape:
                shape = tuple(module.weight.shape) if hasattr(module, "weight") else "no weight"
                raise ArchitectureMismatchError(
                    f"layer {name!r}: saved from a {cut.kind} with weight {cut.shape}, this model has a {type(module).__name__} with {shape}"
                )
            pair = new_pair(module, fitting[0], cut.rank)
            done.extend((path, put(model, path, pair)) for path in cut.names)
    except (ArchitectureMismatchError, AttributeError, KeyError):
        undo(model, done)
        raise
    return done


def undo(model: nn.Module, done: Sequence[tuple[str, nn.Module]]) -> None:
    """Put replaced modules back, last first."""
    for name, module in reversed(done):
        put(model, name, module)
