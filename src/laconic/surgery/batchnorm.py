"""Re-estimate BatchNorm statistics after layers changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InvalidTypeError, InvalidValueError
from ..measure import call, check_inputs

Saved = list[tuple[_BatchNorm, float | None, dict[str, Tensor]]]


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


BATCHES = "check that every batch of calibration is what the model takes: a tensor, a tuple of its positional arguments, or a dict of them by name"


def as_batches(calibration: Iterable[Any] | None) -> list[Any] | None:
    """The batches that were given, for use more than once.

    Raises:
        InvalidTypeError: not an iterable of batches; a lone tensor or dict is one batch, not many. InvalidValueError: none in it.
    """
    if calibration is None:
        return None
    if isinstance(calibration, (Tensor, Mapping)) or not (hasattr(calibration, "__iter__") or hasattr(calibration, "__getitem__")):
        raise InvalidTypeError(
            f"calibration: expected an iterable of batches, such as [x for x, _ in loader], got {type(calibration).__name__}"
        )
    batches = list(calibration)
    if not batches:  # a generator that was used up before
        raise InvalidValueError("calibration holds no batch: pass an iterable of inputs, such as [x for x, _ in loader]")
    return batches


def reestimate(model: nn.Module, calibration: Iterable[Any]) -> tuple[int, list[str]]:
    """Replace running statistics by the plain average over the batches of `calibration`; returns how many batches, and the layers that none reached.

    Only BatchNorm layers are in training mode meanwhile: dropout stays off. On an error, and of a layer that no batch reaches, the old
    statistics are back.

    Args:
        calibration: batches of inputs: tensors, tuples of positional arguments, or dicts of arguments by name (without labels).
    """
    layers = batch_norms(model)
    if not layers:
        return 0, []
    modes = [(m, m.training) for m in model.modules()]
    before: Saved = [(m, m.momentum, {k: b.clone() for k, b in m.named_buffers()}) for m in layers]
    batches = 0
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average
            layer.train()
        with torch.no_grad():
            for batch in calibration:
                call(model, check_inputs(batch, model, "a batch of calibration"))
                batches += 1
        missed = [layer for layer in layers if layer.num_batches_tracked is not None and int(layer.num_batches_tracked) == 0]
        _restore(before, missed)
    except BaseException:
        _restore(before, layers)
        raise
    finally:
        for layer, momentum, _ in before:
            layer.momentum = momentum
        for module, training in modes:
            module.training = training
    return batches, [name for name, m in model.named_modules() if m in missed]


def _restore(before: Saved, layers: Sequence[nn.Module]) -> None:
    for layer, _, buffers in before:
        for name, buffer in layer.named_buffers() if layer in layers else ():
            buffer.copy_(buffers[name])
