"""Accelerate: the loop is your own, with a `Compressor` in it; here is what lets Accelerate save and load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compressor import Compressor
from .shared import STATE, read_state, write_state

if TYPE_CHECKING:
    from accelerate import Accelerator


def register_for_checkpointing(accelerator: Accelerator, compressor: Compressor) -> None:
    """`accelerator.save_state(directory)` saves the compressor too, in `laconic.pt`; `accelerator.load_state(directory)`, on a
    fresh dense model with its optimizer and compressor, makes the same cuts before it loads the rest.

    `accelerator.register_for_checkpointing` would load the compressor last, when the weights of cut layers have not fitted.

    Example:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.25), total_steps=n)
        register_for_checkpointing(accelerator, compressor)
    """

    def save(models: list[Any], weights: list[Any], directory: str) -> None:
        if accelerator.is_main_process:
            write_state(compressor.state_dict(), Path(directory) / STATE)

    def load(models: list[Any], directory: str) -> None:
        compressor.load_state_dict(read_state(Path(directory) / STATE))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
