"""Mean and variance of what layers take in, channel by channel, seen during training or a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import gathered
from .surgery.factorize import plain_layers
from .watch import Watch

FEWEST = 8  # observations of a channel: from fewer a variance says next to nothing, from one it is 0


@dataclass(frozen=True, slots=True)
class Moments:
    """Of the channels of a layer's input, over batch and positions: float64 on CPU."""

    mean: Tensor
    variance: Tensor


class InputMoments:
    """Collects the moments from now on until `finish`, see `Watch`; layers are named by the caller."""

    def __init__(self, layers: dict[str, nn.Module], training: bool = True):
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._watch = Watch(layers, self._note, training, uncompiled=training)

    def _note(self, name: str, module: Any, x: Tensor) -> None:
        first = plain_layers(module)[0]
        axis = x.ndim - 1 - (len(first.kernel_size) if hasattr(first, "kernel_size") else 0)
        rest = [d for d in range(x.ndim) if d != axis]
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        total, squares = x.sum(rest).double().cpu(), x.square().sum(rest).double().cpu()
        finite = torch.isfinite(squares).all()  # a bad batch does not count: the loop, or a GradScaler, will skip its step
        count, total, squares = finite * (x.numel() // x.shape[axis]), torch.where(finite, total, 0.0), torch.where(finite, squares, 0.0)
        if name in self._sums:
            before = self._sums[name]
            count, total, squares = before[0] + count, before[1] + total, before[2] + squares
        self._sums[name] = count, total, squares

    def drop(self) -> None:
        """See no more."""
        self._watch.close()

    def finish(self) -> dict[str, Moments]:
        """The moments seen, by all processes together; layers that did not run, or that saw too little, are missing."""
        self.drop()
        found = {}
        everywhere = gathered(self._sums)
        for name in dict.fromkeys(name for sums in everywhere for name in sums):
            seen = [sums[name] for sums in everywhere if name in sums]
            count = sum(int(n) for n, _, _ in seen)
            if count < FEWEST:
                continue
            mean = torch.stack([total for _, total, _ in seen]).sum(0) / count
            square = torch.stack([squares for _, _, squares in seen]).sum(0) / count
            found[name] = Moments(mean, (square - mean.square()).clamp_min(0))
        return found
