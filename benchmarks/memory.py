"""How much memory does training with compression need? laconic at `params=0.25` against the plain loop, on the CPU.

The networks and batches are those of `training.py`, in a short run: what is alive at the worst moment does not depend on
the number of steps. Counted is every byte that PyTorch's allocator has handed out and not got back (weights, gradients, the
optimizer's state, activations, and everything that laconic makes for a moment), from the profiler's record of each allocation,
begun before the network is built. The batches exist before, and are counted for nobody. What the libraries below PyTorch
take for themselves (oneDNN's scratch) is not seen, and the same for both; eigenvectors that scipy hands back are counted as if
PyTorch had allocated them, from before the call on.

    python benchmarks/memory.py [--tasks cnn gpt mlp]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from common import write
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from training import TASKS, Task
from training import Options as TrainingOptions

import laconic
from laconic.solvers import eigen

STEPS = 40
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Options:
    """What to run."""

    tasks: tuple[str, ...] = ("cnn", "gpt", "mlp")
    data: Path = Path("../shared/data")
    budget: float = 0.25


def peaks(run: Callable[[], Any]) -> list[int]:
    """The most bytes alive within each `record_function("step")` of a run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    spans = sorted((e.start_ns(), e.end_ns()) for e in events if e.name() == "step")
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    most, now, position = [], 0, 0
    for start, end in spans:
        while position < len(changes) and changes[position][0] < start:
            now, position = now + changes[position][1], position + 1
        peak = now
        while position < len(changes) and changes[position][0] <= end:
            now, position = now + changes[position][1], position + 1
            peak = max(peak, now)
        most.append(peak)
    return most


def in_the_books(matrix: Tensor, _evr: Callable[..., Any] = eigen._evr, **options: Any) -> Any:
    """scipy's eigenvectors in memory of PyTorch's allocator."""
    if "eigvals_only" in options:
        return _evr(matrix, **options)
    counted = torch.empty_like(matrix)
    values, vectors = _evr(matrix, **options)
    return values, counted.copy_(torch.from_numpy(vectors)).numpy()


def train(task: Task, batches: Batches, budget: float | None, after_step: Callable[[nn.Module], Any]) -> None:
    """The loop, with a compressor or without; `after_step` sees the model."""
    torch.manual_seed(0)
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr)
    if budget is not None:
        x = batches[0][0][:1]
        laconic.Compressor(model, optimizer, budget=laconic.Budget(params=budget), total_steps=STEPS, every=1, example_inputs=(x,))
    model.train()
    for x, y in batches:
        with record_function("step"):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
            loss.backward()
            optimizer.step()
            del loss
        after_step(model)


def measure(name: str, options: Options) -> dict[str, Any]:
    task = TASKS[name](TrainingOptions(data=options.data))
    generator = torch.Generator().manual_seed(1)
    batches = [task.batch(generator) for _ in range(STEPS)]
    params: list[int] = []
    largest = max(p.numel() * p.element_size() for p in task.build().parameters())
    train(task, batches, options.budget, lambda model: None)  # the layer times are on disk from here on
    plain = peaks(lambda: train(task, batches, None, lambda model: None))
    ours = peaks(lambda: train(task, batches, options.budget, lambda model: params.append(sum(p.numel() for p in model.parameters()))))
    first = next(i for i, p in enumerate(params) if p < params[0])
    return {
        "task": name,
        "name": (TASKS[name].__doc__ or "").split(",")[0].rstrip("."),
        "largest_matrix": largest,
        "plain": max(plain),
        "to_first_cut": max(ours[: first + 1]),
        "after_first_cut": max(ours[first + 1 :]),
        "settled": max(ours[STEPS // 2 + 1 :]),
        "extra_matrices_to_first_cut": (max(ours[: first + 1]) - max(plain)) / largest,
        "steps": STEPS,
        "first_cut": first,
        "bytes_by_step": ours,
    }


def main(options: Options) -> None:
    rows = []
    for name in options.tasks:
        with mock.patch("laconic.solvers.eigen._evr", in_the_books):
            rows.append(measure(name, options))
        print({k: v for k, v in rows[-1].items() if k != "bytes_by_step"}, flush=True)
    write("memory", rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
