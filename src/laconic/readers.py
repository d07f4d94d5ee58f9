"""Which layers cannot be replaced by two, since other code reads their weights or looks at what they are. Seen in the source, and in a run."""

from __future__ import annotations

import ast
import fnmatch
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention
from .graph import outputs

Layers = dict[nn.Module, list[str]]  # with their paths


def not_replaceable(model: nn.Module, layers: Layers, inputs: tuple[Any, ...]) -> dict[nn.Module, str]:
    """Those of these layers for which a pair cannot stand, with the reason, as forward passes tell in which something else stands in their place.

    It calls the layer, and notes what is asked of it besides: an attribute that a pair does not have, or arguments that it does not take.
    A layer that runs although its stand-in was not called is held somewhere else, too: in a list, say. And where outputs are not
    what they were, or there are none, the code looks at the class of a layer; which one is found by halving. So is a layer whose weight counts although
    no call of the layer uses it, for example since its `forward` is held somewhere.
    """
    found: dict[nn.Module, str] = {}
    plain = _results(model, {}, inputs)

    def differs(tried: Layers) -> bool:
        with _counted(tried) as runs:
            stands = {layer: _StandIn(layer, runs) for layer in tried}
            by_path = {path: stands[layer] for layer, paths in tried.items() for path in paths}
            results = _results(model, by_path, inputs)
        for layer, stand in stands.items():
            if stand.asked:
                found.setdefault(layer, f"the model's own code {stand.asked[0]} in a run on the example inputs")
            elif runs[layer]:
                found.setdefault(layer, "it runs, but not as a part of the model's modules alone: it is held somewhere else, too")
        return not _same(plain, results)

    def search(tried: Layers) -> None:
        if not tried or not differs(tried):
            return
        if len(tried) == 1:
            (layer,) = tried
            found.setdefault(layer, "with another layer in its place the outputs are not the same: the model's own code looks at its class")
            return
        each = list(tried.items())
        for half in (each[: len(each) // 2], each[len(each) // 2 :]):
            search(dict(half))

    if plain is not None and _same(plain, _results(model, {}, inputs)):  # else a difference says nothing
        search(layers)
        for layer in _read_elsewhere(model, layers, inputs, plain):
            found.setdefault(
                layer,
                "its weight is used in another way than by a call of the layer: it, or the layer's forward, is held somewhere else, too",
            )
    else:
        differs(layers)
    return found


def _read_elsewhere(model: nn.Module, layers: Layers, inputs: tuple[Any, ...], plain: list[Tensor]) -> list[nn.Module]:
    """Layers whose weight changes the outputs when it is another one but in their own calls."""
    weights = dict.fromkeys(w for layer in layers if isinstance(w := getattr(layer, "weight", None), Tensor))
    true = {w: w.data for w in weights}

    def search(tried: list[Tensor]) -> list[Tensor]:
        try:
            for w in tried:
                w.data = torch.full((), 0.5, dtype=w.dtype, device=w.device).expand(w.shape)  # takes no memory
            if not tried or _same(plain, _results(model, {}, inputs)):
                return []
        finally:
            for w in tried:
                w.data = true[w]
        half = len(tried) // 2
        return search(tried[:half]) + search(tried[half:]) if half else tried

    with _called_with(true, layers):
        read = {id(w) for w in search(list(weights))}
    return [layer for layer in layers if id(getattr(layer, "weight", None)) in read]


@contextmanager
def _called_with(true: Mapping[Tensor, Tensor], layers: Layers) -> Iterator[None]:
    """Inside, these layers have their true weights while they are called. Set on the objects: their classes, and what was taken from them before, stay."""

    def restoring(layer: Any, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            now, layer.weight.data = layer.weight.data, true[layer.weight]
            try:
                return forward(*args, **kwargs)
            finally:
                layer.weight.data = now

        return call

    try:
        for layer in layers:
            vars(layer)["forward"] = restoring(layer, layer.forward)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _results(model: nn.Module, by_path: Mapping[str, nn.Module], inputs: tuple[Any, ...]) -> list[Tensor] | None:
    """Outputs with these modules at these paths; None where it does not run."""
    try:
        with _replaced(model, by_path):
            return outputs(model, inputs)
    except Exception:
        return None


def _same(a: list[Tensor] | None, b: list[Tensor] | None) -> bool:
    if a is None or b is None or len(a) != len(b):
        return a is b
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.layout == torch.strided]
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True) for x, y in pairs)


@contextmanager
def _counted(layers: Layers) -> Iterator[dict[nn.Module, int]]:
    """How often each is called inside."""
    runs = dict.fromkeys(layers, 0)

    def count(layer: nn.Module, _: Any) -> None:
        runs[layer] += 1

    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


class _StandIn(nn.Module):
    """Its own attributes are those that every module has, as a pair's are."""

    def __init__(self, layer: nn.Module, runs: dict[nn.Module, int]):
        super().__init__()
        self.asked: list[str] = []
        self.runs = runs
        object.__setattr__(self, "_layer", layer)  # not a child: the names in the model stay what they are

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.runs[self._layer] -= 1  # what is left are those in which it was not asked
        given = kwargs.keys() - {"input"}
        if given or len(args) > 1:
            self.asked.append(f"calls it with {', '.join(sorted(given)) or 'further arguments'}")
        return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        self.__dict__["asked"].append(f"reads its .{name}")
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
    """Paths of layers whose weight or other attributes an ancestor reads in its own code (or that it calls as a pair cannot be called), with the reason.

    `self.fc.weight` in a parent's method would fail once `fc` is an `nn.Sequential`. Read from the source, so that it
    is known without example inputs, too, and of methods that they do not reach.
    """
    found: dict[str, str] = {}
    cache: dict[tuple[type, bool], set[Use]] = {}
    for ancestor, paths in modules.items():
        kind, fused = type(ancestor), not (isinstance(ancestor, nn.TransformerEncoderLayer) and _never_fused(ancestor))
        if (kind, fused) not in cache:
            cache[kind, fused] = _attribute_chains(kind, () if fused else (nn.TransformerEncoderLayer,))
        for chain, what in sorted(
            cache[kind, fused], key=lambda use: (".weight" not in use[1], use)
        ):  # what is read of it besides says less
            for path in paths:
                pattern = ".".join([path, *chain] if path else chain)
                for others in modules.values():
                    for other in others:
                        if other and other.count(".") == pattern.count(".") and fnmatch.fnmatchcase(other, pattern):
                            found.setdefault(other, f"{kind.__name__} {what.format('.'.join(chain))}{_way_out(kind)}")
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


Use = tuple[tuple[str, ...], str]  # where from `self`, and what is done with it


def _attribute_chains(kind: type, harmless: tuple[type, ...] = ()) -> set[Use]:
    """For `self.a.b[0].weight` in a method of this class, those of `harmless` classes aside: `("a", "b", "*")`."""
    chains: set[Use] = set()
    for base in kind.__mro__:
        if base not in (nn.Module, object, *harmless) and not base.__module__.startswith("torch.nn.modules.container"):
            chains |= _own_chains(base)
    return chains


@functools.lru_cache(maxsize=1024)  # to find and parse the source takes longer than all else that is asked of a class
def _own_chains(base: type) -> frozenset[Use]:
    """Of the methods that are written in the class itself."""
    chains: set[Use] = set()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    for method in ast.walk(tree):
        # Reading a layer's attributes while building or initialising it is harmless.
        if isinstance(method, ast.FunctionDef) and "init" not in method.name and "reset" not in method.name:
            for node in ast.walk(method):
                if isinstance(node, ast.Attribute) and node.attr in _READ and (chain := _from_self(node.value)):
                    chains.add((chain, f"reads {{}}.{node.attr} directly"))
                if isinstance(node, ast.Call) and any(k.arg == "output_size" for k in node.keywords) and (chain := _from_self(node.func)):
                    chains.add((chain, "calls {} with output_size, which a pair of layers does not take"))
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
