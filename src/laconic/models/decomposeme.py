"""DecomposeMe (Alvarez & Petersson 2016): every k x k convolution is a vertical and a horizontal one, with a ReLU between them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class DecomposeMe(nn.Module):
    """`Dec_n` has n such layers, 2 n convolutions along one axis each: k x 1, ReLU, 1 x k, BatchNorm, ReLU.

    Args:
        widths: channels of each layer, of its vertical convolution as of its horizontal one.
        pools: after which layers (counted from 0) to halve the resolution.
        kernel: k, odd.
    """

    def __init__(self, in_channels: int, classes: int, widths: Sequence[int], pools: Sequence[int], kernel: int = 3):
        super().__init__()
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        channels, pad = in_channels, kernel // 2
        for i, width in enumerate(widths):
            layers += [nn.Conv2d(channels, width, (kernel, 1), padding=(pad, 0)), nn.ReLU(inplace=True)]
            layers.append(nn.Conv2d(width, width, (1, kernel), padding=(0, pad), bias=False))
            if i in pools:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).mean((2, 3)))
        return out
