"""The two networks with large linear layers for ImageNet: AlexNet (Krizhevsky 2014, on one device) and VGG-B (Simonyan & Zisserman 2014)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class LargeHead(nn.Module):
    """Convolutions, then three linear layers behind dropout, on maps of `side` x `side`."""

    def __init__(self, features: list[nn.Module], channels: int, side: int, hidden: int, classes: int, widths: Sequence[int]):
        super().__init__()
        self.widths = tuple(widths)
        self.features = nn.Sequential(*features, nn.AdaptiveAvgPool2d(side), nn.Flatten())
        self.layers = nn.Sequential(
            nn.Dropout(), nn.Linear(channels * side * side, hidden), nn.ReLU(inplace=True),
            nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.features(x)))
        return out


def alexnet(in_channels: int, classes: int, widths: Sequence[int] = (64, 192, 384, 256, 256, 4096)) -> LargeHead:
    """Widths of the five convolutions and of the linear layers: 61,100,840 parameters with 1,000 classes."""
    *convolutions, hidden = widths
    layers: list[nn.Module] = []
    channels = in_channels
    for n, width in enumerate(convolutions):
        kernel, stride, padding = ((11, 4, 2), (5, 1, 2), (3, 1, 1))[min(n, 2)]
        layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(3, 2)] if n in (0, 1, 4) else []
        channels = width
    return LargeHead(layers, channels, 6, hidden, classes, widths)


def vgg_b(in_channels: int, classes: int, widths: Sequence[int] = (64, 64, 128, 128, 256, 256, 512, 512, 512, 512, 4096)) -> LargeHead:
    """Widths of the ten convolutions and of the linear layers: 133,047,848 parameters with 1,000 classes."""
    *convolutions, hidden = widths
    layers: list[nn.Module] = []
    channels = in_channels
    for n, width in enumerate(convolutions):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if n % 2 else []
        channels = width
    return LargeHead(layers, channels, 7, hidden, classes, widths)
