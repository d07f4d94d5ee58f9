"""Spectral shrinkage by a full singular value decomposition: the reference among the fast ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..penalties import Penalty
from .base import Shrunk, shrink_values


@dataclass(frozen=True, slots=True)
class SVD:
    """`torch.linalg.svd`. Backward stable: every singular value is right to a few `eps * s_max`."""

    name: str = "svd"

    def shrink(self, x: Tensor, penalty: Penalty, tau: float, scale: float) -> Shrunk:
        # What PyTorch takes by itself on CUDA, Jacobi's method, leaves 1e-4 of a float32 matrix of 1,024 rows.
        u, s, vh = torch.linalg.svd(x, full_matrices=False, driver="gesvd" if x.is_cuda else None)
        s64 = s.double()
        new = shrink_values(s64, penalty, tau, scale)
        y = (u * new.to(x.dtype)[:, None, :]) @ vh
        error = 8 * torch.finfo(x.dtype).eps * max(x.shape[-2:]) ** 0.5 * s64[:, 0]
        return Shrunk(y, new, s64, error)
