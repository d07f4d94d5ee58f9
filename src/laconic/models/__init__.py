"""Networks that the demo, the experiments and the benchmarks train.

A recipe names one of `MODELS`; each is built from the shape of an input, the number of classes, and a `Shape` of the recipe, so
that all widths can be scaled by one factor (`thin_widths`).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..widths import APART, MULTIPLES, USED, fine
from .alexnet import alexnet, vgg_b
from .charnet import CharNet
from .convnet import ConvNet, square
from .decomposeme import decomposed
from .lenet import LeNet5, LeNet300100
from .resnet import ImageNetResNet, ResNet
from .transformers import GPT, STD, ViT


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a recipe says about its network; each network reads what it has."""

    widths: tuple[int, ...]
    pools: tuple[int, ...] = ()
    depth: int = 20
    kernel: int = 3
    heads: int = 4
    gain: float = 0.0


SLACK = 0.05  # of a budget in parameters


def blocks(s: Shape) -> dict[str, Any]:
    """Of a transformer; its width is a multiple of its heads."""
    width, hidden = max(1, s.widths[0] // s.heads) * s.heads, s.widths[1] if len(s.widths) > 1 else None
    return {"layers": s.depth, "width": width, "heads": s.heads, "hidden": hidden, "std": s.gain / width**0.5 if s.gain else STD}


Builder = Callable[[Sequence[int], int, Shape], nn.Module]
MODELS: dict[str, Builder] = {
    "convnet": lambda image, classes, s: ConvNet(image[0], classes, s.widths, s.pools, partial(square, kernel=s.kernel)),
    "decomposeme": lambda image, classes, s: ConvNet(image[0], classes, s.widths, s.pools, partial(decomposed, kernel=s.kernel)),
    "lenet-300-100": lambda image, classes, s: LeNet300100(torch.Size(image).numel(), classes, s.widths),
    "lenet-5": lambda image, classes, s: LeNet5(image, classes, s.widths),
    "gpt": lambda text, classes, s: GPT(classes, text[0], **blocks(s)),
    "vit": lambda image, classes, s: ViT(image, classes, s.kernel, **blocks(s)),
    "resnet": lambda image, classes, s: ResNet(image[0], classes, s.widths, s.depth),
    "resnet-imagenet": lambda image, classes, s: ImageNetResNet(image[0], classes, s.widths, s.depth),
    "alexnet": lambda image, classes, s: alexnet(image[0], classes, s.widths),
    "vgg-b": lambda image, classes, s: vgg_b(image[0], classes, s.widths),
    "charnet": lambda image, classes, s: CharNet(image[0], classes, s.widths),
}
TRANSFORMERS = ("gpt", "vit")


def multiples(model: str, shape: Shape) -> list[tuple[int, int]]:
    """Of the stream and of the hidden layers of a transformer, which the heads divide and hardware likes, coarse ones first; of other networks none."""
    if model not in TRANSFORMERS or len(shape.widths) < 2:
        return []
    return [(shape.heads * fine(shape.widths[0] // shape.heads, lanes), fine(shape.widths[1], lanes)) for lanes in MULTIPLES]


def widest(widths: Sequence[int], fits: Callable[[tuple[int, ...]], bool], multiple: int = 1) -> tuple[int, ...]:
    """Widths scaled by one factor (in thousandths) and rounded to multiples, the largest that fits; at least one multiple each."""

    def scaled(step: int) -> tuple[int, ...]:
        return tuple(multiple * max(1, round(w * step / 1000 / multiple)) for w in widths)

    low, high = 0, 1000  # the largest step that fits lies at `low` or above, below `high` + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(scaled(middle)) else (low, middle - 1)
    return scaled(low)


def thin_widths(
    build: Callable[[tuple[int, ...]], nn.Module], widths: Sequence[int], limit: int, multiples: Sequence[tuple[int, int]] = ()
) -> tuple[int, ...]:
    """The widest network that has no more parameters than `limit`, scaled evenly; where rounding leaves more than `SLACK` of them, the last of several
    widths takes that.

    With `multiples` of two widths (the residual stream of a transformer and its hidden layers), the first that use the limit up but for a little and keep the parts near each other: the
    stream is the multiple below or above at which the two keep parts that differ least, and the hidden layers are as wide as the limit allows.
    """

    def size(widths: tuple[int, ...]) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(widths).parameters())

    def filled(first: tuple[int, ...], multiple: int) -> tuple[int, ...]:
        """With the largest last width that fits; 0: none does."""
        counts = range(multiple, widths[-1] + 1, multiple)
        return (*first, multiple * bisect.bisect_right(counts, limit, key=lambda last: size((*first, last))))

    def apart(thin: tuple[int, ...]) -> float:
        """The larger part that two widths keep over the smaller."""
        return max(ratio := thin[0] * widths[1] / (thin[1] * widths[0]), 1 / ratio)

    thin = widest(widths, lambda widths: size(widths) <= limit)
    for first, last in multiples:
        around = sorted({thin[0] // first * first, -(-thin[0] // first) * first} - {0})
        fitting = [there for stream in around if (there := filled((stream,), last))[-1]]
        if fitting and size(nearest := min(fitting, key=apart)) >= USED * limit and apart(nearest) <= APART:
            return nearest
    if len(thin) > 1 and size(thin) < (1 - SLACK) * limit:
        thin = filled(thin[:-1], 1)
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
    "multiples",
    "thin_widths",
    "widest",
]
