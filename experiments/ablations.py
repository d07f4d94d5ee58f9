"""What each part of laconic is worth: one thing is changed at a time, all others are as a user gets them, with both structures throughout.

A queue, like `laconic bench`: what is missing is run, one small result file for each variant and seed, test accuracy.

    python experiments/ablations.py [--recipe scene-tenth] [--seeds 0 1 2] [--threads 1]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro

import laconic.compressor
from laconic import L1, Channels, Hoyer, LogSum, LowRank, Schedule
from laconic.bench import claimed
from laconic.data import load_dataset
from laconic.measure import count_params
from laconic.methods import build, compressor_for
from laconic.methods.base import Trained
from laconic.recipe import Recipe, load_recipe
from laconic.results import make_result, write_json
from laconic.training import accuracy, fit, make_optimizer, steps_per_epoch

RESULTS = Path(__file__).parent / "results" / "ablations"
Options = Callable[[Recipe, int], dict[str, Any]]


def penalty(make: Callable[[], Any]) -> Options:
    return lambda recipe, steps: {"structures": [LowRank(penalty=make(), matricization=recipe.matricization), Channels(penalty=make())]}


def schedule(warmup: float, settle: float) -> Options:
    return lambda recipe, steps: DEFAULT(recipe, steps) | {"schedule": Schedule(warmup=warmup, settle=settle)}


def every(interval: int | None) -> Options:
    """None: an epoch."""
    return lambda recipe, steps: DEFAULT(recipe, steps) | {"every": interval or steps}


def unfolding(name: str) -> Options:
    return lambda recipe, steps: {
        "structures": [
            LowRank(penalty=LogSum(recipe.penalty_epsilon), matricization=name),
            Channels(penalty=LogSum(recipe.penalty_epsilon)),
        ]
    }


def scale(name: str) -> Options:
    return lambda recipe, steps: {
        "structures": [
            LowRank(penalty=LogSum(recipe.penalty_epsilon), matricization=recipe.matricization, scale=name),
            Channels(penalty=LogSum(recipe.penalty_epsilon), scale=name),
        ]
    }


DEFAULT = penalty(lambda: LogSum(0.1))
FACTORS: dict[str, dict[str, Options]] = {
    "penalty": {
        "none": lambda recipe, steps: {"structures": [LowRank(strength=0.0), Channels(strength=0.0)]},
        "L1": penalty(L1), "Hoyer": penalty(Hoyer), "LogSum 0.01": penalty(lambda: LogSum(0.01)), "LogSum 0.1": DEFAULT, "LogSum 1": penalty(lambda: LogSum(1.0)),
    },
    "strength: final gap": {"0.01": DEFAULT, "0.1": DEFAULT, "1": DEFAULT},
    "steps between proximal steps": {
        "1": every(1), "10": every(10), "16 rounds": DEFAULT,
        "50": every(50), "an epoch": every(None),
    },
    "warm-up": {"0": schedule(0.0, 0.35), "0.1": DEFAULT, "0.2": schedule(0.2, 0.35)},
    "settled from": {"0.2": schedule(0.1, 0.2), "0.35": DEFAULT, "0.5": schedule(0.1, 0.5), "0.8": schedule(0.1, 0.8)},
    "unfolding": {"out,in*kh*kw": DEFAULT, "out*kh,in*kw": unfolding("out*kh,in*kw"), "auto": unfolding("auto")},
    "weighted by cost": {"yes": DEFAULT, "no": DEFAULT},
    "unit of a threshold": {"relative": DEFAULT, "absolute": scale("absolute")},
    "cuts": {"on the way": DEFAULT, "once, when it settles": DEFAULT},
}  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    recipe: str = "scene-tenth"
    seeds: tuple[int, ...] = (0, 1, 2)
    data: Path | None = None
    results: Path = RESULTS
    threads: int = 1


def train(factor: str, variant: str, recipe: Recipe, data: Any, seed: int) -> Trained:
    """One run with one thing changed."""
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    with mock.patch.object(
        laconic.compressor,
        "cost_weights",
        equal_weights if (factor, variant) == ("weighted by cost", "no") else laconic.compressor.cost_weights,
    ):
        compressor = compressor_for(model, optimizer, data, recipe, **FACTORS[factor][variant](recipe, steps_per_epoch(data, recipe)))
    controller = compressor.state.controller
    if factor == "strength: final gap" and controller is not None:
        controller.final_gap = float(variant)
    limits = (
        {"FIRST_CUT": 0.0, "FIRST_CUT_UNMEASURED": 0.0, "NEXT_SLIM": 0.0} if (factor, variant) == ("cuts", "once, when it settles") else {}
    )
    with mock.patch.multiple(laconic.compressor, **limits) if limits else mock.patch.dict({}):
        curve = fit(model, data, recipe, seed, optimizer, compressor=compressor)
    return Trained(model, curve, compressor.compact(), [f"{factor}: {variant}"], compressor.total_steps)


def equal_weights(plan: Any, budget: Any) -> dict[str, float]:
    return dict.fromkeys([s.name for s in plan.sites] + [g.name for g in plan.neurons], 1.0)


def path_of(results: Path, recipe: str, factor: str, variant: str, seed: int) -> Path:
    """The default is one run for all factors."""
    name = "default" if FACTORS[factor][variant] is DEFAULT and variant == DEFAULTS[factor] else f"{factor}-{variant}"
    return results / recipe / f"{file_name(name)}-seed{seed}.json"


def file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name)


DEFAULTS = {
    "penalty": "LogSum 0.1", "strength: final gap": "0.1", "steps between proximal steps": "16 rounds", "warm-up": "0.1",
    "settled from": "0.35", "unfolding": "out,in*kh*kw", "weighted by cost": "yes", "unit of a threshold": "relative",
    "cuts": "on the way",
}  # fmt: skip


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe)
    data = load_dataset(recipe.task, arguments.data, recipe.train_limit or None, recipe.size)
    for seed in arguments.seeds:
        for factor, variants in FACTORS.items():
            for variant in variants:
                path = path_of(arguments.results, arguments.recipe, factor, variant, seed)
                with claimed(path) as ours:
                    if not ours:
                        continue
                    trained = train(factor, variant, recipe, data, seed)
                    metrics = {"accuracy": accuracy(trained.model, data.test_x, data.test_y), "params": count_params(trained.model)}
                    result = make_result(recipe, "laconic", seed, metrics, trained) | {"factor": factor, "variant": variant}
                    write_json(path, {k: v for k, v in result.items() if k not in ("history", "curve")})
                    print(f"{factor}: {variant}, seed {seed}: {100 * metrics['accuracy']:.2f} %", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
