"""Lightning: `Trainer(callbacks=[CompressionCallback(budget=laconic.Budget(params=0.25))])`."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import CheckpointError, InvalidValueError, missing_extra
from .shared import CompressedRun

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:  # it is two packages that know nothing of each other, and both are installed
    try:
        if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
            from pytorch_lightning import Callback
        else:
            from lightning.pytorch import Callback
    except ImportError as error:
        raise missing_extra("lightning", "lightning", "laconic.integrations.lightning") from error


class CompressionCallback(CompressedRun, Callback):
    """Compression as a part of a Lightning run; the LightningModule stays as it is. Keywords: see `CompressedRun`.

    - `total_steps` is by default the trainer's `estimated_stepping_batches`.
    - `example_inputs` are by default the module's `example_input_array`, where no `module=` is given.
    - `compressor.metrics()` are logged at the end of each epoch.
    - Lightning's checkpoints hold the compressor's state: `trainer.fit(model, ckpt_path=...)` with a fresh dense model goes
      on exactly, also after a cut.
    - Under `DDPStrategy` the model is wrapped anew after each cut.

    Raises (when training starts):
        InvalidValueError: a strategy that shards the model. CheckpointError: a checkpoint of a run without this callback.
        And whatever `laconic.Compressor` raises.
    """

    _state: dict[str, Any] | None = None
    _weights: OrderedDict[str, Any] | None = None
    _setting_aside: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.strategy.restore_checkpoint_after_setup:
            raise InvalidValueError(
                f"{type(trainer.strategy).__name__} shards the model, which cannot be cut in a Lightning run: use DDPStrategy, or a loop of your own (docs/distributed.md)"
            )
        self._state = self._weights = None
        self._setting_aside = pl_module.register_load_state_dict_pre_hook(self._set_aside)

    def _set_aside(self, model: nn.Module, state_dict: OrderedDict[str, Any], *_: Any) -> None:
        """Lightning loads a checkpoint before there are optimizers. Weights of a network that has been cut wait until it is cut here, too."""
        own = model.state_dict()
        if {name: getattr(x, "shape", None) for name, x in own.items()} != {n: getattr(x, "shape", None) for n, x in state_dict.items()}:
            self._weights = state_dict.copy()
            state_dict.clear()
            state_dict.update(own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict["compressor"]

    def state_dict(self) -> dict[str, Any]:
        return {"compressor": self.compressor.state_dict()} if self.compressor is not None else {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._setting_aside.remove()
        if trainer.ckpt_path is not None and self._state is None:
            raise CheckpointError(
                f"{trainer.ckpt_path} was saved without CompressionCallback: there is nothing to go on from; load its weights into the model and start a new run"
            )
        steps = trainer.estimated_stepping_batches
        options: dict[str, Any] = {}
        if not self.module and pl_module.example_input_array is not None:
            options["example_inputs"] = pl_module.example_input_array
        if trainer.world_size > 1 and self._cuts_early:
            options["rebuild"] = lambda _: self._wrap_anew(trainer)
        compressor = self._start(pl_module, trainer.optimizers, int(steps) if math.isfinite(steps) and steps > 0 else None, **options)
        if self._state is not None:
            compressor.load_state_dict(self._state)
        if self._weights is not None:
            pl_module.load_state_dict(self._weights, strict=pl_module.strict_loading)
            if trainer.world_size > 1:
                self._wrap_anew(trainer)
        self._state = self._weights = None

    @staticmethod
    def _wrap_anew(trainer: Trainer) -> None:
        strategy: Any = trainer.strategy
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.compressor is not None
        pl_module.log_dict(self.compressor.metrics(), sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.report is None:  # a checkpoint of a run that was over: nothing was trained
            self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._setting_aside is not None:  # else the module would go on setting weights aside
            self._setting_aside.remove()
