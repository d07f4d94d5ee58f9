r"""The same mathematics in obvious float64 lines: the oracle of the tests.

Nothing here is fast and nothing in the package calls it. Every function takes another route than the code it judges:
NumPy instead of torch, a search instead of a closed form, an optimality condition instead of a result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def svt(x: Array, tau: float) -> Array:
    """U diag((s - tau)_+) V^T."""
    u, s, vh = np.linalg.svd(np.asarray(x, dtype=np.float64), full_matrices=False)
    return np.asarray((u * np.maximum(s - tau, 0)) @ vh)


def spectral_map(x: Array, shrink: Callable[[Array], Array]) -> Array:
    """U diag(shrink(s)) V^T."""
    u, s, vh = np.linalg.svd(np.asarray(x, dtype=np.float64), full_matrices=False)
    return np.asarray((u * shrink(s)) @ vh)


def scalar_prox(s: float, tau: float, h: Callable[[Array], Array], points: int = 20001) -> float:
    """argmin over x in [0, s] of 1/2 (x - s)^2 + tau h(x), by looking: a grid, then a finer one around its best point."""
    low, high = 0.0, s
    for _ in range(4):
        grid = np.linspace(low, high, points)
        best = grid[np.argmin(0.5 * (grid - s) ** 2 + tau * h(grid))]
        step = (high - low) / (points - 1)
        low, high = max(best - step, 0.0), min(best + step, s)
    zero_value = 0.5 * s**2 + tau * float(h(np.zeros(1))[0])
    best_value = 0.5 * (best - s) ** 2 + tau * float(h(np.array([best]))[0])
    return 0.0 if zero_value <= best_value else float(best)


def log_sum(epsilon: float) -> Callable[[Array], Array]:
    return lambda x: epsilon * np.log(1 + x / epsilon)


def hoyer_objective(x: Array, s: Array, tau: float) -> float:
    """1/2 ||x - s||^2 + tau ||x||_1 / ||x||_2 (0 at x = 0)."""
    norm = np.linalg.norm(x)
    return float(0.5 * np.sum((x - s) ** 2) + (tau * np.sum(x) / norm if norm > 0 else 0.0))


def nuclear_optimality_gap(x: Array, y: Array, tau: float) -> float:
    r"""How far y is from the minimiser of 1/2 ||y - x||_F^2 + tau ||y||_*, without an oracle.

    y is the minimiser if and only if (x - y) / tau = U V^T + W with U, V the singular vectors of y (nonzero part),
    U^T W = 0, W V = 0 and ||W||_2 <= 1. Returns the largest violation.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    u, s, vh = np.linalg.svd(y, full_matrices=False)
    rank = int(np.sum(s > 1e-9 * max(s[0], tau)))
    u, vh = u[:, :rank], vh[:rank]
    w = (x - y) / tau - u @ vh
    violations = [max(float(np.linalg.norm(w, 2)) - 1, 0.0)]
    if rank:
        violations += [float(np.abs(u.T @ w).max()), float(np.abs(w @ vh.T).max())]
    return max(violations)


def ranks(s: Array, tau: float) -> int:
    return int(np.sum(s > tau))
