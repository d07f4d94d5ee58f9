"""The Hugging Face Trainer: `Trainer(..., callbacks=[CompressionCallback(budget=laconic.Budget(params=0.25))])`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..distributed import world_size
from ..errors import CheckpointError, InvalidValueError, missing_extra
from .shared import STATE, CompressedRun, read_state, write_state

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    try:
        import accelerate  # noqa: F401  the Trainer needs it
        from transformers import TrainerCallback
    except ImportError as error:
        raise missing_extra("transformers[torch]", "transformers", "laconic.integrations.transformers") from error

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


class CompressionCallback(CompressedRun, TrainerCallback):
    """Compression as a part of a run of the Hugging Face Trainer. Keywords: see `CompressedRun`.

    - `total_steps` is by default the trainer's `max_steps`.
    - `compressor.metrics()` are added to `trainer.state.log_history`, and to the logs of the callbacks after this one.
    - The compressor's state is saved beside the trainer's checkpoints, in `laconic.pt`. The Trainer loads weights and
      optimizer before a callback hears of it, so say it here as well:
      `CompressionCallback(..., resume_from_checkpoint=path)`, as in `trainer.train(resume_from_checkpoint=path)`; True: the
      newest one in `output_dir`. Then the run goes on exactly, also after a cut. It is taken from `TrainingArguments` where it is given there.

    Raises (before the first step):
        InvalidValueError: what cannot be together with cuts in mid-run: several processes (the Trainer keeps its first
            DistributedDataParallel), `load_best_model_at_end` (the best may be of another size); FSDP, DeepSpeed; `auto_find_batch_size`.
        CheckpointError: a checkpoint of a run without this callback, or `resume_from_checkpoint` missing here.
        And whatever `laconic.Compressor` raises.
    """

    def __init__(self, *structures: Any, resume_from_checkpoint: str | bool | None = None, **keywords: Any):
        super().__init__(*structures, **keywords)
        self.resume_from_checkpoint = resume_from_checkpoint
        self._saved: dict[str, Any] | None = None
        self._loads: Any = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.resume_from_checkpoint = self.resume_from_checkpoint or args.resume_from_checkpoint
        if self.resume_from_checkpoint:
            self._replay(args, kwargs["model"], kwargs.get("optimizer"))
        self._loads = kwargs["model"].register_load_state_dict_pre_hook(_check_fit)

    def _check_trainer(self, args: TrainingArguments) -> None:
        if (kind := _distributed_kind()) in SHARDED:
            raise InvalidValueError(
                f"{kind} shards the model, which cannot be cut in a run of the Trainer: use a loop of your own (docs/distributed.md)"
            )
        if self._cuts_early and args.load_best_model_at_end:
            raise InvalidValueError(
                'load_best_model_at_end: the best checkpoint may be of another size than the compact model; leave it out, or cut="end"'
            )
        if self._cuts_early and world_size() > 1:
            raise InvalidValueError(
                f'{world_size()} processes: the Trainer keeps its first DistributedDataParallel, which knows nothing of the layers that a cut makes; use cut="end"'
            )
        if args.auto_find_batch_size:
            raise InvalidValueError(
                "auto_find_batch_size starts the run again with smaller batches, and a callback has one run: leave it out"
            )

    def _checkpoint(self, args: TrainingArguments) -> Path:
        from transformers.trainer_utils import get_last_checkpoint

        if not isinstance(self.resume_from_checkpoint, bool):
            return Path(str(self.resume_from_checkpoint))
        newest = get_last_checkpoint(args.output_dir)
        if newest is None:
            raise CheckpointError(f"resume_from_checkpoint = True: there is no checkpoint in {args.output_dir}")
        return Path(newest)

    def _replay(self, args: TrainingArguments, model: nn.Module, optimizer: Any) -> None:
        """Make the saved run's cuts on the dense model, so that its weights fit, and on the optimizer, or so that one is made from its parameters."""
        saved = read_state(self._checkpoint(args) / STATE)
        optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)  # until there is one
        self._start(model, optimizer, saved["max_steps"], args.torch_compile).load_state_dict(saved["compressor"])
        self._saved = saved

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._loads is not None:
            self._loads.remove()
        self._check_trainer(args)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if self._saved is not None:
            self._go_on(model, optimizer, state)
        elif state.global_step or self.resume_from_checkpoint:
            raise CheckpointError(
                f"the Trainer starts at step {state.global_step}, and CompressionCallback was not told in time: give Trainer(model, callbacks=[...]) one with the same resume_from_checkpoint= as trainer.train"
            )
        else:
            self._start(model, optimizer, state.max_steps, args.torch_compile)

    def _go_on(self, model: nn.Module, optimizer: Any, state: TrainerState) -> None:
        """Weights and optimizer are loaded: the compressor goes over from the placeholder."""
        assert self.compressor is not None
        assert self._saved is not None
        for what, saved, now in (
            ("step", self._saved["global_step"], state.global_step),
            ("max_steps", self._saved["max_steps"], state.max_steps),
            ("parameters in the optimizer's groups", self._saved["groups"], _names_in_groups(model, optimizer)),
        ):
            if saved != now:
                told = f": {saved} saved, {now} now" if isinstance(now, int) else ", or their order"
                raise CheckpointError(
                    f"the Trainer goes on with another {what} than the checkpoint that CompressionCallback was given{told}; a resume could not be exact"
                )
        self.compressor.move_to(optimizer)
        self._saved = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.compressor is not None and state.log_history:
            metrics = self.compressor.metrics()
            state.log_history[-1] |= metrics
            kwargs["logs"] |= metrics  # for the callbacks after this one

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not args.should_save:
            return
        assert self.compressor is not None
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        saved = {
            "compressor": self.compressor.state_dict(),
            "groups": _names_in_groups(kwargs["model"], kwargs["optimizer"]),
            "global_step": state.global_step,
            "max_steps": state.max_steps,
        }
        write_state(saved, checkpoint / STATE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._finish()


def _names_in_groups(model: nn.Module, optimizer: Any) -> list[list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


def _distributed_kind() -> str:
    from accelerate.state import AcceleratorState

    return str(AcceleratorState().distributed_type.value)


def _check_fit(model: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Until training starts: what a checkpoint of a cut network would do is said better here."""
    own = model.state_dict()
    wrong = [name for name, x in state_dict.items() if name in own and own[name].shape != x.shape]
    wrong += [name for name in own if name not in state_dict and name.rpartition(".")[0] + ".0.weight" in state_dict]
    if wrong:
        raise CheckpointError(
            f"the checkpoint does not fit the model ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}): "
            "if it is of a run that has cut layers, pass CompressionCallback the same resume_from_checkpoint= as trainer.train"
        )
