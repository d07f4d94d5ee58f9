r"""Spectra and proximal steps of a product `W = A B` that is never formed: two thin QRs and one small SVD.

`A [g, m, r]`, `B [g, r, n]`; with `A = Q_a R_a` and `B^T = Q_b R_b`, the singular values of `A B` are those of the
r x r matrix `R_a R_b^T`, and its singular vectors are `Q_a U` and `Q_b V`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_finite
from ..errors import DecompositionError, first_line
from ..penalties import Penalty


def factored_svd(left: Tensor, right: Tensor, name: str = "x") -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of `left @ right` in float64: `u [g, m, r]`, `s [g, r]` non-increasing, `vh [g, r, n]`.

    Raises:
        NonFiniteError: a factor holds NaN or Inf.
        DecompositionError: the small SVD did not converge.
    """
    (q_left, _), (q_right, _), (u, s, vh) = _core(left, right, name)
    return q_left @ u, s, vh @ q_right.mT


def factored_prox(left: Tensor, right: Tensor, penalty: Penalty, tau: float, name: str = "x") -> tuple[Tensor, Tensor, Tensor]:
    r"""The proximal step of a penalty on the singular values of `A B`, as a step of its factors.

    .. math:: A \leftarrow A - U (1 - d) U^T A, \quad B \leftarrow B - B V (1 - d) V^T, \qquad d = \sqrt{s' / s}

    The product of the new factors is :math:`U \operatorname{diag}(s') V^T`, exactly the proximal step on the product; yet
    every factor stays in its own coordinates, so that an optimizer's moments still fit, and what is not shrunk
    does not move at all. With `U = Q_a U'` and `A = Q_a R_a` all but one product with `Q_a` is r x r.

    Returns:
        new left and right (float64), and the new singular values (float64, non-increasing).
    """
    (q_left, r_left), (q_right, r_right), (u, s, vh) = _core(left, right, name)
    shrunk = penalty.prox(s, tau)
    lost = 1 - torch.where(s > 0, shrunk / s.clamp_min(math.ulp(0.0)), torch.zeros_like(s)).sqrt()
    new_left = left.detach().double() - q_left @ ((u * lost[..., None, :]) @ (u.mT @ r_left))
    new_right = right.detach().double() - (q_right @ ((vh.mT * lost[..., None, :]) @ (vh @ r_right))).mT
    return new_left, new_right, shrunk


Pair = tuple[Tensor, Tensor]


def _core(left: Tensor, right: Tensor, name: str) -> tuple[Pair, Pair, tuple[Tensor, Tensor, Tensor]]:
    """QR of the left factor, QR of the right one transposed, and the SVD of what is between them; in float64."""
    left, right = left.detach().double(), right.detach().double()
    check_finite(left, name)
    check_finite(right, name)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    try:
        u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise DecompositionError(f"{name}: {first_line(error)}; nothing was changed") from None
    return (q_left, r_left), (q_right, r_right), (u, s, vh)
