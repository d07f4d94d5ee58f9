"""The protocol of Alvarez & Salzmann 2017 on the nearest real data: Dec_3 on photographed characters, with rendered glyphs for training.

Four networks are trained with a proximal step at the end of each epoch: without a regularizer, with group sparsity (neurons), with low rank, with
both. Each is then cut at several shares of energy, without training after it. And the one with both is cut in mid-run, after one of several epochs,
and the small network trains on ("reload"): what does that save, and cost? One result file each; what is there is not run again.

    python experiments/paper.py [--threads 1] [--no-times]
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from laconic import Channels, Compressor, LowRank
from laconic.bench import claimed
from laconic.data import Dataset, load_dataset
from laconic.matricize import SPATIAL
from laconic.measure import count_macs, count_params, measure_latency
from laconic.methods import build, calibration, example
from laconic.methods.as_published import STRENGTH
from laconic.methods.base import Trained, after_step, start_afresh
from laconic.recipe import Recipe, load_recipe
from laconic.results import make_result, write_json
from laconic.training import accuracy, fit, make_optimizer, steps_per_epoch

RESULTS = Path(__file__).parent / "results" / "paper"
GROUPS = 0.06  # strength of the group lasso, where that of the nuclear norm is STRENGTH
FACTORS = (0.3, 1)  # of both: weakly and strongly pressed (a nuclear norm four times as strong leaves a network that guesses)
ENERGIES = (1.0, 0.99, 0.95, 0.9, 0.8)
RELOADS = (1, 3, 5)  # epochs after which the network is cut and trains on: of 8, where the paper has 5, 15, 25 of more
KEPT = 0.9  # the energy that it keeps then


@dataclass(frozen=True)
class Arguments:
    """How to run."""

    recipe: str = "paper-dec3"
    data: Path | None = None
    results: Path = RESULTS
    threads: int = 1
    times: bool = False


def regularizers(name: str, factor: float) -> list[Any]:
    ranks = LowRank.as_published(factor * STRENGTH, matricization=SPATIAL)
    groups = Channels.as_published(factor * GROUPS)
    return {"dense": [], "group sparsity": [groups], "low rank": [ranks], "both": [ranks, groups]}[name]


def press(model: nn.Module, optimizer: Any, name: str, factor: float, data: Dataset, recipe: Recipe) -> Compressor | None:
    structures = regularizers(name, factor)
    if not structures:
        return None
    return Compressor(model, optimizer, structures, every=steps_per_epoch(data, recipe), example_inputs=example(data))


def cut(model: nn.Module, data: Dataset, energy: float) -> Any:
    """In place: neurons that are dead go, every layer keeps this share of its energy."""
    structures = [LowRank.as_published(0.0, matricization=SPATIAL), Channels.as_published(0.0)]
    return Compressor(model, torch.optim.SGD(model.parameters(), 0.1), structures, example_inputs=example(data)).compact(
        energy=energy, calibration=calibration(data)
    )


def measured(model: nn.Module, data: Dataset, times: bool) -> dict[str, Any]:
    found = {"accuracy": accuracy(model, data.test_x, data.test_y), "params": count_params(model), "macs": count_macs(model, example(data))}
    return found | ({"latency_b64_ms": measure_latency(model, example(data, 64)).median_ms} if times else {})


def whole(name: str, factor: float, data: Dataset, recipe: Recipe, times: bool) -> tuple[Trained, dict[str, Any]]:
    """Trained to the end, then cut at each energy."""
    model = build(data, recipe, 0)
    optimizer = make_optimizer(model, recipe)
    compressor = press(model, optimizer, name, factor, data, recipe)
    curve = fit(model, data, recipe, 0, optimizer)
    if compressor is not None:
        compressor.detach()
    rows = []
    for energy in ENERGIES:
        small = copy.deepcopy(model)
        cut(small, data, energy)
        rows.append({"energy": energy, **measured(small, data, times)})
    return Trained(model, curve), measured(model, data, times) | {"energies": rows}


def reloaded(epoch: int, data: Dataset, recipe: Recipe, times: bool) -> tuple[Trained, dict[str, Any]]:
    """With both regularizers, weak, until this epoch, then cut, then trained on without them."""
    model = build(data, recipe, 0)
    optimizer = make_optimizer(model, recipe)
    compressor = press(model, optimizer, "both", FACTORS[0], data, recipe)
    assert compressor is not None

    def shrink() -> None:
        compressor.detach()
        cut(model, data, KEPT)
        start_afresh(optimizer, model, recipe)

    after_step(optimizer, epoch * steps_per_epoch(data, recipe), shrink)
    curve = fit(model, data, recipe, 0, optimizer)
    return Trained(model, curve), measured(model, data, times)


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe)
    data = load_dataset(recipe.task, arguments.data, recipe.train_limit or None, recipe.size)
    pressed = [(name, factor) for factor in FACTORS for name in ("group sparsity", "low rank", "both")]
    runs: dict[str, Any] = {"dense": lambda: whole("dense", 0, data, recipe, arguments.times)}
    runs |= {f"{name} x{factor}": lambda n=name, f=factor: whole(n, f, data, recipe, arguments.times) for name, factor in pressed}
    runs |= {f"reload {epoch}": lambda e=epoch: reloaded(e, data, recipe, arguments.times) for epoch in RELOADS}
    for name, run in runs.items():
        path = arguments.results / f"{name.replace(' ', '-')}.json"
        with claimed(path) as ours:
            if ours:
                trained, metrics = run()
                result = make_result(recipe, name, 0, metrics, trained)
                write_json(path, result)
                print(name, {k: v for k, v in metrics.items() if k != "energies"}, file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
