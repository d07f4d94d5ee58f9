"""DecomposeMe (Alvarez & Petersson 2016): every k x k convolution is a vertical and a horizontal one, with a ReLU between them.

`Dec_n` is a `ConvNet` of n such layers, 2 n convolutions along one axis each: k x 1, ReLU, 1 x k, BatchNorm, ReLU.
Dec_8 with the widths of the recipe `imagenet-dec8` has 6.58 million parameters (9.08 with 640 units), against the 15.19 million that are
reported, at second hand, for a network of this family on ImageNet: the paper does not give its widths, so the two are not the same network.
"""

from __future__ import annotations

from torch import nn

from .convnet import same


def decomposed(channels: int, width: int, kernel: int = 3) -> list[nn.Module]:
    """In place of a square convolution."""
    pad = same(kernel)
    return [
        nn.Conv2d(channels, width, (kernel, 1), padding=(pad, 0)),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, (1, kernel), padding=(0, pad), bias=False),
    ]
