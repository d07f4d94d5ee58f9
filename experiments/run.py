"""Run what is not yet in experiments/results: every shipped recipe x method x seed, one JSON each.

Stop and restart at any moment: at most the run in hand is lost.

    python experiments/run.py [--recipes scene ...] [--methods dense ...] [--seeds 0 1 2] [--threads 1] [--no-times]
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from laconic.recipe import load_recipe, shipped_recipes
from laconic.results import result_path


@dataclass(frozen=True)
class Grid:
    """What to run."""

    recipes: tuple[str, ...] = tuple(shipped_recipes())
    methods: tuple[str, ...] = ("svd", "thin", "thin-long", "laconic")  # svd gives dense, too
    seeds: tuple[int, ...] = (0, 1, 2)
    results: Path = Path(__file__).parent / "results"
    data: Path | None = None
    threads: int = 0
    times: bool = True


def main(grid: Grid) -> None:
    for seed in grid.seeds:
        for recipe in grid.recipes:
            for method in grid.methods:
                if result_path(grid.results, load_recipe(recipe), method, seed).exists():
                    continue
                command = [sys.executable, "-m", "laconic", "train", recipe, "--method", method, "--seed", str(seed)]
                command += ["--results", str(grid.results), "--threads", str(grid.threads), "--times" if grid.times else "--no-times"]
                command += ["--data", str(grid.data)] if grid.data else []
                print(" ".join(command[2:]), flush=True)
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main(tyro.cli(Grid))
