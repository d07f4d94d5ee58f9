"""What laconic asks of an optimizer: did it step, which weights does it hold, at which learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NonFiniteError, OptimizerError, UnsupportedOptimizerError


def check_optimizers(optimizer: Any) -> list[Any]:
    """One optimizer or several as a list; wrappers without hooks of their own (Accelerate's) are unwrapped.

    Raises:
        OptimizerError: an empty list, or the same one twice.
        UnsupportedOptimizerError: LBFGS, an object without parameter groups, or one that is told no learning rate.
    """
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not optimizers:
        raise OptimizerError("optimizer: the list is empty")
    found: list[Any] = []
    for o in optimizers:
        if not has_hooks(o) and hasattr(o, "optimizer"):
            o = o.optimizer
        if isinstance(o, torch.optim.LBFGS):
            raise UnsupportedOptimizerError(
                "LBFGS evaluates the loss several times per step and keeps a history that a proximal step would contradict: use SGD, Adam, AdamW, ..."
            )
        if not hasattr(o, "param_groups"):
            raise UnsupportedOptimizerError(f"{type(o).__name__} has no param_groups: expected a torch.optim.Optimizer")
        if any("lr" not in g for g in o.param_groups):
            raise UnsupportedOptimizerError(
                f"{type(o).__name__} has no 'lr' in its param_groups, but the pressure goes with the learning rate: keep it there under that name"
            )
        if any(g["lr"] is None for g in o.param_groups):
            raise UnsupportedOptimizerError(
                f"{type(o).__name__}(lr=None) finds its steps by itself, but the pressure goes with the learning rate: give it one, such as Adafactor(lr=1e-3, relative_step=False)"
            )
        if any(o is other for other in found):
            raise OptimizerError(f"optimizer: the same {type(o).__name__} twice in the list, so that it would press twice: leave one out")
        found.append(o)
    return found


def has_hooks(optimizer: Any) -> bool:
    """Can the optimizer call us after its steps? A wrapper that never called `Optimizer.__init__` has only the method."""
    return hasattr(optimizer, "register_step_post_hook") and hasattr(optimizer, "_optimizer_step_post_hooks")


def was_skipped(optimizer: Any) -> bool:
    """Inside the hook: a fused optimizer under a GradScaler found an Inf and changed nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def holds(optimizer: Any, weight: Tensor) -> bool:
    return any(p is weight for g in optimizer.param_groups for p in g["params"])


def last_holder(optimizers: Sequence[Any], weight: Tensor) -> Any:
    """The last optimizer that holds the weight: its step completes the round."""
    return [o for o in optimizers if holds(o, weight)][-1]


def learning_rate(optimizer: Any, weight: Tensor) -> float:
    """The rate at which the weight is trained now."""
    return sum(float(g["lr"]) for g in optimizer.param_groups if any(p is weight for p in g["params"]))


def peak_learning_rate(optimizers: Sequence[Any], weights: Sequence[Tensor]) -> float:
    """The largest rate of these weights that is set or announced: schedulers note where they started from, or where they go, in the groups."""
    these = {id(w) for w in weights}
    groups = [g for o in optimizers for g in o.param_groups if any(id(p) in these for p in g["params"])]
    return max((float(g.get(key, 0.0)) for g in groups for key in ("lr", "initial_lr", "max_lr")), default=0.0)


def named_by_identity(model: nn.Module) -> dict[int, str]:
    """Names of all parameters by the identity of the object."""
    return {id(p): name for name, p in model.named_parameters()}


def check_parameters(model: nn.Module, known: dict[int, str], optimizers: Sequence[Any], weights: Sequence[Tensor]) -> None:
    """The model still has the parameters it had, and the optimizers still hold the weights.

    Raises:
        OptimizerError: parameters were added, replaced or removed; names them.
    """
    now = named_by_identity(model)
    added = sorted(name for key, name in now.items() if key not in known)
    gone = sorted(name for key, name in known.items() if key not in now)
    if added or gone:
        what = "; ".join(f"{verb}: {', '.join(names)}" for verb, names in (("added", added), ("gone", gone)) if names)
        raise OptimizerError(f"the model's parameters changed in mid-run ({what}): build a new Compressor after changing the model")
    held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    lost = sorted(known[id(w)] for w in weights if id(w) not in held)
    if lost:
        raise OptimizerError(f"the optimizer no longer holds {', '.join(lost)}: build a new Compressor after changing its groups")


def check_trained(model: nn.Module) -> None:
    """Nothing is NaN or Inf at the end of training.

    Raises:
        NonFiniteError: names the parameters.
    """
    bad = [name for name, p in model.named_parameters() if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise NonFiniteError(f"{bad[0]}{more} holds NaN or Inf: load the last good checkpoint of the model")


def attached_to(optimizer: Any, kind: type) -> list[Any]:
    """The objects of a class whose methods hang on the optimizer's steps."""
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", {}).values()
    owners = [getattr(getattr(hook, "func", hook), "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, kind)]
