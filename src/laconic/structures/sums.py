"""Sums of regularizers that have a name: lists of structures, whose proximal steps follow one another."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidValueError
from ..penalties import L1
from .channels import Channels
from .entries import Entries


def sparse_group_lasso(strength: float, alpha: float, **options: Any) -> list[Entries | Channels]:
    r"""The regularizer of Alvarez & Salzmann 2016: :math:`\sum_l (1 - \alpha) \lambda \sqrt{P_l} \sum_u \|\theta_u\|_2 + \alpha \lambda \|\theta\|_1`.

    Args:
        strength: :math:`\lambda`; alpha: between 0 (group lasso) and 1 (lasso).
        options: of both, such as `exclude=`.
    """
    if not 0 <= alpha <= 1:
        raise InvalidValueError(f"alpha = {alpha}: a mix between 0 (group lasso) and 1 (lasso)")
    return [
        Entries(strength=alpha * strength, scale="absolute", **options),
        Channels.as_published((1 - alpha) * strength, **options),
    ]


def structured_sparsity(
    *, filters: float = 0.0, channels: float = 0.0, shapes: float = 0.0, depth: float = 0.0, **options: Any
) -> list[Entries | Channels]:
    r"""The regularizer of Wen et al. 2016, *Learning Structured Sparsity in Deep Neural Networks* (SSL), for weights W [out, in, kernel]:

    .. math:: \lambda_f \sum_n \|W_{n,:,:}\| + \lambda_c \sum_c \|W_{:,c,:}\| + \lambda_s \sum_{c,k} \|W_{:,c,k}\| + \lambda_d \|W\|

    The sets of groups overlap: where the paper takes subgradients, their proximal steps follow one another here (incremental
    proximal method). In `compact()` neurons go that are zero, and those that nothing reads any more; of a residual branch
    whose last weight is zero one hidden unit is left. Filter shapes are zeros that save nothing, and are reported.

    Args:
        filters, channels, shapes, depth: the four strengths :math:`\lambda`, absolute; depth is the norm of a whole weight.
        options: of all, such as `exclude=`. Keep the layers whose output must not vanish out of `channels` and `depth`.
    """
    groups = {(0, 2, 3, 4): channels, (0,): shapes, (0, 1, 2, 3, 4): depth}
    of_rows: dict[str, Any] = {"penalty": L1(), "scale": "absolute"}
    return [
        *(Entries(strength=strength, scale="absolute", over=over, **options) for over, strength in groups.items() if strength),
        Channels(strength=filters, **of_rows | options),
    ]
