"""Checks of single arguments that several modules make."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidTypeError, InvalidValueError, NonFiniteError, nearest


def whole_number(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """The number as Python's own: numpy's are whole numbers too, truth values are not.

    Raises:
        InvalidValueError: it is none, below `least`, or above `most`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) <= most:
        bound = "" if most == math.inf else f" and at most {most}"
        raise InvalidValueError(f"{name} = {value!r}: must be a whole number, at least {least}{bound}")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """The number as Python's own, which can be saved without pickle: numpy's are numbers too, truth values are not.

    Raises:
        InvalidTypeError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidTypeError(f"{name} = {value!r}: expected a number")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_choice(name: str, value: Any, valid: Collection[str]) -> None:
    """
    Raises:
        InvalidValueError: it is none of the valid names.
    """
    if not isinstance(value, str) or value not in valid:
        raise InvalidValueError(f"{name} = {value!r} is unknown{nearest(str(value), valid)}")


def check_function(name: str, value: Any, of: str) -> None:
    """
    Raises:
        InvalidTypeError: it cannot be called; `of` says with what it would be.
    """
    if not callable(value):
        raise InvalidTypeError(f"{name} = {value!r}: expected a function of {of}")


def check_finite(values: Tensor, name: str) -> None:
    """Of a weight, or norms of its parts, before anything is written.

    Raises:
        NonFiniteError: NaN or Inf.
    """
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"{name} holds NaN or Inf: nothing was changed; look for a diverging loss or a learning rate that is too high")


def hooked(module: nn.Module) -> bool:
    """With hooks of the user's, which see what goes in or comes out."""
    return _users(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Of the user's, which a new parameter would not have."""
    return _users(parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))


def _users(*hooks: Any) -> bool:
    """Are some not of our own?"""
    return any(not type(hook).__module__.startswith(f"{__package__}.") for of_kind in hooks for hook in (of_kind or {}).values())


def check_module(model: Any, name: str = "model") -> None:
    """
    Raises:
        InvalidTypeError: it is no module, or the class in place of an instance.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise InvalidTypeError(
            f"{name}: expected a torch.nn.Module, got the class {model.__name__} itself: build one first, {model.__name__}(...)"
        )
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}")
