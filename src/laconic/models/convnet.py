"""A plain convolutional network: 3 x 3 convolutions with BatchNorm, pooling where asked, one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Args:
    widths: output channels of each convolution.
    pools: after which convolutions (counted from 0) to halve the resolution.
    """

    def __init__(self, in_channels: int, classes: int, widths: Sequence[int], pools: Sequence[int]):
        super().__init__()
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        channels = in_channels
        for i, width in enumerate(widths):
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
            if i in pools:  # before the norm: a quarter of its work, and of the activation's
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).mean((2, 3)))
        return out


def convnet_params(in_channels: int, classes: int, widths: Sequence[int]) -> int:
    """Number of parameters of a `ConvNet`, without building it."""
    total, channels = 0, in_channels
    for width in widths:
        total += 9 * channels * width + 2 * width
        channels = width
    return total + channels * classes + classes


def thin_widths(in_channels: int, classes: int, widths: Sequence[int], limit: int) -> list[int]:
    """Widths scaled by one factor so that the network has as many parameters as fit into `limit`."""
    best = [1] * len(widths)
    for step in range(1, 1001):
        scaled = [max(1, round(w * step / 1000)) for w in widths]
        if convnet_params(in_channels, classes, scaled) > limit:
            break
        best = scaled
    return best
