"""A plain convolutional network: square convolutions with BatchNorm, pooling where asked, one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..errors import InvalidValueError


def same(kernel: int) -> int:
    """The padding that keeps the size of an image."""
    if kernel < 1 or kernel % 2 == 0:
        raise InvalidValueError(f"kernel = {kernel}: must be odd, so that a convolution keeps the size of its input")
    return kernel // 2


def square(channels: int, width: int, kernel: int = 3) -> list[nn.Module]:
    """A `kernel` x `kernel` convolution."""
    return [nn.Conv2d(channels, width, kernel, padding=same(kernel), bias=False)]


class ConvNet(nn.Module):
    """With 13 widths from 64 to 512 it is VGG-16 with BatchNorm for CIFAR (14.7 million parameters), but for biases before a norm.

    Args:
        widths: output channels of each convolution.
        pools: after which convolutions (counted from 0) to halve the resolution.
        convolution: what a convolution is made of, from its input and output channels.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        widths: Sequence[int],
        pools: Sequence[int],
        convolution: Callable[[int, int], list[nn.Module]] = square,
    ):
        super().__init__()
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        channels = in_channels
        for i, width in enumerate(widths):
            layers += convolution(channels, width)
            if i in pools:  # before the norm: a quarter of its work, and of the activation's
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).mean((2, 3)))
        return out
