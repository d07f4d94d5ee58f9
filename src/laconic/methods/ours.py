"""laconic: the network shrinks towards the budget while it trains; with both structures, with one, without pressure, cut last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..budget import Budget
from ..compressor import Compressor
from ..data import Dataset
from ..distributed import world_size
from ..errors import RecipeError, nearest
from ..penalties import LogSum
from ..recipe import Recipe
from ..schedule import Schedule
from ..structures import Channels, LowRank, Structure
from ..training import Report, Restart, fit, make_optimizer, steps_per_epoch
from .base import Method, Trained, build, calibration, example

OF_STRUCTURES = ("penalty_epsilon", "strength", "matricization")


def train(
    data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None, **options: Any
) -> Trained:
    """Pressure towards the budget while training, cut in mid-run or at the end; `options`: of `compressor_for`."""
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    compressor = compressor_for(model, optimizer, data, recipe, **options)
    curve = fit(model, data, recipe, seed, optimizer, report=report, compressor=compressor, restart=restart)
    late = recipe.settle >= 1
    done = compressor.compact(calibration=calibration(data) if late else None, only_faster=recipe.only_faster and late)
    return Trained(model, curve, done, total_steps=compressor.total_steps)


def compressor_for(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, recipe: Recipe, budget: Budget | None = None, **options: Any
) -> Compressor:
    """The compressor that the recipe describes, for its budget or another one; `options` go before what the recipe says."""
    budget = budget or Budget(params=recipe.params, macs=recipe.macs or None, latency=recipe.latency or None)
    defaults: dict[str, Any] = {
        "structures": structures_of(recipe, budget.multiple),
        "budget": budget,
        "total_steps": recipe.epochs * steps_per_epoch(data, recipe),
        "example_inputs": example(data, 64 if recipe.latency else 1),
        "cut": "early" if recipe.settle < 1 else "end",
        "schedule": Schedule(warmup=recipe.warmup, settle=recipe.settle) if recipe.settle else None,
        "rebuild": (lambda _: None) if world_size() > 1 else None,  # the loop wraps the model anew
    }
    return Compressor(model, optimizer, **(defaults | options))


def structures_of(recipe: Recipe, multiple: int = 1) -> list[Structure] | None:
    """What the recipe lets laconic use, in these multiples; None: what it chooses by itself."""
    if not recipe.structures:
        for field in dataclasses.fields(recipe):
            if field.name in OF_STRUCTURES and (value := getattr(recipe, field.name)) != field.default:
                raise RecipeError(
                    f"recipe: {field.name} = {value!r} has no effect where laconic chooses its structures by itself: name them, "
                    'such as structures = ["low-rank", "channels-optional"]'
                )
        return None
    options: dict[str, Any] = {"penalty": LogSum(recipe.penalty_epsilon), "strength": recipe.strength or None}
    known: dict[str, Callable[[], Structure]] = {
        "low-rank": lambda: LowRank(matricization=recipe.matricization, multiple=multiple, **options),
        "channels": lambda: Channels(multiple=multiple, **options),
        "channels-even": lambda: Channels(multiple=multiple if multiple > 1 else None, even=True, **options),
        "channels-optional": lambda: Channels(multiple=multiple, optional=multiple == 1, **options),
    }
    for name in recipe.structures:
        if name not in known:
            raise RecipeError(f"recipe: structures = {name!r} is unknown{nearest(name, known)}")
    return [known[name]() for name in recipe.structures]


def unpressed(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """No proximal step moves a weight; cuts on the way come as they do under pressure, by the spectra that training alone leaves."""
    model = build(data, recipe, seed)
    chosen = compressor_for(model, make_optimizer(model, recipe), data, recipe).structures
    return train(data, recipe, seed, report, restart, structures=[dataclasses.replace(s, strength=0.0) for s in chosen])


def with_recipe(label: str, **changes: Any) -> Method:
    """The same with other entries of the recipe."""

    def changed(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
        return train(data, dataclasses.replace(recipe, **changes), seed, report, restart)

    return Method(label, changed)


LACONIC = Method("laconic", train)
LOW_RANK = with_recipe("ranks alone", structures=("low-rank",))
BOTH = with_recipe("both, always", structures=("low-rank", "channels"))
CHANNELS = with_recipe("neurons alone", structures=("channels",))
UNPRESSED = Method("laconic without pressure", unpressed)
# Ranks alone: neurons that go at the end are not repaired by any training. BatchNorm is re-estimated.
LATE = with_recipe("ranks alone, cut last", structures=("low-rank",), settle=1.0)
