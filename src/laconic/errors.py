"""Every error that laconic raises on purpose.

All derive from `LaconicError`; each also is the builtin exception that a user would expect in that place, so that
``except ValueError`` keeps working. A message is one line: what is wrong, with name and value, and what to do instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LaconicError(Exception):
    """Base of all errors of this package."""


class InvalidValueError(LaconicError, ValueError):
    """An argument has a value outside its range."""


class InvalidTypeError(LaconicError, TypeError):
    """An argument has the wrong type."""


class NonFiniteError(LaconicError, ValueError):
    """A weight, gradient or matrix holds NaN or Inf."""


class DecompositionError(LaconicError, RuntimeError):
    """No solver could decompose a matrix."""


class NothingToCompressError(LaconicError, ValueError):
    """The model has no weight that the structures apply to."""


class PatternError(LaconicError, ValueError):
    """An include= or exclude= pattern matches nothing."""


class OptimizerError(LaconicError, ValueError):
    """The optimizer does not own the model's weights."""


class UnsupportedOptimizerError(LaconicError, TypeError):
    """The optimizer cannot be followed by a proximal step (LBFGS), or offers no parameter groups."""


class InfeasibleBudgetError(LaconicError, ValueError):
    """No choice of ranks is small enough; `smallest` is the smallest feasible fraction of the dense cost."""

    def __init__(self, message: str, smallest: float):
        super().__init__(message)
        self.smallest = smallest


class SurgeryError(LaconicError, RuntimeError):
    """A cut layer does not compute what it should; the model was left as it was."""


class CheckpointError(LaconicError, ValueError):
    """A saved model is damaged, of an unknown format, or may not be overwritten."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A saved model, or one of its files, is not there."""


class ArchitectureMismatchError(CheckpointError):
    """A saved model does not fit the model it is loaded into."""


class RecipeError(LaconicError, ValueError):
    """A recipe has an unknown key or a wrong value."""


class DataNotFoundError(LaconicError, FileNotFoundError):
    """A data set is not where it was looked for."""


class MissingExtraError(LaconicError, ImportError):
    """An optional dependency is not installed."""


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    return MissingExtraError(f"{purpose} needs {package}, which is not installed: pip install 'laconic[{extra}]'")


def first_line(error: BaseException) -> str:
    """What an error says first: PyTorch's go on for pages."""
    return next(iter(str(error).splitlines()), "")


def one_line(said: object, most: int = 300) -> str:
    """All that an error (or another object) says, in one line, as far as it is not too long."""
    return " ".join(str(said).split())[:most]


def nearest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the valid name nearest to `name`, else the list of valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"
