"""The two LeNets of the pruning literature, for 28 x 28 digits (LeCun et al. 1998, in the sizes of Caffe)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class LeNet300100(nn.Module):
    """A perceptron: 300 and 100 hidden units have 266,610 parameters on MNIST."""

    def __init__(self, pixels: int, classes: int, widths: Sequence[int] = (300, 100)):
        super().__init__()
        self.widths = tuple(widths)
        layers: list[nn.Module] = [nn.Flatten()]
        units = pixels
        for width in widths:
            layers += [nn.Linear(units, width), nn.ReLU(inplace=True)]
            units = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(units, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x))
        return out


class LeNet5(nn.Module):
    """Two 5 x 5 convolutions without padding, each pooled, then two linear layers: 20, 50, 500 have 431,080 parameters on MNIST."""

    def __init__(self, shape: Sequence[int], classes: int, widths: Sequence[int] = (20, 50, 500)):
        super().__init__()
        self.widths = tuple(widths)
        channels, *sides = shape
        first, second, hidden = widths
        self.features = nn.Sequential(
            nn.Conv2d(channels, first, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Flatten(),
        )  # fmt: skip
        positions = 1
        for side in sides:
            positions *= ((side - 4) // 2 - 4) // 2
        self.layers = nn.Sequential(nn.Linear(second * positions, hidden), nn.ReLU(inplace=True))
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.features(x)))
        return out
