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


class CompressionCallback(CompressedRun, TrainerCallback):
    """Compression as a part of a run of the Hugging Face Trainer. Keywords: see `CompressedRun`.

    - `total_steps` is by default the trainer's `max_steps`.
    - `compressor.metrics()` are added to `trainer.state.log_history`.
    - The compressor's state is saved beside the trainer's checkpoints, in `laconic.pt`. The Trainer loads weights and
      optimizer before a callback hears of it, so say it here as well:
      `CompressionCallback(..., resume_from_checkpoint=path)`, as in `trainer.train(resume_from_checkpoint=path)`; True: the
      newest one in `output_dir`. Then the run goes on exactly, also after a cut.

    Raises (before the first step):
        InvalidValueError: what cannot be together with cuts in mid-run: several processes (the Trainer keeps its first
            DistributedDataParallel), `load_best_model_at_end` (the best may be of another size); FSDP and DeepSpeed.
        CheckpointError: a checkpoint of a run without this callback, or `resume_from_checkpoint` missing here.
        And whatever `laconic.Compressor` raises.
    """

    def __init__(self, *structures: Any, resume_from_checkpoint: str | bool | None = None, **keywords: Any):
        super().__init__(*structures, **keywords)
        self.resume_from_checkpoint = resume_from_checkpoint
        self._saved: dict[str, Any] | None = None
        self._check: Any = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check_arguments(args)
        model = kwargs["model"]
        if self.resume_from_checkpoint:
            self._replay(model, self._checkpoint(args))
        self._check = model.register_load_state_dict_pre_hook(self._check_fit)

    def _check_arguments(self, args: TrainingArguments) -> None:
        if args.fsdp or args.deepspeed:
            raise InvalidValueError(
                f"{'FSDP' if args.fsdp else 'DeepSpeed'} shards the model, which cannot be cut in a run of the Trainer: use a loop of your own (docs/distributed.md)"
            )
        if self._cuts_early and args.load_best_model_at_end:
            raise InvalidValueError(
                'load_best_model_at_end: the best checkpoint may be of another size than the compact model; leave it out, or cut="end"'
            )
        if self._cuts_early and world_size() > 1:
            raise InvalidValueError(
                f'{world_size()} processes: the Trainer keeps its first DistributedDataParallel, which knows nothing of the layers that a cut makes; use cut="end"'
            )

    def _checkpoint(self, args: TrainingArguments) -> Path:
        from transformers.trainer_utils import get_last_checkpoint

        if not isinstance(self.resume_from_checkpoint, bool):
            return Path(str(self.resume_from_checkpoint))
        newest = get_last_checkpoint(args.output_dir)
        if newest is None:
            raise CheckpointError(f"resume_from_checkpoint = True: there is no checkpoint in {args.output_dir}")
        return Path(newest)

    def _replay(self, model: nn.Module, checkpoint: Path) -> None:
        """Make the saved run's cuts on the dense model, so that its weights fit, and the optimizer is made from its parameters."""
        saved = read_state(checkpoint / STATE)
        placeholder = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        self._start(model, placeholder, saved["max_steps"]).load_state_dict(saved["compressor"])
        self._saved = saved

    def _check_fit(self, model: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        own = model.state_dict()
        if wrong := [name for name, x in state_dict.items() if name not in own or own[name].shape != x.shape]:
            raise CheckpointError(
                f"the checkpoint does not fit the model ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}): "
                "if it is of a run that has cut layers, pass CompressionCallback the same resume_from_checkpoint= as trainer.train"
            )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._check is not None:
            self._check.remove()
        self._check_arguments(args)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if self._saved is not None:
            self._go_on(model, optimizer, state)
        elif state.global_step:
            raise CheckpointError(
                f"the Trainer goes on from step {state.global_step}, and CompressionCallback was not told: give Trainer(callbacks=[...]) one with the same resume_from_checkpoint= as trainer.train"
            )
        else:
            self._start(model, optimizer, state.max_steps)

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
            state.log_history[-1] |= self.compressor.metrics()

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
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
