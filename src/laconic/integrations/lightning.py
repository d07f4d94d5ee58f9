"""Lightning: `Trainer(callbacks=[CompressionCallback(budget=laconic.Budget(params=0.25))])`."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import CheckpointError, InvalidValueError, missing_extra
from .shared import CompressedRun, on_device

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

# Callbacks, by name, that average weights of different steps; that train steps and take them back.
AVERAGE, FIND = {"StochasticWeightAveraging", "WeightAveraging"}, {"LearningRateFinder", "BatchSizeFinder"}


class CompressionCallback(CompressedRun, Callback):
    """Compression as a part of a Lightning run; the LightningModule stays as it is. Keywords: see `CompressedRun`.

    - `total_steps` is by default the trainer's `estimated_stepping_batches`.
    - `example_inputs` are by default the module's `example_input_array`, where no `module=` is given.
    - `compressor.metrics()` are logged at the end of each epoch.
    - Lightning's checkpoints hold the compressor's state: `trainer.fit(model, ckpt_path=...)` with a fresh dense model goes
      on exactly, also after a cut.
    - Under `DDPStrategy` the model is wrapped anew after each cut.

    Raises (when training starts):
        InvalidValueError: a strategy that shards the model; a callback that averages weights, or trains steps that it takes back.
        CheckpointError: a checkpoint of a run without this callback.
        And whatever `laconic.Compressor` raises.
    """

    _state: dict[str, Any] | None = None
    _weights: OrderedDict[str, Any] | None = None
    _loads: Any = None

    @property
    def state_key(self) -> str:
        return f"CompressionCallback[{self.module}]"  # one for each part

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._check_trainer(trainer)
            self._state = self._weights = None
            self._watch_loads(pl_module, self._set_aside)
        elif self.compressor is not None:
            self._watch_loads(pl_module, self._refuse)

    def _check_trainer(self, trainer: Trainer) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:
            raise InvalidValueError(
                f"{type(trainer.strategy).__name__} shards the model, which cannot be cut in a Lightning run: use DDPStrategy, or a loop of your own (docs/distributed.md)"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            kinds = {kind.__name__ for kind in type(callback).__mro__}
            if self._cuts_early and kinds & AVERAGE:
                raise InvalidValueError(
                    f'{type(callback).__name__} averages weights of different steps, which are of different sizes once a layer is cut: leave it out, or cut="end"'
                )
            if kinds & FIND and not getattr(callback, "_early_exit", False):
                raise InvalidValueError(
                    f"{type(callback).__name__} takes back the steps that it trains, and CompressionCallback has counted them: use Tuner(trainer) before fit"
                )

    def _watch_loads(self, pl_module: LightningModule, hook: Any) -> None:
        self._stop_watching_loads()
        self._loads = pl_module.register_load_state_dict_pre_hook(hook)

    def _stop_watching_loads(self) -> None:
        if self._loads is not None:
            self._loads.remove()
            self._loads = None

    def _set_aside(self, model: nn.Module, state_dict: OrderedDict[str, Any], *_: Any) -> None:
        """Lightning loads a checkpoint before there are optimizers. Weights of a network that has been cut wait until it is cut here, too."""
        own = model.state_dict()
        if _shapes(own) != _shapes(state_dict):
            self._weights = state_dict.copy()
            state_dict.clear()
            state_dict.update(own)

    def _refuse(self, model: nn.Module, state_dict: OrderedDict[str, Any], *_: Any) -> None:
        if _shapes(model.state_dict()) != _shapes(state_dict):
            raise CheckpointError(
                "the checkpoint does not fit the model, which has been cut since: test the model as it is, with model= and without ckpt_path"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict["compressor"]

    def state_dict(self) -> dict[str, Any]:
        return {"compressor": self.compressor.state_dict()} if self.compressor is not None else {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_watching_loads()
        if trainer.ckpt_path is not None and self._state is None:
            raise CheckpointError(
                f"{trainer.ckpt_path} was saved without CompressionCallback: there is nothing to go on from; load its weights into the model and start a new run"
            )
        steps = trainer.estimated_stepping_batches
        options: dict[str, Any] = {}
        inputs = self._options["example_inputs"]
        if inputs is None and not self.module:
            inputs = pl_module.example_input_array
        if inputs is not None:  # as each batch, for models in half precision
            options["example_inputs"] = trainer.precision_plugin.convert_input(inputs)
        if trainer.world_size > 1 and self._cuts_early:
            options["rebuild"] = lambda _: self._wrap_anew(trainer)
        weights = {id(p) for p in self._part(pl_module).parameters()}
        optimizers = [o for o in trainer.optimizers if any(id(p) in weights for g in o.param_groups for p in g["params"])]
        total_steps = int(steps) if math.isfinite(steps) and steps > 0 else None
        compiled = pl_module._compiler_ctx is not None
        compressor = self._start(pl_module, optimizers or trainer.optimizers, total_steps, compiled, **options)
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
        if self.report is None and self.compressor is not None:  # a checkpoint of a run that was over: nothing was trained
            self.compressor.example_inputs = on_device(self.compressor.example_inputs, self.compressor.model)
            self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_watching_loads()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_watching_loads()


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(x, "shape", None) for name, x in state.items()}
