"""DecomposeMe (Alvarez & Petersson 2016): every k x k convolution is a vertical and a horizontal one, with a ReLU between them.

`Dec_n` is a `ConvNet` of n such layers, 2 n convolutions along one axis each: k x 1, ReLU, 1 x k, BatchNorm, ReLU.
"""

from __future__ import annotations

from torch import nn


def decomposed(channels: int, width: int, kernel: int = 3) -> list[nn.Module]:
    """In place of a square convolution; `kernel` is odd."""
    pad = kernel // 2
    return [
        nn.Conv2d(channels, width, (kernel, 1), padding=(pad, 0)),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, (1, kernel), padding=(0, pad), bias=False),
    ]
