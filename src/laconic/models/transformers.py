"""The transformers: a small GPT, and a vision transformer (Dosovitskiy et al. 2021); pre-norm blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidValueError

STD = 0.02  # as of GPT-2 and DeiT, which are several times as wide as the networks here


class GPT(nn.Module):
    """Args:
    vocabulary: number of tokens.
    context: longest sequence.
    layers, width, heads: as usual.
    hidden: width of a block's hidden layer; None: four times the width.
    std: standard deviation of the weights; of those that add to the stream less, as there are many of them.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int = 128,
        layers: int = 6,
        width: int = 256,
        heads: int = 4,
        hidden: int | None = None,
        std: float = STD,
    ):
        super().__init__()
        self.widths = (width,) if hidden is None else (width, hidden)
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, True, hidden or 4 * width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=std / (2 * layers) ** 0.5 if name.endswith("back.weight") else std)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class ViT(nn.Module):
    """Patches of an image and a class token through blocks; with 16 pixels, 12 layers, width 192: 5,717,416 parameters for 224 x 224 and 1,000 classes.

    Args:
        image: channels, height, width.
        patch: side of a patch in pixels.
        layers, width, heads, hidden, std: as of `GPT`.
    """

    def __init__(
        self,
        image: Sequence[int],
        classes: int,
        patch: int = 4,
        layers: int = 6,
        width: int = 192,
        heads: int = 3,
        hidden: int | None = None,
        std: float = STD,
    ):
        super().__init__()
        channels, *sides = image
        if any(side % patch for side in sides):
            raise InvalidValueError(f"kernel = {patch}: the patches of a {' x '.join(map(str, sides))} image would not fill it")
        self.widths = (width,) if hidden is None else (width, hidden)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + math.prod(side // patch for side in sides), width))
        self.blocks = nn.Sequential(*(Block(width, heads, False, hidden or 4 * width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
        out: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return out


class Block(nn.Module):
    """Attention and a two-layer perceptron, each beside a residual connection."""

    def __init__(self, width: int, heads: int, causal: bool, hidden: int):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_back = nn.Linear(width, width)
        self.up = nn.Linear(width, hidden)
        self.back = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.attention_back(mixed)
        out: Tensor = x + self.back(F.gelu(self.up(self.norms[1](x))))
        return out
