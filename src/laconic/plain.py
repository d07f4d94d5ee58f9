"""Plain data: what can be written now and read back later without pickle."""

from __future__ import annotations

import io
import json
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import InvalidTypeError

ATOMS = frozenset({type(None), bool, int, float, complex, str})
TENSORS = frozenset({Tensor, nn.Parameter})
SEQUENCES = frozenset({list, tuple, set})
MAPPINGS = frozenset({dict, OrderedDict, Counter})


def plain(value: Any, where: str) -> Any:
    """The value as `torch.load(weights_only=True)` reads it back: numpy's scalars become Python's, its arrays tensors.

    A walk over the containers: tensors are not copied, and containers without anything of numpy's stay the same objects.

    Args:
        where: how to name the value in an error.

    Raises:
        InvalidTypeError: something would be refused on reading; names where it is, and its type.
    """
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if kind in ATOMS or (kind in TENSORS and not vars(value)):
        return value
    if kind is np.ndarray:
        return _tensor(value, where)
    if kind in SEQUENCES:
        items = [x if type(x) in ATOMS else plain(x, f"{where}[{i}]") for i, x in enumerate(value)]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else kind(items)
    if kind in MAPPINGS:
        pairs = [(plain(k, f"the key {k!r} of {where}"), plain(v, f"{where}[{k!r}]")) for k, v in value.items()]
        if all(a is k and b is v for (a, b), (k, v) in zip(pairs, value.items(), strict=True)):
            return value
        made = kind(dict(pairs))
        if kind is OrderedDict:  # a module's state keeps the versions of its layers there
            vars(made).update(vars(value))
        return made
    if not _is_read_back(value):
        raise _refused(f"a {kind.__name__}", where)
    return value


def _tensor(array: np.ndarray, where: str) -> Tensor:
    try:
        return torch.from_numpy(array.copy())
    except (TypeError, ValueError):  # objects, strings, another byte order
        raise _refused(f"an array of {array.dtype}", where) from None


def _is_read_back(value: Any) -> bool:
    """By trying: what may be read also depends on `torch.serialization.add_safe_globals`."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # whatever pickle, the object's own code, or the reader has against it
        return False
    return True


def _refused(what: str, where: str) -> InvalidTypeError:
    return InvalidTypeError(
        f"{where} is {what}, which could not be read back without pickle: save numbers, strings, tensors, and lists and dicts of them"
    )


def plain_json(value: Any, where: str) -> dict[str, Any]:
    """A dict as JSON gives it back.

    Raises:
        InvalidTypeError: it is no dict, or JSON cannot hold one of its values; names that.
    """
    if not isinstance(value, dict):
        raise InvalidTypeError(f"{where}: expected a dict, got {type(value).__name__}")
    for key, content in value.items():
        try:
            json.dumps({key: content}, default=_number)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidTypeError(
                f"{where}[{key!r}] cannot be written as JSON ({error}): give numbers, strings, and lists and dicts of them"
            ) from None
    found: dict[str, Any] = json.loads(json.dumps(value, default=_number))
    return found


def _number(value: Any) -> Any:
    """Of numpy's, as Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not plain data")
