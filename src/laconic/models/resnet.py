"""The residual networks of He et al. 2016 for CIFAR: 6 n + 2 layers, shortcuts without parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidValueError


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
