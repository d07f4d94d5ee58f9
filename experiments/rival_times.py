"""The training time of every rival relative to dense, with the machine to itself: each is trained at a part of its epochs, dense before and after it.

Everything that a method does in its loop is in its time (decompositions, teachers, pruners). Those that cut a trained dense network take dense's time.
It writes `results/<recipe>/rival-times.json`.

    python experiments/rival_times.py --recipes scene-tenth
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from laconic.data import load_dataset
from laconic.methods import METHODS
from laconic.recipe import load_recipe
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
    "laconic",
}  # in times.py, or dense's


@dataclass(frozen=True)
class Options:
    """What to time."""

    recipes: tuple[str, ...] = ("scene-tenth",)
    results: Path = Path(__file__).parent / "results"
    data: Path | None = None
    part: float = 0.2


def main(options: Options) -> None:
    for name in options.recipes:
        recipe = load_recipe(name)
        data = load_dataset(recipe.task, options.data, recipe.train_limit or None, recipe.size)
        recipe = dataclasses.replace(recipe, epochs=max(2, math.ceil(options.part * recipe.epochs)))

        def seconds(method: str, recipe=recipe, data=data) -> float:  # type: ignore[no-untyped-def]
            return METHODS[method].run(data, recipe, 0).curve.seconds[-1]

        seconds("dense")  # warm
        before, relative = seconds("dense"), {}
        for method in METHODS:
            if method not in ELSEWHERE:
                mine = seconds(method)
                after = seconds("dense")
                relative[method] = mine / statistics.mean((before, after))
                before = after
                print(f"{method}: {relative[method]:.2f}", file=sys.stderr)
        write_json(options.results / name / "rival-times.json", {"epochs": recipe.epochs, "relative": relative, **provenance()})


if __name__ == "__main__":
    main(tyro.cli(Options))
