r"""Spectral shrinkage from the eigenvectors of the smaller Gram matrix.

For m <= n (else transposed) :math:`G = X X^T = U \operatorname{diag}(s^2) U^T` and

.. math:: \operatorname{prox}(X) = U \operatorname{diag}(\operatorname{prox}(s) / s)\, U^T X

No V is needed, and the products are matrix multiplications. Forming G squares the condition number: a singular value
near `c` carries an error of about `eps * s_max**2 / c`, so the dtype in which G is formed must suit the cutoff.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..penalties import Penalty
from .base import Shrunk, ratio, shrink_values
from .eigen import LARGE, eigh_inside, eigvalsh_inside

COLUMNS = 128  # converted at a time: a float64 copy of the whole matrix would be the largest thing in memory


@dataclass(frozen=True, slots=True)
class Gram:
    """Eigenvectors of the smaller Gram matrix, formed and decomposed in `dtype` (None: the input's)."""

    dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        return "gram" if self.dtype is None else f"gram-{str(self.dtype).removeprefix('torch.')}"

    def shrink(self, x: Tensor, penalty: Penalty, tau: float, scale: float) -> Shrunk:
        tall = x.shape[-2] > x.shape[-1]
        wide = x.mT if tall else x
        dtype = self.dtype or x.dtype
        squares, u = eigh_inside(small_gram(wide, dtype))  # ascending
        s64 = squares.flip(-1).double().clamp_min(0).sqrt()
        new = shrink_values(s64, penalty, tau, scale)
        kept = max(int((new > 0).sum(-1).max()), 1) if new.numel() else 0
        u = u[..., u.shape[-1] - kept :]
        shares = ratio(new, s64)[:, :kept].flip(-1)[..., None].to(u.dtype)
        y = torch.empty_like(wide)
        for part, out in zip(wide.split(COLUMNS, -1), y.split(COLUMNS, -1), strict=True):
            out.copy_(u @ (u.mT @ part.to(dtype)).mul_(shares))
        return Shrunk(y.mT if tall else y, new, s64, self.error(s64[:, 0], penalty.cutoff(tau) / scale, dtype, wide.shape))

    @staticmethod
    def error(s_max: Tensor, cutoff: float, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """Error of a singular value at the cutoff: `|d(s^2)| <= c eps s_max^2`, so `|ds| <= min(sqrt, that / 2s)`."""
        squared = 8 * torch.finfo(dtype).eps * max(shape[-2:]) ** 0.5 * s_max.square()
        return torch.minimum(squared.sqrt(), squared / max(cutoff, 1e-300))


def singular_values(x: Tensor) -> Tensor:
    """Of `[b, m, n]`, float64, non-increasing; of a large matrix of less than float64 from the smaller Gram matrix, in less memory and time."""
    if min(x.shape[-2:]) < LARGE or x.dtype == torch.float64 or x.device.type == "mps":
        return torch.linalg.svdvals(x.double())
    gram = small_gram(x if x.shape[-2] <= x.shape[-1] else x.mT, torch.float64)
    return eigvalsh_inside(gram).flip(-1).clamp_min(0).sqrt()


def promoted_matmul(a: Tensor, x: Tensor) -> Tensor:
    """`a @ x` in the dtype of `a [.., r, m]`, which may be more accurate than that of `x [.., m, n]`."""
    if x.dtype == a.dtype:
        return a @ x
    out = a.new_empty(*a.shape[:-1], x.shape[-1])
    for part, place in zip(x.split(COLUMNS, -1), out.split(COLUMNS, -1), strict=True):
        place.copy_(a @ part.to(a.dtype))
    return out


def small_gram(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """`X X^T` in `dtype`."""
    if wide.dtype == dtype:
        return wide @ wide.mT
    gram = torch.zeros(*wide.shape[:-1], wide.shape[-2], dtype=dtype, device=wide.device)
    for part in wide.split(COLUMNS, -1):
        part = part.to(dtype)
        gram.baddbmm_(part, part.mT)
    return gram
