"""Accelerate: the loop is your own, with a `Compressor` in it; here is what lets Accelerate save and load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ..compressor import Compressor
from ..errors import CheckpointError, InvalidValueError
from .shared import STATE, read_state, write_state

if TYPE_CHECKING:
    from accelerate import Accelerator


_registered: WeakSet[Any] = WeakSet()


def register_for_checkpointing(accelerator: Accelerator, *compressors: Compressor) -> None:
    """`accelerator.save_state(directory)` saves the compressors too, in `laconic.pt`; `accelerator.load_state(directory)`, on
    fresh dense models with their optimizers and compressors, makes the same cuts before it loads the rest.

    `accelerator.register_for_checkpointing` would load them last, when the weights of cut layers have not fitted.

    Raises:
        InvalidValueError: called before for this accelerator.

    Example:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.25), total_steps=n)
        register_for_checkpointing(accelerator, compressor)
    """

    if accelerator in _registered:
        raise InvalidValueError("this accelerator saves its compressors already: register all of them in one call")
    _registered.add(accelerator)

    def save(models: list[Any], weights: list[Any], directory: str) -> None:
        if accelerator.is_main_process:
            write_state({"compressors": [c.state_dict() for c in compressors]}, Path(directory) / STATE)

    def load(models: list[Any], directory: str) -> None:
        states = read_state(Path(directory) / STATE)["compressors"]
        if len(states) != len(compressors):
            raise CheckpointError(f"{directory} holds the state of {len(states)} compressors, {len(compressors)} are registered")
        for compressor, state in zip(compressors, states, strict=True):
            compressor.load_state_dict(state)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
