"""Kill -9 a training run at random moments, resume it, and compare the end with that of the uninterrupted run, bit for bit.

The run is short, with several cuts, and saves a checkpoint at every other step, so that many kills hit a save. Each trial is
killed at one to three moments that are spread evenly over the run's time. Processes are forked from one that has imported
everything.

    python benchmarks/kills.py [--trials 100]
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import write

from laconic import cli
from laconic.checkpoint import read_tensors
from laconic.cli.shared import RUNNING
from laconic.data import load_dataset
from laconic.errors import CheckpointError
from laconic.running import RunCheckpoints

RECIPE = """
task = "digits"
widths = [8, 16, 16]
pools = [0, 1]
epochs = 4
lr = 3e-3
params = 0.35
"""


@dataclass(frozen=True)
class Options:
    """How many."""

    trials: int = 100
    seed: int = 0


def start(recipe: Path, out: Path) -> int:
    """The run in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            os.dup2(nothing.fileno(), 2)
            cli.train(str(recipe), out, resume=True, checkpoint_every=2, threads=1, times=False, json=True)
        os._exit(0)
    except BaseException:
        os._exit(1)


def whole_checkpoints(out: Path) -> tuple[int, int]:
    """How many named checkpoints can be read, and how many cannot."""
    checkpoints = RunCheckpoints(out / "killed" / "laconic-seed0" / RUNNING, torch.nn.Identity())
    good = bad = 0
    for step in checkpoints.steps():
        with contextlib.suppress(CheckpointError):
            checkpoints._check_settings = lambda *_: None  # type: ignore[method-assign]
            checkpoints._read(step)
            good += 1
            continue
        bad += 1
    return good, bad


def outcome(out: Path) -> dict[str, Any]:
    folder = out / "killed" / "laconic-seed0"
    result = json.loads((folder / "result.json").read_text())
    tensors = read_tensors(folder / "model")  # not the file: the order of its metadata is not fixed
    return {
        "model": {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in sorted(tensors.items())},
        "curve": {k: v for k, v in result["curve"].items() if k != "seconds"},
        "ranks": result["ranks"],
        "history": result["history"],
    }


def main(options: Options) -> None:
    torch.set_num_threads(1)
    load_dataset("digits")  # imports, before the forks
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["LACONIC_CACHE"] = str(root / "cache")
        recipe = root / "killed.toml"
        recipe.write_text(RECIPE)
        for _ in range(2):  # the second one has the layer times at hand
            begin = time.perf_counter()
            os.waitpid(start(recipe, root / "whole"), 0)
            seconds = time.perf_counter() - begin
        wanted = outcome(root / "whole")
        identical = kills = in_saves = lost = 0
        for trial in range(options.trials):
            out = root / f"trial{trial}"
            for part in range(1 + trial % 3):
                child = start(recipe, out)
                time.sleep(seconds * (trial + moments.random()) / options.trials / (1 + part))
                os.kill(child, signal.SIGKILL)
                if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                    kills += 1
                    running = out / "killed" / "laconic-seed0" / RUNNING
                    in_saves += any(running.glob(".step-*.tmp"))
                    lost += whole_checkpoints(out)[1]
            if not (out / "killed" / "laconic-seed0" / "result.json").exists() or (out / "killed" / "laconic-seed0" / RUNNING).exists():
                os.waitpid(start(recipe, out), 0)
            found = outcome(out)
            identical += found == wanted
            if found != wanted:
                print(f"trial {trial} differs in {', '.join(k for k in wanted if found[k] != wanted[k])}", file=sys.stderr)
        cuts = len({tuple(h["ranks"].items()) for h in wanted["history"]})
        row = {
            "trials": options.trials,
            "kills": kills,
            "kills_in_a_save": in_saves,
            "identical": identical,
            "damaged_checkpoints": lost,
            "run_seconds": seconds,
            "different_ranks_over_the_run": cuts,
        }
        print(row)
        write("kills", [row])


if __name__ == "__main__":
    main(tyro.cli(Options))
