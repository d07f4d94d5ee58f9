r"""The entry point: shrink the singular values of a matrix (or a stack of them) by a penalty's prox.

.. math:: \operatorname{argmin}_X \tfrac12 \|X - W\|_F^2 + \tau\, h(\sigma(X)) = U \operatorname{diag}(\operatorname{prox}_h(\sigma, \tau)) V^T

Everything that no solver should have to think of is here: low precision (computed in float32), scale (matrices of very
large or very small entries are brought to magnitude 1 by a power of two, which is exact), autocast and TF32 (switched off), NaN
and Inf (refused), failures of a decomposition (the next solver is tried, and the result says so).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_finite
from ..errors import DecompositionError, InvalidTypeError, InvalidValueError, first_line
from ..penalties import L1, Penalty, check_tau
from ..precision import full_precision
from .base import Shrunk, Solver
from .gram import Gram
from .svd import SVD

ORDINARY = 16  # magnitudes from 2**-16 to 2**16 are squared in any dtype as they are: no copy of the matrix is made


@dataclass(frozen=True, slots=True)
class Auto:
    """Chooses by dtype, shape and cutoff.

    | input (after promotion) | cutoff / s_max | solver | why |
    |---|---|---|---|
    | any, smaller side <= 2 | any | `svd` | nothing to gain |
    | float32 | >= 64 sqrt(eps) = 0.022 | `gram` | the fastest; its error bound at the cutoff is a few percent of it |
    | float32 | below | `gram-float64` | as accurate as float32 `svd`, 1.2-6 times faster |
    | float64 | >= 64 sqrt(eps) = 1e-6 | `gram` | as above |
    | float64 | below | `svd` | squaring would lose what is asked for |
    | float32, no float64 on the device | below 0.022 | `svd` | |
    | float32 on CUDA | any | `gram-float64` | as fast as `gram` there, 3 to 7 times faster than `torch.linalg.svd` |

    `s_max` is bounded from above by the Frobenius norm, so the choice needs no decomposition, is a pure function of
    the input, and errs to the careful side.
    """

    name: str = "auto"

    def choose(self, x: Tensor, cutoff: float) -> Solver:
        if min(x.shape[-2:]) <= 2:
            return SVD()
        if x.is_cuda and x.dtype == torch.float32:
            return Gram(torch.float64)
        bound = float(torch.linalg.matrix_norm(x).max())
        if cutoff >= 64 * torch.finfo(x.dtype).eps ** 0.5 * bound:
            return Gram()
        if x.dtype == torch.float64 or x.device.type == "mps":
            return SVD()
        return Gram(torch.float64)


SOLVERS: dict[str, Solver | Auto] = {"auto": Auto(), "svd": SVD(), "gram": Gram(), "gram-float64": Gram(torch.float64)}


@dataclass(frozen=True, slots=True)
class SVTResult:
    """A shrunk matrix and what is known of it.

    Attributes:
        x: the result, shape and dtype of the input.
        values: singular values of `x`, non-increasing, float64; `[b, k]` for a stack.
        rank: number of values above zero (the largest of a stack).
        state: hand it to the next call on a nearby matrix.
        input_values: singular values of the input.
        solver: name of the solver that was used.
        error: bound on the error of an input singular value near the cutoff: ranks are certain outside this band.
        failures: one line for each solver that failed before `solver` succeeded.
    """

    x: Tensor
    values: Tensor
    rank: int
    state: dict[str, Any]
    input_values: Tensor
    solver: str
    error: float
    failures: tuple[str, ...] = field(default=())


def spectral_prox(
    x: Tensor,
    penalty: Penalty,
    tau: float,
    *,
    solver: str | Solver | Auto = "auto",
    state: dict[str, Any] | None = None,
    name: str = "x",
) -> SVTResult:
    """Shrink the singular values of `x` by `penalty.prox(., tau)`.

    Args:
        x: `[m, n]`, or a stack `[b, m, n]` of independent matrices; any real floating dtype. Not changed.
        penalty: see `laconic.penalties`.
        tau: threshold, in the units of the singular values.
        solver: `"auto"`, `"svd"`, `"gram"`, `"gram-float64"`, or a solver object.
        state: result's `state` of an earlier call on a nearby matrix. The present solvers need no warm start, so it
            only carries the count of calls and failures.
        name: what to call the matrix in errors.

    Raises:
        NonFiniteError: `x` holds NaN or Inf.
        InvalidTypeError, InvalidValueError: not a real floating matrix; tau negative or not finite.
        DecompositionError: every solver failed.
    """
    tau = check_tau(tau)
    if isinstance(solver, str):
        check_choice("solver", solver, SOLVERS)
        solver = SOLVERS[solver]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InvalidTypeError(f"{name}: expected a real floating-point tensor, got {kind}")
    if x.ndim not in (2, 3) or x.numel() == 0:
        raise InvalidValueError(f"{name}: expected a non-empty matrix [m, n] or stack [b, m, n], got shape {tuple(x.shape)}")
    with torch.no_grad(), full_precision(x.device):
        work = (x if x.ndim == 3 else x[None]).detach()
        if work.dtype not in (torch.float32, torch.float64):
            work = work.float()
        peak = work.abs().max()
        check_finite(peak, name)
        largest = float(peak)
        exponent = max(-1000, min(1000, math.frexp(largest)[1])) if largest > 0 else 0
        if abs(exponent) <= ORDINARY:
            exponent = 0
        scale = 2.0**exponent
        work = _times_power_of_two(work, -exponent)
        shrunk, used, failures = _shrink_with_fallback(work, penalty, tau, scale, solver, name)
        y = _times_power_of_two(shrunk.x, exponent).to(x.dtype).reshape(x.shape)
        if tau == 0 and torch.equal(shrunk.values * scale, shrunk.input_values * scale):
            y = x.detach().clone()  # nothing was asked for: not even rounding
    values, before = shrunk.values * scale, shrunk.input_values * scale
    if x.ndim == 2:
        values, before = values[0], before[0]
    calls = (state or {}).get("calls", 0) + 1
    failed = (state or {}).get("failures", 0) + len(failures)
    return SVTResult(
        x=y,
        values=values,
        rank=int((values > 0).sum(-1).max()),
        state={"calls": calls, "failures": failed, "solver": used},
        input_values=before,
        solver=used,
        error=float(shrunk.error.max()) * scale,
        failures=tuple(failures),
    )


def _times_power_of_two(x: Tensor, exponent: int) -> Tensor:
    """x * 2**exponent, exactly, also where 2**exponent is beyond float32; x itself where there is nothing to do."""
    if exponent == 0:
        return x
    if abs(exponent) < 120:
        return x * 2.0**exponent
    return (x.double() * 2.0**exponent).to(x.dtype)


def _shrink_with_fallback(
    work: Tensor, penalty: Penalty, tau: float, scale: float, solver: Solver | Auto, name: str
) -> tuple[Shrunk, str, list[str]]:
    first = solver.choose(work, penalty.cutoff(tau) / scale) if isinstance(solver, Auto) else solver
    chain: list[tuple[Solver, torch.device, torch.dtype]] = [(first, work.device, work.dtype)]
    if first.name != "svd":
        chain.append((SVD(), work.device, work.dtype))
    chain.append((SVD(), torch.device("cpu"), torch.float64))
    failures: list[str] = []
    for candidate, device, dtype in chain:
        try:
            shrunk = candidate.shrink(work.to(device, dtype), penalty, tau, scale)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            failures.append(f"{candidate.name} ({dtype}, {device}): {first_line(error)}")
            continue
        if device != work.device or dtype != work.dtype:
            shrunk = Shrunk(shrunk.x.to(work.device, work.dtype), shrunk.values, shrunk.input_values, shrunk.error)
        return shrunk, candidate.name, failures
    raise DecompositionError(f"{name}: no solver could decompose it ({'; '.join(failures)}); nothing was changed")


def svt(x: Tensor, tau: float, solver: str | Solver | Auto = "auto", state: dict[str, Any] | None = None) -> SVTResult:
    r"""Singular value thresholding: the prox of the nuclear norm.

    .. math:: \operatorname{argmin}_X \tfrac12 \|X - W\|_F^2 + \tau \|X\|_* = U \operatorname{diag}((s - \tau)_+) V^T

    Args:
        x: `[m, n]` or a stack `[b, m, n]`.
        tau: threshold, at least 0.
        solver: `"auto"`, `"svd"`, `"gram"`, `"gram-float64"`, or a solver object.
        state: `state` of an earlier result on a nearby matrix.

    Example:
        >>> import torch, laconic
        >>> laconic.svt(torch.diag(torch.tensor([3.0, 1.0])), tau=2.0).values.tolist()
        [1.0, 0.0]

    Source: Cai, Candes, Shen 2010, *A singular value thresholding algorithm for matrix completion*.
    """
    return spectral_prox(x, L1(), tau, solver=solver, state=state)
