"""Networks that the demo, the experiments and the benchmarks train.

A recipe names one of `MODELS`; each is built from the shape of an input, the number of classes, and a `Shape` of the recipe, so
that all widths can be scaled by one factor (`thin_widths`).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .alexnet import alexnet, vgg_b
from .charnet import CharNet
from .convnet import ConvNet, square
from .decomposeme import decomposed
from .lenet import LeNet5, LeNet300100
from .resnet import ImageNetResNet, ResNet
from .transformers import GPT, ViT


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a recipe says about its network; each network reads what it has."""

    widths: tuple[int, ...]
    pools: tuple[int, ...] = ()
    depth: int = 20
    kernel: int = 3
    heads: int = 4


SLACK = 0.05  # of a budget in parameters

Builder = Callable[[Sequence[int], int, Shape], nn.Module]
MODELS: dict[str, Builder] = {
    "convnet": lambda image, classes, s: ConvNet(image[0], classes, s.widths, s.pools, partial(square, kernel=s.kernel)),
    "decomposeme": lambda image, classes, s: ConvNet(image[0], classes, s.widths, s.pools, partial(decomposed, kernel=s.kernel)),
    "lenet-300-100": lambda image, classes, s: LeNet300100(torch.Size(image).numel(), classes, s.widths),
    "lenet-5": lambda image, classes, s: LeNet5(image, classes, s.widths),
    "gpt": lambda text, classes, s: GPT(classes, text[0], s.depth, max(1, s.widths[0] // s.heads) * s.heads, s.heads, *s.widths[1:]),
    "vit": lambda image, classes, s: ViT(
        image, classes, s.kernel, s.depth, max(1, s.widths[0] // s.heads) * s.heads, s.heads, *s.widths[1:]
    ),
    "resnet": lambda image, classes, s: ResNet(image[0], classes, s.widths, s.depth),
    "resnet-imagenet": lambda image, classes, s: ImageNetResNet(image[0], classes, s.widths, s.depth),
    "alexnet": lambda image, classes, s: alexnet(image[0], classes, s.widths),
    "vgg-b": lambda image, classes, s: vgg_b(image[0], classes, s.widths),
    "charnet": lambda image, classes, s: CharNet(image[0], classes, s.widths),
}


def widest(widths: Sequence[int], fits: Callable[[tuple[int, ...]], bool], multiple: int = 1) -> tuple[int, ...]:
    """Widths scaled by one factor (in thousandths) and rounded to multiples, the largest that fits; at least one multiple each."""

    def scaled(step: int) -> tuple[int, ...]:
        return tuple(multiple * max(1, round(w * step / 1000 / multiple)) for w in widths)

    low, high = 0, 1000  # the largest step that fits lies at `low` or above, below `high` + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(scaled(middle)) else (low, middle - 1)
    return scaled(low)


def thin_widths(build: Callable[[tuple[int, ...]], nn.Module], widths: Sequence[int], limit: int) -> tuple[int, ...]:
    """The widest network that has no more parameters than `limit`, scaled evenly; where rounding (to a multiple of the heads) leaves more than `SLACK`
    of them, the last of several widths (the hidden layers of a transformer) takes that."""

    def fits(widths: tuple[int, ...]) -> bool:
        return size(widths) <= limit

    def size(widths: tuple[int, ...]) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(widths).parameters())

    thin = widest(widths, fits)
    if len(thin) > 1 and size(thin) < (1 - SLACK) * limit:
        last = bisect.bisect_right(range(widths[-1] + 1), limit, key=lambda last: size((*thin[:-1], last)), lo=thin[-1]) - 1
        thin = (*thin[:-1], last)
    return thin


__all__ = [
    "GPT",
    "MODELS",
    "CharNet",
    "ConvNet",
    "ImageNetResNet",
    "LeNet5",
    "LeNet300100",
    "ResNet",
    "Shape",
    "ViT",
    "thin_widths",
    "widest",
]
