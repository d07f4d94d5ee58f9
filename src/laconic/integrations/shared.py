"""What the integrations have in common: a callback's keywords, how its run starts and ends, the file of a compressor's state."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_arguments
from ..budget import Budget
from ..checkpoint import check_target, save, write_file
from ..compressor import Compressor
from ..distributed import bare, rank
from ..errors import CheckpointError, CheckpointNotFoundError, InvalidValueError, first_line, nearest
from ..penalties import check_share
from ..report import CompactReport
from ..schedule import Schedule
from ..structures import LowRank, Structure

STATE = "laconic.pt"


class CompressedRun:
    """The part of a callback that no trainer needs to be asked about.

    Args:
        structures, budget, example_inputs, every, cut, schedule: as for `laconic.Compressor`.
        total_steps: optimizer steps of the whole run; None: what the trainer says.
        module: path of the part that is compressed, such as `"net"`; by default all of the model. `example_inputs` are
            that part's.
        energy: without a budget, the share of squared singular values that every layer keeps at the end; see
            `Compressor.compact`.
        directory: where the compact model is saved when training ends, as `laconic.save` does; None: nowhere.

    Attributes:
        compressor: from the start of training on; `print(callback.compressor.plan)`.
        report: what was done to every layer, when training has ended.

    Raises:
        InvalidValueError: `energy` together with a budget. CheckpointError: something else is in `directory`.
    """

    def __init__(
        self,
        structures: Structure | Sequence[Structure] | None = None,
        *,
        budget: Budget | None = None,
        total_steps: int | None = None,
        example_inputs: Any = None,
        every: int | None = None,
        cut: str = "early",
        schedule: Schedule | None = None,
        module: str = "",
        energy: float | None = None,
        directory: str | os.PathLike[str] | None = None,
    ):
        if energy is not None and budget is not None:
            raise InvalidValueError(f"energy = {energy}: the budget rules here; leave energy out")
        given = list(structures) if isinstance(structures, (list, tuple)) else [structures or LowRank()]
        check_arguments(
            [s for s in given if isinstance(s, Structure)], budget, 1 if total_steps is None else total_steps, every, cut, schedule
        )
        if directory is not None:
            check_target(Path(directory))
        self.module = module
        self.energy = check_share(energy) if energy is not None else None
        self.directory = directory
        self.compressor: Compressor | None = None
        self.report: CompactReport | None = None
        self._options: dict[str, Any] = {
            "structures": structures,
            "budget": budget,
            "total_steps": total_steps,
            "example_inputs": example_inputs,
            "every": every,
            "cut": cut,
            "schedule": schedule,
        }

    @property
    def _cuts_early(self) -> bool:
        """Are layers cut in mid-run?"""
        return self._options["budget"] is not None and self._options["cut"] == "early"

    def _start(self, model: nn.Module, optimizer: Any, total_steps: int | None, compiled: bool = False, **options: Any) -> Compressor:
        """Build the compressor; `compiled`: by the trainer; `options` are this trainer's own, and go before what was given."""
        if self.compressor is not None:
            raise InvalidValueError(
                "this callback has had its run: give the next one a callback of its own, or none, to train the compact model on"
            )
        options = {key: value for key, value in self._options.items() if value is not None} | options
        if total_steps is not None:
            options.setdefault("total_steps", total_steps)
        part = self._part(model)
        if "example_inputs" in options:
            options["example_inputs"] = on_device(options["example_inputs"], part)
        self.compressor = Compressor(part, optimizer, **options)
        self.compressor._compiled |= compiled
        return self.compressor

    def _part(self, model: nn.Module) -> nn.Module:
        """What is compressed of a model."""
        names = [name for name, _ in bare(model).named_modules()]
        if self.module not in names:
            raise InvalidValueError(f"module = {self.module!r}: the model has no such part{nearest(self.module, names)}")
        return bare(model).get_submodule(self.module)

    def _finish(self) -> None:
        """Compact, and save where that was asked for."""
        assert self.compressor is not None
        self.report = self.compressor.compact(self.energy)
        if self.directory is not None and rank() == 0:
            save(self.compressor.model, self.directory, self.report)


def on_device(inputs: Any, model: nn.Module) -> Any:
    """Example inputs on the device where the model is."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, (tuple, list)):
        return tuple(on_device(x, model) for x in inputs)
    if isinstance(inputs, Mapping):
        return {name: on_device(x, model) for name, x in inputs.items()}
    return inputs


def write_state(state: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    fresh = path.with_name(f".{path.name}.tmp")
    write_file(fresh, buffer.getvalue())
    os.replace(fresh, path)


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        CheckpointNotFoundError: there is no such file. CheckpointError: it cannot be read.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} is missing: the checkpoint was saved without laconic, or was not finished")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from None
    return state
