"""The character classifier of Jaderberg et al. 2014 (Deep Features for Text Spotting): four convolutions with maxout."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Maxout(nn.Module):
    """The largest of `pieces` channels side by side."""

    def __init__(self, pieces: int):
        super().__init__()
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.pieces)).amax(2)


class CharNet(nn.Module):
    """48, 64 and 128 channels behind a maxout of 2, 2 and 4, then one for each class, behind a maxout of 4: 2,621,904 parameters for 36.

    For characters of 24 x 24; over a larger image it slides, and the mean is taken. Without padding, as published.
    """

    def __init__(self, in_channels: int, classes: int, widths: Sequence[int] = (48, 64, 128)):
        super().__init__()
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        channels = in_channels
        for width, pieces, kernel in zip(widths, (2, 2, 4), (9, 9, 8), strict=True):
            layers += [nn.Conv2d(channels, width * pieces, kernel), Maxout(pieces)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(channels, 4 * classes, 1)
        self.answer = Maxout(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.answer(self.head(self.features(x))).mean((2, 3))
        return out
