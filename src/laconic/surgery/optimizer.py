r"""Carry an optimizer over a factorisation `W = A B` (in unfolded coordinates).

- First moments follow the chain rule: :math:`M_A = M_W B^T`, :math:`M_B = A^T M_W`.
- Second moments have no exact map. We take the *independent-entries approximation*: if the entries of the gradient of W
  are uncorrelated, :math:`g_A = g_W B^T` has :math:`E[g_A^2] = V_W (B \circ B)^T`, and likewise
  :math:`V_B = (A \circ A)^T V_W`.
- Where the state holds a mean beside the second moment (centered RMSprop), the approximation is made on the variance,
  `V_W - M_W^2`, or the optimizer would take the root of a negative number.
- Step counters and other scalars are copied.

An optimizer whose state has an entry of an unknown meaning is not touched; `unknown_state` names the entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..matricize import Unfolding
from .factorize import pair_matrices, pair_weights, weights

FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"})


def unknown_state(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> str | None:
    """The first entry of this weight's state that laconic cannot carry over, or None."""
    for key, value in getattr(optimizer, "state", {}).get(weight, {}).items():
        if isinstance(value, Tensor) and value.numel() > 1 and not (key in FIRST_MOMENTS | SECOND_MOMENTS and value.shape == weight.shape):
            return str(key)
    return None


def carry(optimizer: torch.optim.Optimizer, weight: nn.Parameter, pair: nn.Sequential, unfolding: Unfolding) -> None:
    """Replace `weight` by the pair's weights in the optimizer's groups, with its state; in place, nothing else changes."""
    new = weights(pair)
    for group in optimizer.param_groups:
        # By identity: `in` would compare tensors.
        where = [i for i, p in enumerate(group["params"]) if p is weight]
        for i in where:
            group["params"][i : i + 1] = new
    state = getattr(optimizer, "state", {}).pop(weight, None)
    if not state:
        return
    left, right = pair_matrices(unfolding, *(w.detach().double() for w in new))
    carried: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == weight.shape and value.numel() > 1:
            moment = unfolding.unfold(value.double())
            if key in FIRST_MOMENTS:
                factors = moment @ right.mT, left.mT @ moment
            else:
                mean = unfolding.unfold(state["grad_avg"].double()) if key == "square_avg" and "grad_avg" in state else None
                spread = moment if mean is None else (moment - mean.square()).clamp_min(0)
                factors = spread @ right.square().mT, left.square().mT @ spread
                if mean is not None:  # a little more than the square of the carried mean: rounding must not make it less
                    slack = 1 + 8 * torch.finfo(value.dtype).eps
                    factors = factors[0] + slack * (mean @ right.mT).square(), factors[1] + slack * (left.mT @ mean).square()
            parts = pair_weights(unfolding, *factors)
            for target, part, parameter in zip(carried, parts, new, strict=True):
                target[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(part)
        else:
            for target in carried:
                target[key] = value.clone() if isinstance(value, Tensor) else value
    for parameter, target in zip(new, carried, strict=True):
        optimizer.state[parameter] = target
