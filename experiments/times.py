"""The timing pass: step times and latencies of the networks of finished results, with the machine to itself.

Runs that share the machine store no times (`--no-times`). This script rebuilds, for each recipe, the networks of its
seed-0 results (dense, thin, and cut to the ranks that were found), lets them take turns, and writes
`results/<recipe>/times.json`. Training time of laconic = dense steps before the cut + proximal steps + steps of the cut
network after it.

    python experiments/times.py [--recipes scene ...]
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from common import interleaved

from laconic.data import Dataset, load_dataset
from laconic.matricize import choose_unfolding
from laconic.measure import evaluating
from laconic.methods import build
from laconic.models import thin_widths
from laconic.recipe import Recipe, load_recipe, shipped_recipes
from laconic.results import machine, repository_state, result_path, versions, write_json
from laconic.solvers import spectral_prox
from laconic.structures import InUnits, LowRank
from laconic.surgery.factorize import factorize
from laconic.surgery.record import put
from laconic.training import make_optimizer, steps_per_epoch


@dataclass(frozen=True)
class Options:
    """What to time."""

    recipes: tuple[str, ...] = tuple(shipped_recipes())
    results: Path = Path(__file__).parent / "results"
    data: Path | None = None


def networks(data: Dataset, recipe: Recipe, results: Path) -> dict[str, nn.Module]:
    """Dense, thin and cut, untrained: values do not matter for time."""
    dense = build(data, recipe, 0)
    cut = copy.deepcopy(dense)
    for name, rank in json.loads(result_path(results, recipe, "laconic", 0).read_text())["ranks"].items():
        if rank is not None:
            layer = dense.get_submodule(name)
            put(cut, name, factorize(layer, choose_unfolding(layer, recipe.matricization), rank))
    widths = thin_widths(
        data.train_x.shape[1], data.classes, recipe.widths, int(recipe.params * sum(p.numel() for p in dense.parameters()))
    )
    return {"dense": dense, "laconic": cut, "thin": build(data, recipe, 0, tuple(widths))}


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def prox_round(model: nn.Module) -> None:
    """The proximal steps of one round, on copies."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            spectral_prox(parameter.detach().flatten(1), InUnits(LowRank().penalty, 1.0), 1e-3)


def time_recipe(name: str, options: Options) -> dict[str, Any]:
    recipe = load_recipe(name)
    data = load_dataset(recipe.task, options.data, recipe.train_limit or None)
    models = networks(data, recipe, options.results)
    x, y = data.train_x[: recipe.batch_size], data.train_y[: recipe.batch_size]
    steps = interleaved(
        {k: partial(training_step, m.train(), make_optimizer(m, recipe), x, y) for k, m in models.items()}, rounds=15, seconds=0.4
    )
    prox = interleaved({"prox": partial(prox_round, models["dense"])}, rounds=7)["prox"]
    total = recipe.epochs * steps_per_epoch(data, recipe)
    every = max(1, min(20, total // 50))
    rounds = (recipe.cut - recipe.warmup) * total / every
    seconds = {
        "dense": total * steps["dense"],
        "svd": total * steps["dense"],
        "thin": total * steps["thin"],
        "thin-long": (recipe.thin_epochs or 2 * recipe.epochs) * steps_per_epoch(data, recipe) * steps["thin"],
        "laconic": recipe.cut * total * steps["dense"] + rounds * prox + (1 - recipe.cut) * total * steps["laconic"],
    }
    latencies = {}
    for batch in (1, 64):
        for model in models.values():
            model.eval()
        with evaluating(models["dense"]), torch.no_grad():
            latencies[f"latency_b{batch}_ms"] = {
                k: 1e3 * v for k, v in interleaved({k: partial(m, data.test_x[:batch]) for k, m in models.items()}, rounds=21).items()
            }
    commit, dirty = repository_state()
    return {
        "step_ms": {k: 1e3 * v for k, v in steps.items()},
        "prox_ms": 1e3 * prox,
        "train_seconds": seconds,
        **latencies,
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
        "machine": machine(),
    }


def main(options: Options) -> None:
    for name in options.recipes:
        found = time_recipe(name, options)
        write_json(options.results / name / "times.json", found)
        print(name, json.dumps({k: found[k] for k in ("step_ms", "prox_ms", "train_seconds", "latency_b1_ms", "latency_b64_ms")}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
