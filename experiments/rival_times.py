"""The training time of every rival relative to dense: each is trained at a part of its epochs, on one thread, dense before and after it.

Everything that a method does in its loop is in its time (decompositions, teachers, pruners). What it does once in a run of any length, such as a cut, is in the
longest steps (`ONCE` of them, one if not named): what they take beyond the median of the steps around counts as it is, all else is scaled by the epochs.
Those that cut a trained dense network take dense's time.

It adds each method to `results/<recipe>/rival-times.json` as it is measured, and goes on with those that are missing.

    taskset -c 1 python experiments/rival_times.py --recipes scene-tenth
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from laconic.data import Dataset, load_dataset
from laconic.methods import METHODS
from laconic.recipe import Recipe, load_recipe
from laconic.results import provenance, write_json

ELSEWHERE = {
    "dense",
    "svd",
    "svd-energy",
    "svd-activation",
    "thin",
    "thin-long",
    "low-rank",
    "channels",
    "both",
    "laconic",
}  # times.py, or dense's
ONCE = {"lc": 31, "magnitude": 20, "cuttlefish": 61, "late": 16}  # C steps and a cut; rounds; looks and a cut; proximal steps
NEAR = 5  # steps on each side


@dataclass(frozen=True)
class Options:
    """What to time."""

    recipes: tuple[str, ...] = ("scene-tenth",)
    methods: tuple[str, ...] = tuple(m for m in METHODS if m not in ELSEWHERE)
    results: Path = Path(__file__).parent / "results"
    data: Path | None = None
    part: float = 0.1


def seconds(method: str, data: Dataset, recipe: Recipe, whole: int) -> float:
    """Of a run of `whole` epochs, from one of those of the recipe."""
    spent = [0.0]
    total = METHODS[method].run(data, recipe, 0, lambda progress: spent.append(progress.seconds)).curve.seconds[-1]  # a teacher's is in it
    steps = [b - a for a, b in itertools.pairwise(spent)]
    beyond = sorted(t - statistics.median(steps[max(0, n - NEAR) : n + NEAR + 1]) for n, t in enumerate(steps))
    once = sum(beyond[-ONCE.get(method, 1) :])
    return (total - once) * whole / recipe.epochs + once


def main(options: Options) -> None:
    torch.set_num_threads(1)
    for name in options.recipes:
        recipe = load_recipe(name)
        data = load_dataset(recipe.task, options.data, recipe.train_limit or None, recipe.size)
        short = dataclasses.replace(recipe, epochs=max(2, math.ceil(options.part * recipe.epochs)))
        path = options.results / name / "rival-times.json"
        found = json.loads(path.read_text()) if path.exists() else {"relative": {}}
        if missing := [m for m in options.methods if m not in found["relative"]]:
            seconds("dense", data, short, recipe.epochs)  # warm
            before = seconds("dense", data, short, recipe.epochs)
            for method in missing:
                mine = seconds(method, data, short, recipe.epochs)
                after = seconds("dense", data, short, recipe.epochs)
                found["relative"][method] = mine / statistics.mean((before, after))
                before = after
                print(f"{method}: {found['relative'][method]:.2f}", file=sys.stderr)
                write_json(path, {"epochs": short.epochs, "relative": found["relative"], **provenance()})


if __name__ == "__main__":
    main(tyro.cli(Options))
