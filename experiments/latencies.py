"""Networks of finished runs timed side by side with the dense one, with the machine to itself: did they meet a budget in milliseconds?

Each run's own clock has its own day; here all take turns. It writes `results/<recipe>/latencies.json`: milliseconds relative to dense, by method and seed.

    laconic train scene-latency --method laconic --out runs ...
    python experiments/latencies.py --runs runs --recipes scene-latency scene-latency-quarter
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from common import interleaved
from safetensors.torch import load_file

import laconic
from laconic.data import Dataset, load_dataset
from laconic.measure import evaluating
from laconic.methods import build
from laconic.recipe import Recipe, load_recipe
from laconic.results import provenance, write_json


@dataclass(frozen=True)
class Options:
    """What to time."""

    runs: Path
    recipes: tuple[str, ...] = ("scene-latency", "scene-latency-quarter")
    results: Path = Path(__file__).parent / "results"
    data: Path | None = None
    batch: int = 64
    rounds: int = 41


def load(directory: Path, data: Dataset, recipe: Recipe) -> nn.Module:
    """The network of a run; a thin one is built anew with the widths that it was saved with."""
    if "thin" in directory.parent.name:
        saved, names = load_file(directory / "model.safetensors"), build(data, recipe, 0).state_dict()
        return build(data, recipe, 0, tuple(saved[name].shape[0] for name in names if saved[name].ndim == 4))
    return laconic.load(directory, build(data, recipe, 0)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def main(options: Options) -> None:
    for name in options.recipes:
        recipe = load_recipe(name)
        data = load_dataset(recipe.task, options.data, recipe.train_limit or None, recipe.size)
        models = {"dense": build(data, recipe, 0)}
        models |= {path.parent.name: load(path, data, recipe) for path in sorted((options.runs / name).glob("*/model"))}
        with contextlib.ExitStack() as stack:
            for model in models.values():
                stack.enter_context(evaluating(model))
            seconds = interleaved({k: partial(m, data.test_x[: options.batch]) for k, m in models.items()}, rounds=options.rounds)
        relative = {k: s / seconds["dense"] for k, s in seconds.items()}
        found = {"batch": options.batch, "dense_ms": 1e3 * seconds["dense"], "relative": relative}
        write_json(options.results / name / "latencies.json", found | provenance())
        print(name, {k: round(x, 3) for k, x in relative.items()})


if __name__ == "__main__":
    main(tyro.cli(Options))
