"""Products with all digits of their numbers, whatever speed was asked of the training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, float32 products have float32's digits: neither autocast nor TF32, which keeps 10 of 23 bits.

    TF32 is what `torch.set_float32_matmul_precision("high")` allows, or `torch.backends.cuda.matmul.fp32_precision` from PyTorch 2.9 on.
    """
    autocast = torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else contextlib.nullcontext()
    with autocast, _no_tf32():
        yield


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    backends: list[Any] = []
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer names, one for each backend, which PyTorch does not translate
        before, backends = "highest", [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    settings = [b.fp32_precision for b in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for backend, setting in zip(backends, settings, strict=True):
            backend.fp32_precision = setting
        if before != "highest":
            torch.set_float32_matmul_precision(before)
