"""Whose own code reads a layer's weight: a layer that cannot be replaced by two."""

from __future__ import annotations

import ast
import fnmatch
import inspect
import textwrap

from torch import nn


def weight_readers(modules: dict[nn.Module, list[str]]) -> dict[str, str]:
    """Paths of layers whose weight or other attributes an ancestor reads in its own code, with the reason.

    `self.fc.weight` in a parent's method would fail once `fc` is an `nn.Sequential`. Read from the source, so that it
    is known before anything is touched; what reads through other names is caught by the check after the cut.
    """
    found: dict[str, str] = {}
    cache: dict[type, set[tuple[str, ...]]] = {}
    for ancestor, paths in modules.items():
        kind = type(ancestor)
        if kind not in cache:
            cache[kind] = _attribute_chains(kind)
        for chain in cache[kind]:
            for path in paths:
                pattern = ".".join([path, *chain] if path else chain)
                for others in modules.values():
                    for other in others:
                        if other and other.count(".") == pattern.count(".") and fnmatch.fnmatchcase(other, pattern):
                            found.setdefault(other, f"{kind.__name__} reads {'.'.join(chain)}.weight directly")
    return found


_READ = frozenset({"weight", "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "nf"})


def _attribute_chains(kind: type) -> set[tuple[str, ...]]:
    """For `self.a.b[0].weight` in a method of this class: `("a", "b", "*")`."""
    chains: set[tuple[str, ...]] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object) or base.__module__.startswith("torch.nn.modules.container"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for method in ast.walk(tree):
            # Reading a layer's attributes while building or initialising it is harmless.
            if isinstance(method, ast.FunctionDef) and "init" not in method.name and "reset" not in method.name:
                for node in ast.walk(method):
                    if isinstance(node, ast.Attribute) and node.attr in _READ:
                        chain = _from_self(node.value)
                        if chain:
                            chains.add(chain)
    return chains


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
