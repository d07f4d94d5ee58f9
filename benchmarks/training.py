"""What does training with compression cost? laconic at `params=0.25` against the plain loop, same steps, same batches.

The two loops take turns in blocks of a few steps, so that the machine's noise hits both; everything that laconic does
(measuring layers, proximal steps, cuts) is in its time, and listed apart. Quality is not the question here.

    python benchmarks/training.py [--tasks cnn gpt mlp]
    python benchmarks/training.py --device cuda --tasks resnet50 vit-b gpt-b

The last three are networks of ordinary size, in bfloat16 on random data of the right shape: only their times mean something.
"""

from __future__ import annotations

import gzip
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from common import clock, interleaved, write
from torch import Tensor, nn

import laconic
from laconic import compressor as compressor_module
from laconic.data import load_dataset
from laconic.measure import evaluating
from laconic.models import GPT, ConvNet, ViT
from laconic.models.resnet import ImageNetResNet
from laconic.recipe import load_recipe

BLOCK = 10


@dataclass(frozen=True)
class Options:
    """What to run."""

    tasks: tuple[str, ...] = ("cnn", "gpt", "mlp")
    device: str = "cpu"
    data: Path = Path("../shared/data")
    budget: float = 0.25
    latency: float = 0.0  # instead: of the milliseconds of a forward pass of a whole batch


@dataclass(frozen=True)
class Task:
    """A network, its batches, and how it is trained."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    steps: int
    lr: float
    half: bool = False  # bfloat16


def cnn(options: Options) -> Task:
    """The CIFAR-10 network of the recipe, at a third of its steps."""
    recipe = load_recipe("cifar10")
    data = load_dataset("cifar10", options.data, 6400)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(data.train_x), (recipe.batch_size,), generator=generator)
        return data.augment(data.train_x[index], generator), data.train_y[index]

    return Task(lambda: ConvNet(3, 10, recipe.widths, recipe.pools).to(memory_format=torch.channels_last), batch, 800, recipe.lr)


def gpt(options: Options) -> Task:
    """A character-level GPT on tiny Shakespeare: 6 layers, width 256, 8 sequences of 128."""
    text = (options.data / "text" / "tinyshakespeare.txt").read_text()
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(c) for c in text[:300_000]])

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - 129, (8,), generator=generator)
        window = torch.stack([tokens[s : s + 129] for s in starts])
        return window[:, :-1], window[:, 1:]

    return Task(lambda: GPT(len(letters)), batch, 500, 1e-3)


def mlp(options: Options) -> Task:
    """A perceptron of width 1024 with three hidden layers on MNIST."""
    images = np.frombuffer(gzip.decompress((options.data / "mnist" / "train-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((options.data / "mnist" / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    x = torch.tensor(images.reshape(-1, 784), dtype=torch.float32) / 255
    y = torch.tensor(labels, dtype=torch.int64)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(x), (128,), generator=generator)
        return x[index], y[index]

    def build() -> nn.Module:
        sizes = (784, 1024, 1024, 1024)
        hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(1024, 10))

    return Task(build, batch, 2800, 1e-3)


def images(build: Callable[[], nn.Module], size: int) -> Task:
    x, y = torch.randn(size, 3, 224, 224).contiguous(memory_format=torch.channels_last), torch.randint(1000, (size,))
    return Task(lambda: build().to(memory_format=torch.channels_last), lambda _: (x, y), 120, 1e-4, half=True)


def resnet50(options: Options) -> Task:
    """ResNet-50, 128 images of 224 x 224."""
    del options  # same signature as the others
    return images(lambda: ImageNetResNet(3, 1000), 128)


def vit_b(options: Options) -> Task:
    """ViT-B/16, 64 images of 224 x 224."""
    del options
    return images(lambda: ViT((3, 224, 224), 1000, 16, 12, 768, 12), 64)


def gpt_b(options: Options) -> Task:
    """GPT of 12 layers and width 768, 16 sequences of 512."""
    del options
    tokens = torch.randint(8192, (16, 513))
    return Task(lambda: GPT(8192, 512, 12, 768, 12), lambda _: (tokens[:, :-1], tokens[:, 1:]), 120, 1e-4, half=True)


TASKS = {"cnn": cnn, "gpt": gpt, "mlp": mlp, "resnet50": resnet50, "vit-b": vit_b, "gpt-b": gpt_b}


def training(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> Iterator[tuple[float, float]]:
    """Train; after every block of steps yield its seconds and its mean loss."""
    generator = torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, total_steps=task.steps, pct_start=0.2)
    model.train()
    for _ in range(0, task.steps, BLOCK):
        batches = [[part.to(device) for part in task.batch(generator)] for _ in range(BLOCK)]
        losses = []
        start = clock()
        for x, y in batches:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=task.half):
                loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        yield clock() - start, float(torch.stack(losses).mean())


def timed(spent: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += clock() - start

    return wrapper


def measure(name: str, options: Options) -> dict[str, Any]:
    task = TASKS[name](options)
    spent: dict[str, float] = defaultdict(float)
    torch.manual_seed(0)
    dense = task.build().to(options.device)
    torch.manual_seed(0)
    small = task.build().to(options.device)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=task.lr) for m in (dense, small)]
    x = task.batch(torch.Generator().manual_seed(2))[0].to(options.device)
    budget, example = laconic.Budget(params=options.budget), x[:1]
    if options.latency:
        budget, example = laconic.Budget(latency=options.latency), x
    start = clock()
    compressor = laconic.Compressor(small, optimizers[1], budget=budget, total_steps=task.steps, example_inputs=(example,))
    spent["construction"] = clock() - start
    compressor._prox = timed(spent, "proximal steps", compressor._prox)  # type: ignore[method-assign]
    compressor._cut = timed(spent, "cuts", compressor._cut)  # type: ignore[method-assign]
    compressor_module.layer_times = timed(spent, "layer timing", compressor_module.layer_times)  # type: ignore[attr-defined]
    seconds: dict[str, list[float]] = {"dense": [], "laconic": []}
    losses: dict[str, list[float]] = {"dense": [], "laconic": []}
    params = []
    loops = zip(training(task, dense, optimizers[0], options.device), training(task, small, optimizers[1], options.device), strict=True)
    for (dense_seconds, dense_loss), (small_seconds, small_loss) in loops:
        seconds["dense"].append(dense_seconds)
        seconds["laconic"].append(small_seconds)
        losses["dense"].append(dense_loss)
        losses["laconic"].append(small_loss)
        params.append(sum(p.numel() for p in small.parameters()))
    start = clock()
    report = compressor.compact()
    spent["compact"] = clock() - start
    total = {k: sum(v) for k, v in seconds.items()}
    total["laconic"] += spent["construction"] + spent["compact"]
    tail = len(params) // 4
    speedup = {}
    with evaluating(dense), evaluating(small), torch.autocast(options.device, torch.bfloat16, enabled=task.half):
        for size in (1, len(x)):
            times = interleaved({"dense": partial(dense, x[:size]), "laconic": partial(small, x[:size])}, rounds=11)
            speedup[f"batch {size}"] = times["dense"] / times["laconic"]
    return {
        "task": name,
        "name": (TASKS[name].__doc__ or "").split(",")[0].rstrip("."),
        "steps": task.steps,
        "ratio": total["laconic"] / total["dense"],
        "seconds": total,
        "step_ratio_after_settling": sum(seconds["laconic"][-tail:]) / sum(seconds["dense"][-tail:]),
        "overhead_seconds": dict(spent),
        "params_fraction": report.params_after / report.params_before,
        "macs_fraction": (report.macs_after or 0) / (report.macs_before or 1),
        "inference_speedup": speedup,
        "final_loss": {k: sum(v[-tail:]) / tail for k, v in losses.items()},
        "params_over_time": [p / report.params_before for p in params[:: max(1, len(params) // 40)]],
    }


def main(options: Options) -> None:
    rows = []
    for name in options.tasks:
        rows.append(measure(name, options))
        print({k: v for k, v in rows[-1].items() if k != "params_over_time"}, flush=True)
    write("training-latency" if options.latency else "training", rows, options.device)


if __name__ == "__main__":
    main(tyro.cli(Options))
