"""The residual networks of He et al. 2016: for CIFAR with 6 n + 2 layers and shortcuts without parameters, for ImageNet with 18 to 152."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidValueError

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # blocks, by depth


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which takes every other pixel and pads the new channels with zeros (option A)."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.stride, self.extra = stride, width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return F.relu(out + x)


class ResNet(nn.Module):
    """ResNet-20, 32, 44, 56, ... (269,722 parameters for 20).

    Args:
        widths: channels of the three stages, not falling.
        depth: 6 n + 2.
    """

    def __init__(self, in_channels: int, classes: int, widths: Sequence[int] = (16, 32, 64), depth: int = 20):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InvalidValueError(f"depth = {depth}: a residual network for CIFAR has 6 n + 2 layers: 20, 32, 44, 56")
        self.widths = tuple(widths)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for i in range((depth - 2) // 6):
                blocks.append(Block(channels, width, 2 if stage and i == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


class Unit(nn.Module):
    """Convolutions (output channels, kernel, stride) with a norm each, beside a shortcut that is a 1 x 1 convolution where the shape changes."""

    def __init__(self, channels: int, convolutions: Sequence[tuple[int, int, int]]):
        super().__init__()
        layers: list[nn.Module] = []
        width, stride = channels, 1
        for n, (out, kernel, step) in enumerate(convolutions):
            layers += [nn.ReLU(inplace=True)] if n else []
            layers += [nn.Conv2d(width, out, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(out)]
            width, stride = out, stride * step
        self.layers = nn.Sequential(*layers)
        same = width == channels and stride == 1
        self.shortcut = nn.Sequential() if same else nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


class ImageNetResNet(nn.Module):
    """ResNet-18 and 34 (two 3 x 3 convolutions in a unit), 50, 101 and 152 (1 x 1, 3 x 3 with the stride, 1 x 1 four times as wide).

    11,689,512 parameters for 18 and 25,557,032 for 50, with 1,000 classes.

    Args:
        widths: channels of the 3 x 3 convolutions of the four stages.
    """

    def __init__(self, in_channels: int, classes: int, widths: Sequence[int] = (64, 128, 256, 512), depth: int = 50):
        super().__init__()
        if depth not in STAGES or len(widths) != 4:
            raise InvalidValueError(
                f"depth = {depth}, widths = {tuple(widths)}: four widths and one of {', '.join(map(str, STAGES))} layers"
            )
        self.widths = tuple(widths)
        channels = widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        units: list[nn.Module] = []
        for stage, (width, blocks) in enumerate(zip(widths, STAGES[depth], strict=True)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                plain = [(width, 3, stride), (width, 3, 1)]
                units.append(Unit(channels, plain if depth < 50 else [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]))
                channels = width if depth < 50 else 4 * width
        self.units = nn.Sequential(*units)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.units(self.stem(x)).mean((2, 3)))
        return out
