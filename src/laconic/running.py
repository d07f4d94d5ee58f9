"""Running checkpoints: a run that is killed at any moment goes on where it was.

A directory holds numbered checkpoints. Each is written to a hidden directory beside them, flushed to disk, and then
takes its name, so that a name always stands for a whole checkpoint:

    step-00000120/
      model/            what `laconic.save` writes: `laconic.load` reads it into a fresh dense model
      training.pt       everything else that has a state (no pickle beyond `weights_only`)
      checkpoint.json   format, step, hash of training.pt
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import _version
from .checkpoint import check_place, read_tensors, save, sync_directory, write_file
from .checks import check_module, whole_number
from .compressor import Compressor
from .cuts import all_or_nothing
from .distributed import agreed, bare, gathered, is_sharded, rank, world_size
from .errors import CheckpointError, InvalidTypeError, InvalidValueError, one_line
from .plain import plain, plain_json

FORMAT = 1
MODEL, TRAINING, MANIFEST = "model", "training.pt", "checkpoint.json"


class DamagedError(CheckpointError):
    """A checkpoint that is not whole: the one before it will do."""


class RunCheckpoints:
    """Save and resume a training loop.

    Args:
        directory: of the checkpoints; created.
        model: trained by the loop, wrapped (DistributedDataParallel, `torch.compile`) or not; on resume the fresh dense one.
        compressor: of this very model; on resume a fresh one, built on the fresh model and its optimizer. None: a run without.
        settings: plain JSON data that must be the same on resume: whatever decides the run.
        keep: how many checkpoints to keep, at least 1. With 2, a damaged newest one costs one interval.
        parts: everything else that has `state_dict` and `load_state_dict`: optimizers, schedulers, scalers, by name. All
            optimizers of the compressor must be among them.

    Raises:
        InvalidValueError, InvalidTypeError: an argument that cannot be right, such as the compressor of another model.
        CheckpointError: nothing can be written there, such as below a file.

    Example:
        >>> import tempfile, torch, laconic
        >>> def start(directory):
        ...     model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        ...     optimizer = torch.optim.AdamW(model.parameters())
        ...     compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.5), total_steps=100)
        ...     return model, optimizer, laconic.RunCheckpoints(directory, model, compressor, optimizer=optimizer)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _, _, checkpoints = start(directory)
        ...     _ = checkpoints.save(40, extra={"epoch": 2})
        ...     _, _, checkpoints = start(directory)        # another process, later
        ...     checkpoints.resume()
        (40, {'epoch': 2})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: nn.Module,
        compressor: Compressor | None = None,
        *,
        settings: dict[str, Any] | None = None,
        keep: int = 2,
        **parts: Any,
    ):
        check_module(model)
        for name, part in parts.items():
            if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
                raise InvalidTypeError(f"{name}: {type(part).__name__} has no state_dict and load_state_dict; plain data goes into extra=")
        if compressor is not None:
            _check_compressor(compressor, model, parts)
        self.directory = Path(directory)
        check_place(self.directory / MODEL)
        self.model = bare(model)
        self.compressor = compressor
        self.settings = plain_json(settings or {}, "settings")
        self.keep = whole_number("keep", keep, 1)
        self.parts = parts
        self._own = False  # are the checkpoints of this run, resumed or saved here?

    def save(self, step: int, extra: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint, whole or not at all, and remove all but the newest `keep`. Those of later steps go as well where this run resumed from
        before them (they were damaged) or wrote them itself; where it did neither, it is refused.

        With several processes (DistributedDataParallel) call it in all of them: the first one writes, and all random
        states are kept; `extra` is the first one's.

        Args:
            step: optimizer steps done; names the checkpoint.
            extra: plain data (numbers, strings, tensors, lists, dicts): the loop's own position, generators' states.
                PyTorch's own generators are saved without being asked for. Numpy's scalars come back as Python's numbers,
                its arrays as tensors; so it is in the states of the parts.

        Raises:
            InvalidValueError: `step` is not a whole number.
            InvalidTypeError: `extra` or a part's state holds what could not be read back without pickle; nothing is written.
            CheckpointError: there are checkpoints of later steps, and this run has not resumed: nothing is written.
        """
        step = whole_number("step", step, 0)
        extra = plain(extra or {}, "extra")
        if not self._own and (there := self.steps()) and there[-1] > step:  # they would be the newest, which are kept and resumed
            raise CheckpointError(
                f"{self.directory} holds checkpoints of a run that got further, to step {there[-1]}: step {step} was not saved; resume() that run first, clear() to start anew, or give another directory"
            )
        if any(is_sharded(p) for p in self.model.parameters()):
            raise CheckpointError("the model is sharded (FSDP2): save its parts with torch.distributed.checkpoint")
        random = gathered({"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []})
        written = agreed(lambda: str(self._write(step, random, extra)))
        self._own = True
        return Path(written)

    def _write(self, step: int, random: list[dict[str, Any]], extra: dict[str, Any]) -> Path:
        state = {
            "compressor": plain(self.compressor.state_dict(), "compressor") if self.compressor is not None else None,
            "parts": {name: plain(part.state_dict(), name) for name, part in self.parts.items()},
            "classes": {name: type(part).__name__ for name, part in self.parts.items()},
            "random": random,
            "extra": extra,
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        manifest = {
            "format": FORMAT,
            "laconic": _version.__version__,
            "torch": torch.__version__,
            "step": step,
            "settings": self.settings,
            "sha256": hashlib.sha256(payload).hexdigest(),
        }
        target = self.directory / f"step-{step:08d}"
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=self.directory))
        try:
            save(self.model, fresh / MODEL)
            write_file(fresh / TRAINING, payload)
            write_file(fresh / MANIFEST, json.dumps(manifest, indent=1).encode())
            sync_directory(fresh)
            os.chmod(fresh, 0o755)
            self._discard(target)  # the same step again, after a resume
            os.rename(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        sync_directory(self.directory)
        there = self.steps()
        if step not in there:
            raise CheckpointError(
                f"{target} is gone as soon as it was written: does another run write to {self.directory}? Give each its own directory"
            )
        at = there.index(step) + 1  # what follows is of a future that this run does not have
        for other in (*there[at:], *there[:at][: -self.keep]):
            self._discard(self._path(other))
        return target

    def resume(self) -> tuple[int, dict[str, Any]] | None:
        """Load the newest whole checkpoint into model, compressor and parts; a damaged one is named in a warning, and the
        one before it taken.

        Returns:
            the step and `extra`; None where there is no checkpoint.

        Raises:
            CheckpointError: none is whole, another format, or of another run (other settings, other parts, a part of another
                class, a state that a part refuses). Model, compressor and optimizers are then as they were.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                state, tensors = self._read(step)
            except DamagedError as error:
                damaged.append(str(error))
                continue
            if damaged:
                warnings.warn(f"{'; '.join(damaged)}; resuming from step {step} before it", stacklevel=2)
            self._load(step, state, tensors)
            self._own = True
            return step, state["extra"]
        if damaged:
            raise CheckpointError(f"no whole checkpoint in {self.directory}: {'; '.join(damaged)}")
        return None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, whole or not, oldest first."""
        return sorted(int(p.name[5:]) for p in self.directory.glob("step-*") if p.name[5:].isdigit())

    def clear(self) -> None:
        """Remove all checkpoints: the run is over, or starts anew."""
        for step in self.steps():
            self._discard(self._path(step))
        self._sweep()

    def _discard(self, checkpoint: Path) -> None:
        """First the name, then the content: what has a name is whole, also when this is killed half-way."""
        if checkpoint.exists():
            gone = checkpoint.with_name(f".{checkpoint.name}.gone.tmp")
            shutil.rmtree(gone, ignore_errors=True)
            os.rename(checkpoint, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _sweep(self) -> None:
        """What a killed save has left behind."""
        for leftover in self.directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _read(self, step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        path = self._path(step)
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            version = manifest["format"]
            payload = (path / TRAINING).read_bytes()
            whole = hashlib.sha256(payload).hexdigest() == manifest["sha256"] and manifest["step"] == step
        except (OSError, ValueError, KeyError, TypeError):
            raise DamagedError(f"checkpoint {path} is damaged") from None
        if version != FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {version!r}; this laconic reads {FORMAT}: install the version that wrote it ({manifest.get('laconic')})"
            )
        if not whole:
            raise DamagedError(f"checkpoint {path} is damaged")
        self._check_settings(path, manifest.get("settings", {}))
        try:
            tensors = read_tensors(path / MODEL)
        except CheckpointError as error:
            raise DamagedError(f"checkpoint {path} is damaged ({error})") from None
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # an earlier version did not look when it saved
            raise CheckpointError(
                f"{path / TRAINING} holds what cannot be read without pickle: allow its classes by torch.serialization.add_safe_globals, or start anew"
            ) from error
        return state, tensors

    def _check_settings(self, path: Path, saved: dict[str, Any]) -> None:
        changed = [
            f"{key} was {saved.get(key)!r}, is {self.settings.get(key)!r}"
            for key in sorted(saved.keys() | self.settings.keys())
            if saved.get(key) != self.settings.get(key)
        ]
        if changed:
            raise CheckpointError(f"checkpoint {path} belongs to a run with other settings: {'; '.join(changed)}")

    def _load(self, step: int, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        where = f"checkpoint {self._path(step)}"
        self._check_run(where, state)
        with self._as_it_was_on_error():
            if self.compressor is not None:  # first: it makes the same cuts on model and optimizer
                self.compressor.load_state_dict(state["compressor"])
            try:
                self.model.load_state_dict(tensors)
            except RuntimeError as error:
                raise CheckpointError(f"{where} does not fit the model: {one_line(error)}") from None
            for name, part in self.parts.items():
                try:
                    part.load_state_dict(state["parts"][name])
                except Exception as error:  # a part's own code
                    raise CheckpointError(
                        f"{where} does not fit the part {name} ({type(part).__name__}): {type(error).__name__}: {one_line(error)}"
                    ) from error
        random = state["random"][rank()]
        if random["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(random["cuda"])
        torch.set_rng_state(random["cpu"])

    def _check_run(self, where: str, state: dict[str, Any]) -> None:
        """All that can be told before anything is loaded."""
        if (state["compressor"] is None) != (self.compressor is None):
            raise CheckpointError(f"{where} was saved {'without' if state['compressor'] is None else 'with'} a compressor, unlike this run")
        if state["parts"].keys() != self.parts.keys():
            raise CheckpointError(f"{where} holds the parts {sorted(state['parts'])}, this run has {sorted(self.parts)}")
        for name, kind in state.get("classes", {}).items():  # not in those of earlier versions
            if kind != type(self.parts[name]).__name__:
                raise CheckpointError(
                    f"{where}: the part {name} was of the class {kind}, is of {type(self.parts[name]).__name__}: resume with the class that was saved"
                )
        if len(state["random"]) != world_size():
            raise CheckpointError(f"{where} was saved by {len(state['random'])} processes, these are {world_size()}")

    @contextlib.contextmanager
    def _as_it_was_on_error(self) -> Iterator[None]:
        """Model, compressor, optimizers, modules among the parts; of other parts what their attributes refer to (all that
        PyTorch's schedulers and scalers change), not what is written into the tensors and dicts that these hold."""
        modules = [self.model, *(part for part in self.parts.values() if isinstance(part, nn.Module))]
        holders = [*self.parts.values(), *(self.compressor.optimizers if self.compressor is not None else ())]
        attributes = [(holder, dict(vars(holder))) for holder in holders if hasattr(holder, "__dict__")]
        with contextlib.ExitStack() as stack:
            if self.compressor is not None:
                stack.enter_context(self.compressor.as_it_was_on_error())
                modules = modules[1:]
            for module in modules:
                stack.enter_context(all_or_nothing(module, None))
            try:
                yield
            except BaseException:  # before the rest: cuts are taken back in the groups that the optimizers had
                for holder, before in attributes:
                    vars(holder).clear()
                    vars(holder).update(before)
                raise


def _check_compressor(compressor: Compressor, model: nn.Module, parts: dict[str, Any]) -> None:
    if not isinstance(compressor, Compressor):
        raise InvalidTypeError(
            f"compressor: expected a laconic.Compressor, got {type(compressor).__name__}; optimizers go in by name, optimizer=optimizer"
        )
    if bare(model) is not bare(compressor.model):
        raise InvalidValueError(
            f"model: this {type(bare(model)).__name__} is not the one that the compressor trains (a copy of it?): pass compressor.model"
        )
    held = [*parts.values(), *(part.optimizer for part in parts.values() if hasattr(part, "param_groups") and hasattr(part, "optimizer"))]
    for optimizer in compressor.optimizers:
        if not any(part is optimizer for part in held):  # a scheduler's is not saved by it, that of a wrapper with groups is
            raise InvalidValueError(
                f"an optimizer of the compressor ({type(optimizer).__name__}) is none of the parts ({', '.join(parts) or 'there are none'}), its state would be lost: pass it by name, RunCheckpoints(..., optimizer=optimizer)"
            )
