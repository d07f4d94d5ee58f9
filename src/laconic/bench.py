"""A grid of runs, recipe x method x seed: one result file each, written when it is whole.

The queue is the set of result files that are missing. So it can be stopped and started again at any moment, which loses at most the
run in hand, and several of them may work on one grid side by side (one core each): a run that is being worked on is claimed
by a lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .methods import METHODS
from .recipe import load_recipe, shipped_recipes
from .results import result_path


@dataclass(frozen=True, slots=True)
class Run:
    """One result to come. With a setting it is a trial: measured on held-out training images."""

    recipe: str
    method: str
    seed: int
    setting: float = 0.0

    def path(self, results: Path) -> Path:
        return result_path(results, dataclasses.replace(load_recipe(self.recipe), setting=self.setting), self.method, self.seed)


def grid(recipes: Iterable[str], methods: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """All runs, seed by seed: whenever it is stopped, what is there can be compared. `svd` gives dense, too."""
    methods = [m for m in methods if m != "dense" or "svd" not in methods]
    return [Run(recipe, method, seed) for seed, recipe, method in itertools.product(seeds, recipes, methods)]


def self_contained(tier: str) -> tuple[str, ...]:
    """The shipped recipes of a tier that need no weights of another run."""
    return tuple(name for name in shipped_recipes() if (recipe := load_recipe(name)).tier == tier and not recipe.init)


def trials(recipes: Iterable[str], methods: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """As many for every method that has something to set."""
    return [
        Run(recipe, method, seed, setting)
        for seed, recipe, method in itertools.product(seeds, recipes, methods)
        for setting in METHODS[method].settings
    ]


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this result is ours to make: False where it is there, or where another process is making it.

    The claim is a lock of the operating system, which lets go of it with the process, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.claim"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield not path.exists()
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def execute(run: Run, results: Path, options: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own, so that threads and memory are as fresh as those of every other run."""
    command = [sys.executable, "-m", "laconic", "train", run.recipe, "--method", run.method, "--seed", str(run.seed)]
    if run.setting:
        command += ["--setting", str(run.setting), "--validation"]
    return subprocess.run(
        [*command, "--results", str(results), "--json", *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )


def summary(results: Path, recipe: str) -> list[dict[str, Any]]:
    """A row for each method (and setting that was tried) with results: means over its seeds, and the sample standard deviation of the accuracy."""
    rows = []
    folder = results / load_recipe(recipe).name
    for name, method in METHODS.items():
        for setting in ("", *(f"-{s:g}" for s in method.settings)):
            found = [json.loads(p.read_text())["metrics"] for p in sorted(folder.glob(f"{name}{setting}-seed*.json"))]
            if found:
                rows.append(_means(f"{method.label} {setting[1:]}".strip(), found))
    return rows


def _means(label: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    keys = [k for k in found[0] if all(isinstance(m.get(k), (int, float)) for m in found)]
    row: dict[str, Any] = {key: statistics.mean(m[key] for m in found) for key in keys}
    row |= {key: round(row[key]) for key in ("params", "macs", "file_bytes") if key in row}
    row["method"] = f"{label}, {len(found)} seeds" if len(found) > 1 else label
    row["accuracy_spread"] = statistics.stdev(m["accuracy"] for m in found) if len(found) > 1 else None
    return row
