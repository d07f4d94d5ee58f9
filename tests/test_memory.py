"""How much memory a run needs beside the plain loop: counted by PyTorch's allocator, so it is the same every time."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import memory
from training import Task

from laconic import compressor
from laconic.timing import RankTimes, layer_times

WIDTH, STEPS = 512, 20  # large enough for the eigensolver that needs little memory


def perceptron():
    layers = [m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(32, WIDTH, generator=g), torch.randint(10, (32,), generator=g)) for _ in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 2.0], ids=["pairs are fast", "pairs are slow"])
def test_compression_needs_at_most_three_matrices_more_than_the_plain_loop_and_less_when_settled(share, batches, tmp_path, monkeypatch):
    """The worst case: a network of nothing but large square matrices, whose activations are small. Layers are timed, too, but what is cut
    when follows from made-up times."""

    def times(module, unfolding, shape, break_even, training):
        measured = layer_times(module, unfolding, shape, break_even, training)
        return RankTimes(1.0, measured.ranks, (share,) * len(measured.ranks))

    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))
    monkeypatch.setattr(memory, "STEPS", STEPS)
    monkeypatch.setattr(compressor, "layer_times", times)
    task = Task(perceptron, lambda generator: batches[0], STEPS, 1e-3)
    params = []
    count = lambda model: params.append(sum(p.numel() for p in model.parameters()))  # noqa: E731
    plain = max(memory.peaks(lambda: memory.train(task, batches, None, lambda model: None)))
    with mock.patch("laconic.solvers.eigen._evr", memory.in_the_books):
        ours = memory.peaks(lambda: memory.train(task, batches, 0.25, count))
    first = next(i for i, p in enumerate(params) if p < params[0])
    settled = next(i for i, p in enumerate(params) if p == params[-1])
    assert max(ours[: settled + 1]) <= plain + 3 * 4 * WIDTH**2
    if share > 1:  # nothing is cut at the first chance but neurons
        assert max(ours[first + 1 :]) < max(ours[: first + 1])
    assert settled < STEPS // 2
    assert max(ours[settled + 1 :]) < plain / 2
