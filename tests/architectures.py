"""Small networks of many kinds, built without downloads, on which removing channels is tried."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.attention import unfuse
from laconic.graph import Group, find_groups
from laconic.models import GPT


def conv(i: int, o: int, k: int = 3, norm: bool = True, **options: Any) -> nn.Sequential:
    layers = [nn.Conv2d(i, o, k, padding=options.pop("padding", k // 2), bias=not norm, **options)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(o)] if norm else []), nn.ReLU())


class Net(nn.Module):
    """A stem, a body, a head after global pooling."""

    def __init__(self, stem: nn.Module, body: nn.Module, width: int):
        super().__init__()
        self.stem, self.body, self.head = stem, body, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Basic(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.short = nn.Identity() if i == o and stride == 1 else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x), inplace=True)


class Bottleneck(nn.Module):
    def __init__(self, i: int, m: int, o: int, groups: int = 1):
        super().__init__()
        self.a, self.b = conv(i, m, 1), conv(m, m, 3, groups=groups)
        self.c, self.norm = nn.Conv2d(m, o, 1, bias=False), nn.BatchNorm2d(o)
        self.short = nn.Identity() if i == o else nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.norm(self.c(self.b(self.a(x)))))


class PreActivation(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class Inverted(nn.Module):
    """MobileNetV2's block: wide, depthwise, narrow, around it a residual."""

    def __init__(self, i: int, o: int, expand: int):
        super().__init__()
        m = i * expand
        self.body = nn.Sequential(
            nn.Conv2d(i, m, 1, bias=False), nn.BatchNorm2d(m), nn.ReLU6(),
            nn.Conv2d(m, m, 3, 1, 1, groups=m, bias=False), nn.BatchNorm2d(m), nn.ReLU6(),
            nn.Conv2d(m, o, 1, bias=False), nn.BatchNorm2d(o),
        )  # fmt: skip
        self.same = i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


class Dense(nn.Module):
    def __init__(self, i: int, growth: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(i + n * growth), nn.ReLU(), nn.Conv2d(i + n * growth, growth, 3, padding=1)) for n in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = conv(3, 8), conv(8, 12), conv(12, 16)
        self.up2, self.join2 = nn.ConvTranspose2d(16, 12, 2, 2), conv(24, 12)
        self.up1, self.join1 = nn.ConvTranspose2d(12, 8, 4, 2, 1), conv(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.up2(self.bottom(F.max_pool2d(b, 2)))
        y = self.up1(self.join2(torch.cat([b, y], 1)))
        return self.out(self.join1(torch.cat([a, y], 1)))


class Inception(nn.Module):
    def __init__(self, i: int):
        super().__init__()
        self.one, self.three = conv(i, 4, 1), nn.Sequential(conv(i, 6, 1), conv(6, 8))
        self.five, self.pool = nn.Sequential(conv(i, 4, 1), conv(4, 6, 5)), conv(i, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(F.max_pool2d(x, 3, 1, 1))], 1)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = conv(width, width)
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = self.up(self.down(y.mean((2, 3))).relu()).sigmoid()
        return y * gate[:, :, None, None]


class Shuffle(nn.Module):
    """ShuffleNet's block: half of the channels by the numbers of their places; they cannot go one by one."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(conv(width // 2, width // 2, 1), conv(width // 2, width // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return F.channel_shuffle(torch.cat([a, self.branch(b)], 1), 2)


class Gated(nn.Module):
    def __init__(self, packed: bool = False):
        super().__init__()
        self.packed = packed
        self.gate, self.up, self.down = nn.Linear(8, 32 if packed else 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            gate, up = self.gate(x).chunk(2, -1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.head(x + self.down(F.silu(gate) * up))


class Classifier(nn.Module):
    def __init__(self, cell: type[nn.Module] = nn.LSTM):
        super().__init__()
        self.embed, self.before = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.cell = cell(8, 12, batch_first=True)
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.cell(self.before(self.embed(tokens)))[0]
        return self.head(self.hidden(y[:, -1]).relu())


class Attention(nn.Module):
    """Packed query, key, value; how the heads are divided is the argument's business."""

    def __init__(self, width: int = 16, heads: int = 4, layout: str = "chunk"):
        super().__init__()
        self.heads, self.head_dim, self.layout = heads, width // heads, layout
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5) if layout == "counted, with temperatures" else None
        self.qkv, self.out, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.layout == "chunk":
            q, k, v = (y.view(b, t, -1, self.head_dim).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        elif self.layout == "packed":
            q, k, v = self.qkv(x).view(b, t, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(self.head_dim)
        scores = scores if self.temperature is None else scores * self.temperature
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1)
        return self.head(x + self.out(y))


class WeightTied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(13, 8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.down(F.gelu(self.up(x))))


class LiteralView(nn.Module):
    """A view with the width written out: known only to whoever tries."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu().view(-1, 12)).relu())


class LiteralSlice(nn.Module):
    """Two layers read fixed halves of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 12), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.head((self.b(y[:, :6]) + self.c(y[:, 6:])).relu())


class Norms(nn.Module):
    """LayerNorm and GroupNorm over a width, and a layer behind them that is free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 3)
        self.c, self.layer_norm, self.d, self.head = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.norm(self.a(x))).relu().amax((2, 3))
        return self.head(self.d(self.layer_norm(self.c(x))).relu())


class ConvNeXt(nn.Module):
    """Depthwise, LayerNorm over channels last, a two-layer perceptron of linear layers, a learned scale."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem, self.spatial, self.norm = nn.Conv2d(3, width, 2, 2), nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.LayerNorm(width)
        self.up, self.down, self.scale = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(self.spatial(x).permute(0, 2, 3, 1))))) * self.scale
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class Scaled(nn.Module):
    """A scale and a shift of its own for each channel."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.next = conv(3, width), conv(width, width)
        self.scale, self.shift = nn.Parameter(torch.rand(width, 1, 1) + 0.5), nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.conv(x) * self.scale + self.shift.view(1, -1, 1, 1)).relu()
        return self.head(self.next(x).mean((2, 3)))


class QueryKeyNorm(nn.Module):
    """Attention whose queries and keys are scaled by numbers that run along a head, turned by angles that a file holds, and weighed by the token."""

    def __init__(self, width: int = 16, heads: int = 4, length: int = 5) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.scale, self.gate = nn.Parameter(torch.rand(self.head_dim) + 0.5), nn.Parameter(torch.rand(length, 1))
        self.mix, self.probe = nn.Parameter(torch.rand(2)), nn.Parameter(torch.rand(self.head_dim))
        self.register_buffer("frequencies", torch.rand(self.head_dim))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, -1, self.head_dim) for layer in (self.query, self.key, self.value))
        angles = torch.outer(torch.arange(t, dtype=x.dtype), self.frequencies)[:, None]
        q, k = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * self.scale * angles.cos() for y in (q, k))
        weights = (torch.einsum("bthd,bshd->bhts", q, k) * self.gate).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", weights, v)
        y = y + torch.matmul(y.mean(-1, keepdim=True), self.probe[None])  # an outer product
        y = (self.mix.softmax(0).view(2, 1, 1, 1, 1) * torch.stack([y, y.sigmoid()])).sum(0)
        return self.head(x + self.out(y.reshape(b, t, -1)))


class FrozenNorm(nn.Module):
    """A BatchNorm whose numbers are buffers, as detectors have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in {
            "weight": torch.rand(width),
            "bias": torch.randn(width),
            "mean": torch.randn(width),
            "var": torch.rand(width),
        }.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale)


class SubPixel(nn.Module):
    """Super-resolution by pixel shuffle: four channels make one unit of the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.pixel_shuffle(self.up(self.a(x).relu()), 2).relu())


class TwoInputs(nn.Module):
    """Two inputs, several outputs in a dict, a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.shared = nn.Linear(6, 10), nn.Linear(4, 10), nn.Linear(10, 10)
        self.mean, self.spread = nn.Linear(10, 2), nn.Linear(10, 2)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        x = (self.left(a) + self.right(b)).relu()
        x = self.shared(self.shared(x).relu()).relu()
        return {"mean": self.mean(x), "spread": self.spread(x).exp()}


@dataclass(frozen=True)
class Case:
    """`groups`: name and units of every group that must be found; `alone`: layers that must be left alone, and a word of the reason."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    groups: dict[str, int]
    alone: dict[str, str]


def image(channels: int = 3, side: int = 8) -> tuple[Tensor]:
    return (torch.randn(2, channels, side, side),)


def tokens(vocabulary: int = 11, length: int = 7) -> tuple[Tensor]:
    return (torch.randint(0, vocabulary, (2, length)),)


def tiny(name: str, **options: Any) -> nn.Module:
    """A Hugging Face model from a small configuration."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    kind = {"ViT": "ViTForImageClassification", "Bert": "BertForSequenceClassification", "GPT2": "GPT2LMHeadModel"}
    return getattr(transformers, kind.get(name, f"{name}ForCausalLM"))(config)


@functools.cache
def groups_of(name: str) -> tuple[Group, ...]:
    """The groups of an architecture; they do not depend on its weights."""
    return tuple(find_groups(CASES[name].build(), CASES[name].inputs())[0])


def per_layer(prefix: str, units: dict[str, int], layers: int = 2) -> dict[str, int]:
    return {f"{prefix}.{i}.{name}": count for i in range(layers) for name, count in units.items()}


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
OUTPUT = "output of the model"

CASES: dict[str, Case] = {
    "plain": Case(lambda: Net(conv(3, 8), conv(8, 12), 12), image, {"stem.0": 8, "body.0": 12}, {"head": OUTPUT}),
    "no norm": Case(lambda: Net(conv(3, 8, norm=False), conv(8, 12, norm=False), 12), image, {"stem.0": 8, "body.0": 12}, {"head": OUTPUT}),
    "unpadded": Case(lambda: Net(conv(3, 8, padding=0), conv(8, 12, padding=0), 12), image, {"stem.0": 8, "body.0": 12}, {"head": OUTPUT}),
    "residual": Case(
        lambda: Net(conv(3, 8), nn.Sequential(Basic(8, 8), Basic(8, 12, 2), Basic(12, 12)), 12),
        image,
        {"stem.0": 8, "body.0.conv1": 8, "body.1.conv1": 12, "body.1.conv2": 12, "body.2.conv1": 12},
        {"head": OUTPUT},
    ),
    "bottleneck": Case(
        lambda: Net(conv(3, 8), nn.Sequential(Bottleneck(8, 4, 16), Bottleneck(16, 4, 16)), 16),
        image,
        {"stem.0": 8, "body.0.a.0": 4, "body.0.b.0": 4, "body.0.c": 16, "body.1.a.0": 4, "body.1.b.0": 4},
        {"head": OUTPUT},
    ),
    "grouped": Case(
        lambda: Net(conv(3, 8), Bottleneck(8, 12, 16, groups=4), 16), image, {"stem.0": 8, "body.a.0": 4, "body.c": 16}, {"head": OUTPUT}
    ),
    "pre-activation": Case(
        lambda: Net(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(PreActivation(8), PreActivation(8)), 8),
        image,
        {"stem": 8, "body.0.conv1": 8, "body.1.conv1": 8},
        {"head": OUTPUT},
    ),
    "separable": Case(
        lambda: Net(conv(3, 8), nn.Sequential(conv(8, 8, groups=8), conv(8, 12, 1), conv(12, 24, groups=12), conv(24, 8, 1)), 8),
        image,
        {"stem.0": 8, "body.1.0": 12, "body.3.0": 8},
        {"head": OUTPUT},
    ),
    "inverted": Case(
        lambda: Net(conv(3, 6), nn.Sequential(Inverted(6, 6, 3), Inverted(6, 8, 2)), 8),
        image,
        {"stem.0": 6, "body.0.body.0": 18, "body.1.body.0": 12, "body.1.body.6": 8},
        {"head": OUTPUT},
    ),
    "dense": Case(
        lambda: Net(nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(Dense(6, 4, 3), nn.BatchNorm2d(18), conv(18, 9, 1), Dense(9, 3, 2)), 15),
        image,
        {"stem": 6, "body.0.layers.0.2": 4, "body.0.layers.1.2": 4, "body.0.layers.2.2": 4, "body.2.0": 9, "body.3.layers.0.2": 3,
         "body.3.layers.1.2": 3},
        {"head": OUTPUT},
    ),
    "u-net": Case(
        UNet,
        image,
        {"down1.0": 8, "down2.0": 12, "bottom.0": 16, "up2": 12, "join2.0": 12, "up1": 8, "join1.0": 8},
        {"out": OUTPUT},
    ),
    "inception": Case(
        lambda: Net(conv(3, 8), nn.Sequential(Inception(8), Inception(22)), 22),
        image,
        {"stem.0": 8} | per_layer("body", {"one.0": 4, "three.0.0": 6, "three.1.0": 8, "five.0.0": 4, "five.1.0": 6, "pool.0": 4}),
        {"head": OUTPUT},
    ),
    "vgg": Case(
        lambda: nn.Sequential(
            conv(3, 6), nn.MaxPool2d(2), conv(6, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 20), nn.ReLU(), nn.Dropout(),
            nn.Linear(20, 5),
        ),
        image,
        {"0.0": 6, "2.0": 8, "5": 20},
        {"8": OUTPUT},
    ),
    "1-d": Case(
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.PReLU(8), nn.MaxPool1d(2), nn.ConvTranspose1d(8, 6, 4, 2), nn.GELU(),
            nn.Conv1d(6, 4, 3), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(8, 3),
        ),
        lambda: (torch.randn(2, 3, 16),),
        {"0": 8, "4": 6, "6": 4},
        {"9": OUTPUT},
    ),
    "3-d": Case(
        lambda: nn.Sequential(
            nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(6, 8, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64, 4),
        ),
        lambda: (torch.randn(2, 2, 4, 4, 4),),
        {"0": 6, "4": 8},
        {"7": OUTPUT},
    ),
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)),
        lambda: (torch.randn(4, 6),),
        {"0": 12, "2": 10},
        {"5": OUTPUT},
    ),
    "gated": Case(Gated, lambda: (torch.randn(2, 3, 8),), {"gate": 16}, {"down": "no layer's output", "head": OUTPUT}),
    "gated, packed": Case(lambda: Gated(True), lambda: (torch.randn(2, 3, 8),), {"gate": 16}, {"up": "not reached", "head": OUTPUT}),
    "glu": Case(
        lambda: nn.Sequential(nn.Linear(6, 16), nn.GLU(), nn.Linear(8, 3)), lambda: (torch.randn(2, 6),), {"0": 8}, {"2": OUTPUT}
    ),
    "squeeze-excite": Case(
        lambda: Net(conv(3, 8), SqueezeExcite(8), 8), image, {"stem.0": 8, "body.conv.0": 8, "body.down": 4}, {"head": OUTPUT}
    ),
    "pixel shuffle": Case(SubPixel, image, {"a": 8, "up": 6}, {"out": OUTPUT}),
    "two inputs": Case(
        TwoInputs, lambda: (torch.randn(3, 6), torch.randn(3, 4)), {"left": 10}, {"mean": OUTPUT, "spread": OUTPUT}
    ),
    "convnext": Case(ConvNeXt, image, {"stem": 8, "up": 32}, {"head": OUTPUT}),
    "attention, chunks": Case(Attention, lambda: (torch.randn(2, 5, 16),), {"qkv": 4}, {"out": "no layer's output"}),
    "attention, few heads": Case(
        lambda: Attention(heads=2), lambda: (torch.randn(2, 5, 16),), {"qkv": 2}, {"out": "no layer's output"}
    ),
    "attention, packed": Case(lambda: Attention(layout="packed"), lambda: (torch.randn(2, 5, 16),), {"qkv": 4}, {"out": "no layer's output"}),
    "attention, counted": Case(lambda: Attention(layout="counted"), lambda: (torch.randn(2, 5, 16),), {"qkv": 4}, {"out": "layer's output"}),
    "laconic GPT": Case(
        lambda: GPT(11, 8, 2, 16, 4),
        tokens,
        {"token": 16} | per_layer("blocks", {"query": 4, "up": 64}),
        {"head": OUTPUT},
    ),
    "vit": Case(
        lambda: tiny("ViT", image_size=16, patch_size=8, **SMALL),
        lambda: image(side=16),
        {"vit.embeddings.patch_embeddings.projection": 16} | per_layer("vit.layers", {"attention.q_proj": 4, "mlp.fc1": 24}),
        {"classifier": OUTPUT},
    ),
    "gpt-2": Case(
        lambda: tiny("GPT2", n_embd=16, n_head=4, n_layer=2, vocab_size=11, n_positions=16, bos_token_id=0, eos_token_id=0),
        tokens,
        {"transformer.wte": 16} | per_layer("transformer.h", {"attn.c_attn": 4, "mlp.c_fc": 64}),
        {"lm_head": OUTPUT},
    ),
    "bert": Case(
        lambda: tiny("Bert", vocab_size=11, max_position_embeddings=16, **SMALL),
        tokens,
        {"bert.embeddings.word_embeddings": 16, "bert.pooler.dense": 16}
        | per_layer("bert.encoder.layer", {"attention.self.query": 4, "intermediate.dense": 24}),
        {"classifier": OUTPUT},
    ),
    "llama": Case(
        lambda: tiny("Llama", vocab_size=11, num_key_value_heads=2, **SMALL),
        tokens,
        {"model.embed_tokens": 16} | per_layer("model.layers", {"self_attn.q_proj": 2, "mlp.gate_proj": 24}),
        {"lm_head": OUTPUT},
    ),
    "scaled": Case(lambda: nn.Sequential(Scaled(), nn.Identity()), image, {"0.conv.0": 8, "0.next.0": 8}, {"0.head": OUTPUT}),
    "frozen norm": Case(
        lambda: Net(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), FrozenNorm(8), nn.ReLU()), conv(8, 12), 12), image, {"stem.0": 8, "body.0": 12}, {"head": OUTPUT}
    ),
    "attention with temperatures": Case(
        lambda: Attention(layout="counted, with temperatures"), lambda: (torch.randn(2, 5, 16),), {"qkv": 4}, {"head": OUTPUT, "out": "the input"}
    ),
    "norms along a head": Case(QueryKeyNorm, lambda: (torch.randn(2, 5, 16),), {"query": 4}, {"head": OUTPUT, "out": "the input"}),
    # Left alone, by name.
    "shuffle": Case(
        lambda: Net(conv(3, 8), Shuffle(8), 8), image, {"body.branch.0.0": 4}, {"stem.0": "equal shares", "body.branch.1.0": "without some of its units"}
    ),
    "lstm": Case(Classifier, tokens, {"embed": 8, "hidden": 10}, {"before": "LSTM", "cell": "LSTM is not supported", "head": OUTPUT}),
    "gru": Case(lambda: Classifier(nn.GRU), tokens, {"embed": 8, "hidden": 10}, {"before": "GRU", "cell": "GRU is not supported"}),
    "weight-tied": Case(WeightTied, lambda: tokens(13), {"embed": 8, "up": 24}, {"head": OUTPUT}),
    "literal view": Case(LiteralView, lambda: (torch.randn(4, 6),), {"b": 8}, {"a": "does not run"}),
    "literal slice": Case(LiteralSlice, lambda: (torch.randn(4, 6),), {"b": 8}, {"a": "equal shares"}),
    "norms": Case(Norms, image, {"b": 6, "c": 10, "d": 9}, {"a": "GroupNorm", "head": OUTPUT}),
    "transformer layer": Case(
        lambda: nn.Sequential(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), nn.Linear(16, 3)),
        lambda: (torch.randn(2, 5, 16),),
        {"0.linear1": 24},
        {"0.self_attn": "MultiheadAttention is not supported", "0.self_attn.out_proj": "MultiheadAttention", "1": OUTPUT},
    ),
    "transformer layers, unfused": Case(
        lambda: nn.Sequential(unfuse(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2)), nn.Linear(16, 3)),
        lambda: (torch.randn(2, 5, 16),),
        {f"0.layers.{i}.{x}": n for i in (0, 1) for x, n in (("self_attn.q_proj", 4), ("linear1", 24))},
        {"1": OUTPUT, "0.layers.0.linear2": "the input", "0.layers.1.linear2": "the input"},
    ),
}  # fmt: skip
