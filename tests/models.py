"""Small networks, optimizers and training steps that the tests of the training side share."""

import copy
from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)


def cnn(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 9, 10),
    ).to(dtype)


class Tied(nn.Module):
    """Two linear layers with one weight, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).tanh()).tanh())


class Shared(nn.Module):
    """One layer that sits at two places and runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(10, 10)
        self.again = self.body
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.body(x).tanh()))


def inputs_for(model: nn.Module, batch: int = 8, seed: int = 0) -> Tensor:
    """Inputs that the models of this file take, in the dtype of the model."""
    first = next(model.parameters())
    shape = (3, 8, 8) if first.ndim == 4 else (first.shape[-1],)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(first.dtype)


def backward(model: nn.Module, step: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Gradients of a fixed task on the batch of this step; returns the loss."""
    x = inputs_for(model, seed=1000 * seed + step)
    output = model(x)
    loss = (output.float() if output.dtype in (torch.bfloat16, torch.float16) else output).sub(x.flatten(1)[:, :1].sin()).square().mean()
    (loss * scale).backward()
    return loss.detach()


def low_rank(module: nn.Module, ranks: dict[str, int]) -> nn.Module:
    """Give the named weights these exact ranks (rows flattened), in place."""
    with torch.no_grad():
        for name, rank in ranks.items():
            weight = module.get_parameter(name)
            u, s, vh = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
            weight.copy_(((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(weight.shape))
    return module


def slow_but_for(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters of a test that says the same of many: these few stand for all where time is short."""
    return [v if v in quick else pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


def snapshot(*holders) -> list:
    """Deep copies of the state of models and optimizers, for `assert_same`."""
    return [copy.deepcopy(h.state_dict()) for h in holders]


def assert_same(a, b, where: str = "") -> None:
    """Equal bit for bit, through any nesting of plain containers."""
    assert type(a) is type(b) or (isinstance(a, (int, float)) and isinstance(b, (int, float))), where
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a} != {b}"


def set_clock(monkeypatch, clock):
    """From here on, a forward pass of a model takes as many milliseconds as `clock(model)` says."""

    def beside(model, reference, inputs):
        ms = clock(reference)
        return clock(model) / ms, ms

    monkeypatch.setattr("laconic.latency.measure_latency", lambda model, *_: laconic.measure.Latency(clock(model), 0.0, 1, 1, "clockwork"))
    for module in ("latency", "outcome"):
        monkeypatch.setattr(f"laconic.{module}.relative_latency", beside)
