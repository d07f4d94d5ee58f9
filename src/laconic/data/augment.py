"""Augmentation of whole batches `[b, c, h, w]`, from an explicit generator: the same seed gives the same batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def keep(x: Tensor, generator: torch.Generator) -> Tensor:
    """No augmentation."""
    del generator  # same signature as the others
    return x


def crop(x: Tensor, generator: torch.Generator, pad: int = 2) -> Tensor:
    """Shift each image by up to `pad` pixels in both directions (edges repeated); the result is channels last in memory."""
    b, _, h, w = x.shape
    padded = F.pad(x, (pad,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * pad + 1, (2, b), generator=generator)
    rows = top[:, None] + torch.arange(h)
    columns = left[:, None] + torch.arange(w)
    return padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def zoom_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """For photographs: a part of each image (a third to all of its area, sides 3:4 to 4:3) is stretched over the whole, half are mirrored."""
    b = len(x)
    area, tilt, left, top, side = torch.rand(5, b, generator=generator)
    area, tilt = 1 / 3 + 2 / 3 * area, (3 / 4) ** (2 * tilt - 1)
    width, height = (area * tilt).sqrt().clamp_max(1), (area / tilt).sqrt().clamp_max(1)
    zero = torch.zeros(b)
    mirror = torch.where(side < 0.5, -1.0, 1.0)
    across = torch.stack([width * mirror, zero, (2 * left - 1) * (1 - width)], 1)
    down = torch.stack([zero, height, (2 * top - 1) * (1 - height)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False).contiguous(memory_format=torch.channels_last)


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 4 pixels, mirror half of the images."""
    x = crop(x, generator, pad=4)
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)
