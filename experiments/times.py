"""The timing pass: training time and latency of the methods, side by side, with the machine to itself.

Runs that share the machine store no times (`--no-times`). This script trains the networks of a recipe again at a part of
its epochs (ratios of training times hardly depend on it): dense, thin and laconic (with one structure or both) take turns in blocks of a few steps,
so that the machine's noise hits all of them; everything that laconic does is in its time. Times are those of a whole run: the steps'
scaled by the epochs, what laconic does besides (construction, proximal steps and cuts, compaction) as it is, since there are as many
proximal steps in the short run as in the whole one. Then it times inference of the networks that came out. It writes `results/<recipe>/times.json`.

    python experiments/times.py [--recipes scene ...] [--structures laconic] [--device cuda]
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from common import clock, interleaved

from laconic.data import Dataset, load_dataset
from laconic.measure import evaluating
from laconic.methods import build, compressor_for, thin_network
from laconic.recipe import Recipe, load_recipe, shipped_recipes
from laconic.results import provenance, write_json
from laconic.training import batches, cross_entropy, learning_rate_factor, make_optimizer, steps_per_epoch

BLOCK = 8
STRUCTURES: dict[str, tuple[str, ...]] = {"laconic": (), "low-rank": ("low-rank",), "channels": ("channels",)}


@dataclass(frozen=True)
class Options:
    """What to time."""

    recipes: tuple[str, ...] = tuple(name for name in shipped_recipes() if load_recipe(name).tier == "cpu")
    results: Path = Path(__file__).parent / "results"
    data: Path | None = None
    part: float = 0.25
    device: str = "cpu"
    structures: tuple[str, ...] = tuple(STRUCTURES)  # which of these, beside the dense and the thin network


def training(model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, recipe: Recipe) -> Iterator[float]:
    """Train; yield the seconds of every block of steps, without those of preparing the batches."""
    total = recipe.epochs * steps_per_epoch(data, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, recipe))
    generator = torch.Generator().manual_seed(1)
    seconds, step = 0.0, 0
    model.train()
    for _ in range(recipe.epochs):
        for x, y in batches(data, recipe.batch_size, generator):
            start = clock()
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(model(x), y, recipe.label_smoothing).backward()
            optimizer.step()
            schedule.step()
            seconds, step = seconds + clock() - start, step + 1
            if step % BLOCK == 0:
                yield seconds
                seconds = 0.0
    yield seconds


def stopwatch(spent: dict[str, float], name: str, ticks: int) -> Callable[..., None]:
    """A hook for after the optimizer's step: the one before the compressor's starts the watch (-1), the one after it stops it (1)."""

    def hook(*_: Any) -> None:
        spent[name] += ticks * clock()

    return hook


def time_recipe(name: str, options: Options) -> dict[str, Any]:
    recipe = load_recipe(name)
    data = load_dataset(recipe.task, options.data, recipe.train_limit or None, recipe.size)
    data = dataclasses.replace(data, device=torch.device(options.device))
    whole = recipe.epochs
    recipe = dataclasses.replace(recipe, epochs=max(2, math.ceil(options.part * recipe.epochs)))
    of = {k: STRUCTURES[k] for k in options.structures}
    models = {"dense": build(data, recipe, 0), "thin": thin_network(data, recipe, 0)} | {k: build(data, recipe, 0) for k in of}
    optimizers = {k: make_optimizer(m, recipe) for k, m in models.items()}
    seconds, once, hooked = (dict.fromkeys(models, 0.0) for _ in range(3))
    compressors = {}
    for name, structures in of.items():
        start = clock()
        optimizers[name].register_step_post_hook(stopwatch(hooked, name, -1))
        compressors[name] = compressor_for(
            models[name], optimizers[name], data, dataclasses.replace(recipe, structures=structures or recipe.structures)
        )
        optimizers[name].register_step_post_hook(stopwatch(hooked, name, 1))
        once[name] += clock() - start
    loops = {k: training(m, optimizers[k], data, recipe) for k, m in models.items()}
    for blocks in zip(*loops.values(), strict=True):
        for k, spent in zip(loops, blocks, strict=True):
            seconds[k] += spent
    for k, compressor in compressors.items():
        start = clock()
        compressor.compact()
        once[k] += clock() - start
    once = {k: once[k] + spent for k, spent in hooked.items()}
    seconds = {k: (spent - hooked[k]) * whole / recipe.epochs + once[k] for k, spent in seconds.items()}  # of a whole run
    seconds |= {"svd": seconds["dense"], "thin-long": seconds["thin"] * (recipe.thin_epochs or 2 * whole) / whole}
    latencies = {}
    for batch in (1, 64):
        with contextlib.ExitStack() as stack:
            for model in models.values():
                stack.enter_context(evaluating(model))
            latencies[f"latency_b{batch}_ms"] = {
                k: 1e3 * v
                for k, v in interleaved({k: partial(m, data.test_x[:batch].to(data.device)) for k, m in models.items()}, rounds=21).items()
            }
    return {
        "epochs": recipe.epochs,
        "train_seconds": seconds,
        "once_seconds": once,
        **latencies,
        **provenance(),
    }


def main(options: Options) -> None:
    for name in options.recipes:
        found = time_recipe(name, options)
        write_json(options.results / name / "times.json", found)
        print(name, json.dumps({k: found[k] for k in ("train_seconds", "latency_b1_ms", "latency_b64_ms")}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
