"""Checks of single arguments that several modules make."""

from __future__ import annotations

import numbers
from typing import Any

from torch import nn

from .errors import InvalidTypeError, InvalidValueError


def whole_number(name: str, value: Any, least: int) -> int:
    """The number as Python's own: numpy's are whole numbers too, truth values are not.

    Raises:
        InvalidValueError: it is none, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InvalidValueError(f"{name} = {value!r}: must be a whole number, at least {least}")
    return int(value)


def check_module(model: Any) -> None:
    """
    Raises:
        InvalidTypeError: the model is none, or the class in place of an instance.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise InvalidTypeError(
            f"model: expected a torch.nn.Module, got the class {model.__name__} itself: build one first, {model.__name__}(...)"
        )
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
