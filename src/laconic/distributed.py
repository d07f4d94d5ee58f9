"""What changes when several processes train one model: whole weights out of shards and back, and one decision for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gathered(value: T) -> list[T]:
    """The value of every process, in every process, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(compute: Callable[[], T]) -> T:
    """The value that the first process computes, in every process: for whatever is measured."""
    if world_size() == 1:
        return compute()
    box: list[Any] = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    value: T = box[0]
    return value


def bare(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, or what `torch.compile` returned."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Is it, or a part of it, what `torch.compile` returned, or compiled in place?"""
    return any(isinstance(getattr(m, "_orig_mod", None), nn.Module) or m._compiled_call_impl is not None for m in model.modules())


def is_sharded(weight: Tensor) -> bool:
    """Does every process hold only a part of it (FSDP2: a DTensor)?"""
    return hasattr(weight, "full_tensor")


def own_class(module: nn.Module) -> type:
    """The class that the user wrote: FSDP2 puts one of its own in front, which cannot be copied."""
    order = type(module).__mro__
    names = [kind.__name__ for kind in order]
    return order[names.index("FSDPModule") + 1] if "FSDPModule" in names else order[0]


def full(weight: Tensor) -> Tensor:
    """The whole weight, detached; gathered from all processes where it is sharded."""
    gathered: Tensor = weight.detach().full_tensor() if is_sharded(weight) else weight.detach()  # type: ignore[attr-defined]
    return gathered


@torch.no_grad()
def write(weight: Tensor, value: Tensor) -> None:
    """Set a weight to a whole value that is the same in all processes; each keeps its own part."""
    if is_sharded(weight):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(weight.device, weight.dtype)
        value = distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)  # type: ignore[attr-defined]
    weight.copy_(value)


def reshard(model: nn.Module) -> None:
    """FSDP2 leaves the root's parameters whole after a forward pass without a backward pass: back to shards."""
    for module in model.modules():
        back: Any = getattr(module, "reshard", None)
        if back is not None:
            back()


def load_whole(target: nn.Module, source: nn.Module) -> None:
    """Load the whole state of a sharded model into an ordinary one of the same class, in every process."""
    target.load_state_dict({name: full(value) for name, value in source.state_dict().items()})
