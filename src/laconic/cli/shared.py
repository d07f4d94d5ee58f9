"""What the commands share: runs of a method with their progress, interrupts, and pages."""

from __future__ import annotations

import contextlib
import dataclasses
import json as jsonlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import checkpoint
from ..checks import check_choice, whole_number
from ..console import console, progress_bar
from ..data import Dataset
from ..errors import InvalidValueError, MissingExtraError
from ..methods import METHODS, Trained, cut_after_training
from ..recipe import Recipe
from ..report import CompactReport, layer_table, render
from ..results import machine, result_path, versions
from ..training import Restart, TrainingInterrupted

MOST_THREADS = 1024
MOST_SEED = 2**63 - 1  # PyTorch's
RUNNING = "running"  # the folder of a run's checkpoints


def check_method(method: str) -> None:
    check_choice("method", method, METHODS)


def check_seed(seed: int) -> None:
    whole_number("seed", seed, 0, MOST_SEED)


def check_threads(threads: int) -> None:
    """0 stands for as many as there would be."""
    whole_number("threads", threads, 0, MOST_THREADS)


def use_threads(threads: int) -> None:
    """So many of PyTorch; 0: as it is."""
    check_threads(threads)
    if threads:
        torch.set_num_threads(threads)


def runs(
    method: str, data: Dataset, recipe: Recipe, seed: int, out: Path, show: bool, every: int = 0, resume: bool = False
) -> Iterator[tuple[str, Trained]]:
    """Train by a method. `svd` starts from the dense network, so that one comes first, as a result of its own."""
    resumes = METHODS[method].resumes
    if resume and not resumes:
        raise InvalidValueError(f"--resume: the method {method} writes no running checkpoints: start it again without")
    names = ("dense", "svd") if method == "svd" else (method,)
    base: Trained | None = None
    for name in names:
        folder = result_path(out, recipe, name, seed).with_suffix("")
        if (there := any((folder / RUNNING).glob("step-*"))) != resume:
            console.print(
                f"{folder / RUNNING}: the checkpoints of an earlier run are removed (--resume would go on from them)"
                if there
                else f"{folder / RUNNING}: no checkpoint to resume from, starting from the beginning"
            )
        restart = Restart(folder / RUNNING, every, resume, {"recipe": dataclasses.asdict(recipe), "method": name, "seed": seed})
        with progress_bar(name, show and name != "svd") as report, interruptible(folder, resumes), told():
            base = cut_after_training(base, data, recipe) if base else METHODS[name].run(data, recipe, seed, report, restart)
        yield name, base


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Warnings as lines on the console."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: console.print(f"note: {message}")
        yield


@contextlib.contextmanager
def interruptible(folder: Path, resumes: bool) -> Iterator[None]:
    """On Ctrl-C: save the model as it is, say where, leave with status 130."""
    try:
        yield
    except TrainingInterrupted as error:
        place = checkpoint.save(error.model, folder / "interrupted")
        more = "; the same command with --resume goes on from the last running checkpoint" if resumes else ""
        console.print(f"{error}; the model as it is now: {place} (laconic.load reads it){more}")
        raise SystemExit(130) from None


def context(recipe: Recipe, seed: int) -> dict[str, Any]:
    return {"recipe": recipe.name, "seed": seed, **versions(), **machine()}


def write_page(path: Path, report: CompactReport, title: str, rows: list[dict[str, Any]] | None, about: dict[str, Any]) -> Path | None:
    """The HTML page; None, and a line that says why, where its extra is not installed."""
    try:
        page = render(report, title=title, comparison=rows, context=about)
    except MissingExtraError as error:
        console.print(f"no HTML page: {error}")
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    return path


def show_report(report: CompactReport) -> None:
    """What was done to each layer, and the notes: nothing stays unsaid."""
    Console().print(layer_table(report))
    for note in report.notes:
        print(f"note: {note}")


def show_json(content: Any) -> None:
    print(jsonlib.dumps(content))
