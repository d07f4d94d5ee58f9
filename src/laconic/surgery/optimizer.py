r"""Carry an optimizer over a factorisation `W = A B` (in unfolded coordinates).

- First moments follow the chain rule: :math:`M_A = M_W B^T`, :math:`M_B = A^T M_W`.
- Second moments have no exact map. We take the *independent-entries approximation*: if the entries of the gradient of W
  are uncorrelated, :math:`g_A = g_W B^T` has :math:`E[g_A^2] = V_W (B \circ B)^T`, and likewise
  :math:`V_B = (A \circ A)^T V_W`.
- Where the state holds a mean beside the second moment (centered RMSprop), the approximation is made on the variance,
  `V_W - M_W^2`, or the optimizer would take the root of a negative number.
- A pair that is cut again, `A' = A E`, `B' = C B`, is carried in the same two ways: :math:`M_{A'} = M_A C^T`,
  :math:`V_{A'} = V_A (C \circ C)^T`, and likewise for B.
- Step counters and other scalars are copied.
- Where channels are removed, every entry of the weight's shape is sliced as the weight is.
- Entries that are packed (tensors of 8 or 4 bits in a class of their own) are not known.

An optimizer whose state has an entry of an unknown meaning is not touched; `unknown_state` names the entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..matricize import Unfolding
from ..solvers.gram import promoted_matmul
from .factorize import pair_matrices, pair_weights, weights

FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"})


def unknown_state(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> str | None:
    """The first entry of this weight's state that laconic cannot carry over, or None."""
    for key, value in getattr(optimizer, "state", {}).get(weight, {}).items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if key not in FIRST_MOMENTS | SECOND_MOMENTS or value.shape != weight.shape or is_traceable_wrapper_subclass(value):
            return str(key)
    return None


def carry(optimizer: torch.optim.Optimizer, old: Sequence[nn.Parameter], pair: nn.Sequential, unfolding: Unfolding) -> None:
    """Replace a weight, or the two weights of a pair that is cut again, by the pair's weights in the optimizer's groups,
    with its state; in place, nothing else changes."""
    new = weights(pair)
    for group in optimizer.param_groups:
        params, names = list[nn.Parameter](), list[str]()
        known_as = group.get("param_names") or [""] * len(group["params"])
        for p, name in zip(group["params"], known_as, strict=True):  # by identity: `in` would compare tensors
            position = next((i for i, w in enumerate(old) if p is w), None)
            here = [p] if position is None else new if len(old) == 1 else [new[position]]
            params += here
            path, dot, leaf = name.rpartition(".")
            names += [name] if len(here) == 1 else [f"{path}{dot}{i}.{leaf}" for i in range(len(here))]
        group["params"][:] = params
        if "param_names" in group:
            group["param_names"][:] = names
    known = all(unknown_state(optimizer, w) is None for w in old)
    states = [getattr(optimizer, "state", {}).pop(w, None) for w in old]
    if not all(states) or not known:  # nothing to carry, or nothing that can be: the pair starts without a state
        return
    left, right = pair_matrices(unfolding, *(w.detach() for w in new))
    to_left, to_right = right.mT, left.mT
    if len(old) == 2:  # new left = old left @ E and new right = C @ old right, and gradients go the other way
        old_left, old_right = pair_matrices(unfolding, *(w.detach().double() for w in old))
        to_left, to_right = _solve(old_right.mT, right.double().mT), _solve(old_left, left.double()).mT
    carried: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    means = [state.get("grad_avg") for state in states]
    for key in list(states[0]):
        values = [state.pop(key) for state in states]  # let go one by one
        if not _is_moment(key, values[0], old[0]):
            for target, value in zip(carried, (values[0], values[-1]), strict=True):
                target[key] = value.clone() if isinstance(value, Tensor) else value
            continue
        from_left, from_right = _matrices(unfolding, values)
        mean_left = mean_right = None
        if key == "square_avg" and means[0] is not None:
            mean_left, mean_right = _matrices(unfolding, means)
        dtype = values[0].dtype  # one factor at a time is held in float64
        parts = pair_weights(
            unfolding,
            _carried(key, from_left, mean_left, lambda x, power: promoted_matmul(to_left.double().mT.pow(power), x.mT).mT).to(dtype),
            _carried(key, from_right, mean_right, lambda x, power: promoted_matmul(to_right.double().pow(power), x)).to(dtype),
        )
        for target, part, parameter in zip(carried, parts, new, strict=True):
            target[key] = torch.empty_like(parameter, dtype=dtype).copy_(part)
    for parameter, target in zip(new, carried, strict=True):
        optimizer.state[parameter] = target


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """`argmin_X ||a X - b||`, by the normal equations with a small ridge (`a` may have lost its rank)."""
    gram = a.mT @ a
    ridge = 1e-8 * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-300)
    return torch.linalg.solve(gram + torch.diag_embed(ridge.expand(*gram.shape[:-1])), a.mT @ b)


def _is_moment(key: str, value: Any, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape and (value.numel() > 1 or key in FIRST_MOMENTS | SECOND_MOMENTS)


def _matrices(unfolding: Unfolding, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What the left and the right factor's entry is made from: the weight's own entry, or each factor's."""
    if len(values) == 1:
        matrix = unfolding.unfold(values[0])
        return matrix, matrix
    return pair_matrices(unfolding, values[0].double(), values[1].double())


def _carried(key: str, value: Tensor, mean: Tensor | None, gradient_map: Callable[[Tensor, int], Tensor]) -> Tensor:
    """An entry under the linear map of the gradients; `gradient_map(x, 2)` has its coefficients squared."""
    if key in FIRST_MOMENTS:
        return gradient_map(value, 1)
    if mean is None:
        return gradient_map(value, 2)
    # A little more than the square of the carried mean: rounding must not make it less.
    slack = 1 + 8 * torch.finfo(torch.float32).eps
    return gradient_map((value.double() - mean.double().square()).clamp_min(0), 2) + slack * gradient_map(mean, 1).square()


@dataclass(frozen=True, slots=True)
class Replacement:
    """A parameter, the slice of it that takes its place, and how whatever has its shape is sliced."""

    old: nn.Parameter
    new: nn.Parameter
    select: Callable[[Tensor], Tensor]


def states_to_slice(optimizer: torch.optim.Optimizer, replacements: Sequence[Replacement]) -> list[tuple[Replacement, dict[str, Any]]]:
    """The old parameters' states. Where an entry is neither a scalar nor a tensor of the parameter's shape, nobody can say how to slice
    it: that parameter is missing, and starts without a state."""
    states = [(r, getattr(optimizer, "state", {}).get(r.old)) for r in replacements]
    return [(r, s) for r, s in states if s and all(_can_be_sliced(v, r.old) for v in s.values() if isinstance(v, Tensor))]


def _can_be_sliced(value: Tensor, parameter: Tensor) -> bool:
    return value.numel() == 1 or (value.shape == parameter.shape and not is_traceable_wrapper_subclass(value))


def replace(
    optimizer: torch.optim.Optimizer, replacements: Sequence[Replacement], states: Sequence[tuple[Replacement, dict[str, Any]]]
) -> None:
    """Put the new parameters in the places of the old ones in the optimizer's groups, with their states, in place: an entry
    is sliced and its old self let go before the next is."""
    new = {id(r.old): r.new for r in replacements}  # by identity: `==` would compare tensors
    for group in optimizer.param_groups:
        group["params"][:] = [new.get(id(p), p) for p in group["params"]]
    for r in replacements:
        getattr(optimizer, "state", {}).pop(r.old, None)
    for r, state in states:
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == r.old.shape:
                state[key] = r.select(value)
        optimizer.state[r.new] = state
