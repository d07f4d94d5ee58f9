"""Results of runs: measured the same way for every method, stored as self-describing JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .checkpoint import TENSORS, save
from .data import Dataset
from .measure import count_macs, count_params, measure_latency
from .methods import Trained, example
from .recipe import Recipe
from .training import accuracy, bits


def evaluate(trained: Trained, data: Dataset, times: bool = True) -> dict[str, Any]:
    """The metrics of one run. `times=False` leaves all times out: for runs that do not have the machine alone."""
    model = trained.model
    with tempfile.TemporaryDirectory() as folder:
        size = (save(model, Path(folder) / "model") / TENSORS).stat().st_size
    metrics: dict[str, Any] = {
        "accuracy": accuracy(model, data.test_x, data.test_y),
        "bits": bits(model, data.test_x, data.test_y),
        "params": count_params(model),
        "macs": count_macs(model, example(data)),
        "file_bytes": size,
        "epochs": len(trained.curve.loss),
    }
    if times:
        for batch in (1, 64):
            latency = measure_latency(model, (data.test_x[:batch].to(data.device),))
            metrics[f"latency_b{batch}_ms"] = latency.median_ms
            metrics[f"latency_b{batch}_spread_ms"] = latency.spread_ms
        metrics["train_seconds"] = trained.curve.seconds[-1]
    return metrics


def provenance() -> dict[str, Any]:
    """What a result was made with and on: part of every result file."""
    commit, dirty = repository_state()
    return {"versions": versions(), "commit": commit, "dirty": dirty, "machine": machine()}


def make_result(
    recipe: Recipe, method: str, seed: int, metrics: dict[str, Any], trained: Trained, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """A result file's content; `notes` on the data."""
    return {
        "task": recipe.task,
        "method": method,
        "budget": {} if method == "dense" else {k: v for k in ("params", "macs", "latency") if (v := getattr(recipe, k))},
        "seed": seed,
        "metrics": metrics,
        "curve": dataclasses.asdict(trained.curve),
        "ranks": {x.name: x.rank for x in trained.report.layers} if trained.report else {},
        "total_steps": trained.total_steps,
        "history": [dataclasses.asdict(h) for h in trained.report.history] if trained.report else [],
        "notes": [*notes, *trained.notes, *(trained.report.notes if trained.report else ())],
        "recipe": dataclasses.asdict(recipe),
        **provenance(),
    }


def result_path(root: Path, recipe: Recipe, method: str, seed: int) -> Path:
    setting = f"-{recipe.setting:g}" if recipe.setting else ""
    return root / recipe.name / f"{method}{setting}-seed{seed}.json"


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(fresh, path)


def versions() -> dict[str, str]:
    found = {"laconic": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "safetensors"):
        found[package] = metadata.version(package)
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and threads: what times depend on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
    }


def repository_state() -> tuple[str | None, bool | None]:
    """Commit of the working directory and whether tracked files were changed; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, bool(changes.strip())
