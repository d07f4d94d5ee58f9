"""Which layers' weights some other code reads: a layer that cannot be replaced by two. Seen in the source, and in a run."""

from __future__ import annotations

import ast
import fnmatch
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from .attention import Attention
from .measure import call, evaluating, seeded


def read_in_a_run(model: nn.Module, layers: dict[nn.Module, list[str]], inputs: tuple[Any, ...]) -> dict[nn.Module, str]:
    """Of these layers (with their paths), those of which an attribute is read that a pair of layers does not have, with the first such attribute.

    A forward pass in which something stands in the place of each layer that calls it, and notes what is asked of it besides.
    """
    stands = {layer: _StandIn(layer) for layer in layers}
    by_path = {path: stands[layer] for layer, paths in layers.items() for path in paths}
    with suppress(Exception), _replaced(model, by_path), evaluating(model), seeded():
        call(model, inputs)  # what looks at the class of a layer may go astray: the check after the cut will tell
    return {layer: stand.asked[0] for layer, stand in stands.items() if stand.asked}


class _StandIn(nn.Module):
    """Its own attributes are those that every module has, as a pair's are."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.asked: list[str] = []
        object.__setattr__(self, "_layer", layer)  # not a child: the names in the model stay what they are

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        self.__dict__["asked"].append(name)
        return getattr(self.__dict__["_layer"], name)


@contextmanager
def _replaced(model: nn.Module, by_path: Mapping[str, nn.Module]) -> Iterator[None]:
    places = {path: (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in by_path}
    before = {path: parent._modules[name] for path, (parent, name) in places.items()}
    try:
        for path, (parent, name) in places.items():
            parent._modules[name] = by_path[path]
        yield
    finally:
        for path, (parent, name) in places.items():
            parent._modules[name] = before[path]


def weight_readers(modules: dict[nn.Module, list[str]]) -> dict[str, str]:
    """Paths of layers whose weight or other attributes an ancestor reads in its own code, with the reason.

    `self.fc.weight` in a parent's method would fail once `fc` is an `nn.Sequential`. Read from the source, so that it
    is known without example inputs, too, and of methods that they do not reach.
    """
    found: dict[str, str] = {}
    cache: dict[tuple[type, bool], set[tuple[str, ...]]] = {}
    for ancestor, paths in modules.items():
        kind, fused = type(ancestor), not (isinstance(ancestor, nn.TransformerEncoderLayer) and _never_fused(ancestor))
        if (kind, fused) not in cache:
            cache[kind, fused] = _attribute_chains(kind, () if fused else (nn.TransformerEncoderLayer,))
        for chain in cache[kind, fused]:
            for path in paths:
                pattern = ".".join([path, *chain] if path else chain)
                for others in modules.values():
                    for other in others:
                        if other and other.count(".") == pattern.count(".") and fnmatch.fnmatchcase(other, pattern):
                            found.setdefault(other, f"{kind.__name__} reads {'.'.join(chain)}.weight directly{_way_out(kind)}")
    return found


_READ = frozenset(
    {
        "weight",
        "bias",
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "nf",
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
    }
)


def _way_out(kind: type) -> str:
    return ": laconic.unfuse(model) is the way out" if issubclass(kind, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) else ""


def _never_fused(layer: nn.TransformerEncoderLayer) -> bool:
    """Its own code reads weights for a fused kernel alone, which it never calls as this layer is built."""
    attention = getattr(layer, "self_attn", None)
    if not isinstance(attention, (nn.MultiheadAttention, Attention)):  # a subclass with one of its own: whatever it reads
        return False
    return not attention.batch_first or attention.in_proj_bias is None or not layer.activation_relu_or_gelu or attention.num_heads % 2 == 1


def _attribute_chains(kind: type, harmless: tuple[type, ...] = ()) -> set[tuple[str, ...]]:
    """For `self.a.b[0].weight` in a method of this class, those of `harmless` classes aside: `("a", "b", "*")`."""
    chains: set[tuple[str, ...]] = set()
    for base in kind.__mro__:
        if base not in (nn.Module, object, *harmless) and not base.__module__.startswith("torch.nn.modules.container"):
            chains |= _own_chains(base)
    return chains


@functools.lru_cache(maxsize=1024)  # to find and parse the source takes longer than all else that is asked of a class
def _own_chains(base: type) -> frozenset[tuple[str, ...]]:
    """Of the methods that are written in the class itself."""
    chains: set[tuple[str, ...]] = set()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    for method in ast.walk(tree):
        # Reading a layer's attributes while building or initialising it is harmless.
        if isinstance(method, ast.FunctionDef) and "init" not in method.name and "reset" not in method.name:
            for node in ast.walk(method):
                if isinstance(node, ast.Attribute) and node.attr in _READ:
                    chain = _from_self(node.value)
                    if chain:
                        chains.add(chain)
    return frozenset(chains)


def _from_self(node: ast.expr) -> tuple[str, ...]:
    parts: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            parts.append("*")
            node = node.value
        elif isinstance(node, ast.Name) and node.id == "self" and parts:
            return tuple(reversed(parts))
        else:
            return ()
