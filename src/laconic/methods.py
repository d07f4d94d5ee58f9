"""The methods that the demo and the experiments compare: one function each, same data, same steps, same optimizer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .budget import Budget
from .checkpoint import load_weights
from .compaction import compress
from .compressor import Compressor
from .data import Dataset
from .errors import RecipeError, missing_extra, nearest
from .measure import count_params, evaluating
from .models import ConvNet, thin_widths
from .penalties import LogSum
from .recipe import Recipe
from .report import CompactReport
from .schedule import Schedule
from .structures import Channels, LowRank, Structure
from .training import Curve, Report, Restart, fit, make_optimizer, steps_per_epoch


@dataclass(slots=True)
class Trained:
    """A trained model, how training went, and what compaction did (None where there was none)."""

    model: nn.Module
    curve: Curve
    report: CompactReport | None = None
    notes: list[str] = field(default_factory=list)
    total_steps: int | None = None


def build(data: Dataset, recipe: Recipe, seed: int, widths: tuple[int, ...] | None = None) -> ConvNet:
    """The recipe's network, initialised from the seed or (unless other widths are asked for) from the recipe's weights."""
    torch.manual_seed(seed)
    model = ConvNet(data.train_x.shape[1], data.classes, widths or recipe.widths, recipe.pools)
    if recipe.init and widths is None:
        load_weights(model, Path(recipe.init))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on CPU
    return model


def example(data: Dataset) -> tuple[torch.Tensor]:
    """One image: MACs are then those of one image."""
    return (data.test_x[:1],)


def calibration(data: Dataset) -> list[torch.Tensor]:
    """Inputs for BatchNorm re-estimation: 2,048 training images, without augmentation."""
    return list(data.train_x[:2048].split(256))


def dense(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """The network as it is."""
    model = build(data, recipe, seed)
    return Trained(model, fit(model, data, recipe, seed, make_optimizer(model, recipe), report=report, restart=restart))


def svd(
    data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None, trained: Trained | None = None
) -> Trained:
    """The dense network, cut after training by the same global rule; BatchNorm re-estimated, no training after it.

    `trained`: a dense network to take instead of training one; it is changed.
    """
    base = trained or dense(data, recipe, seed, report, restart)
    done = compress(
        base.model, LowRank(matricization=recipe.matricization), Budget(params=recipe.params),
        example_inputs=example(data), calibration=calibration(data),
    )  # fmt: skip
    return Trained(base.model, base.curve, done)


def thin_long(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """The thin network again, for `recipe.thin_epochs`: about the training time of laconic, not its number of steps."""
    return thin(data, recipe, seed, report, restart, recipe.thin_epochs or 2 * recipe.epochs)


def thin(
    data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None, epochs: int | None = None
) -> Trained:
    """A dense network with all widths scaled down to the budget, for the same steps (or for `epochs`)."""
    model = thin_network(data, recipe, seed)
    curve = fit(model, data, recipe, seed, make_optimizer(model, recipe), report=report, epochs=epochs, restart=restart)
    return Trained(model, curve, notes=[f"widths {model.widths}, {len(curve.loss)} epochs"])


def thin_network(data: Dataset, recipe: Recipe, seed: int) -> ConvNet:
    """The recipe's network with all widths scaled down to its budget."""
    whole = sum(p.numel() for p in build(data, recipe, seed).parameters())
    widths = thin_widths(data.train_x.shape[1], data.classes, recipe.widths, int(recipe.params * whole))
    return build(data, recipe, seed, tuple(widths))


def laconic(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """Pressure towards the budget while training, cut in mid-run or at the end."""
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    compressor = compressor_for(model, optimizer, data, recipe)
    curve = fit(model, data, recipe, seed, optimizer, report=report, compressor=compressor, restart=restart)
    late = recipe.settle >= 1
    done = compressor.compact(calibration=calibration(data) if late else None, only_faster=recipe.only_faster and late)
    return Trained(model, curve, done, total_steps=compressor.total_steps)


def compressor_for(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, recipe: Recipe, budget: Budget | None = None
) -> Compressor:
    """The compressor that the recipe describes, for its budget or another one."""
    return Compressor(
        model,
        optimizer,
        structures_of(recipe),
        budget=budget or Budget(params=recipe.params, macs=recipe.macs or None),
        total_steps=recipe.epochs * steps_per_epoch(data, recipe),
        example_inputs=example(data),
        cut="early" if recipe.settle < 1 else "end",
        schedule=Schedule(warmup=recipe.warmup, settle=recipe.settle),
    )


def structures_of(recipe: Recipe) -> list[Structure]:
    """What the recipe lets laconic use."""
    options: dict[str, Any] = {"penalty": LogSum(recipe.penalty_epsilon), "strength": recipe.strength or None}
    known: dict[str, Callable[[], Structure]] = {
        "low-rank": lambda: LowRank(matricization=recipe.matricization, **options),
        "channels": lambda: Channels(**options),
    }
    for name in recipe.structures:
        if name not in known:
            raise RecipeError(f"recipe: structures = {name!r} is unknown{nearest(name, known)}")
    return [known[name]() for name in recipe.structures]


def low_rank(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """laconic with ranks alone."""
    return laconic(data, dataclasses.replace(recipe, structures=("low-rank",)), seed, report, restart)


def channels(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """laconic with neurons alone."""
    return laconic(data, dataclasses.replace(recipe, structures=("channels",)), seed, report, restart)


def late(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """Ranks alone, dense to the end under pressure, and cut last; BatchNorm re-estimated, no training after it."""
    return laconic(data, dataclasses.replace(recipe, settle=1.0, structures=("low-rank",)), seed, report, restart)


def torch_pruning(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """Torch-Pruning's GroupNormPruner (DepGraph, CVPR 2023), as its examples use it: sparse learning (regularised gradients),
    then pruning to the budget by group norms, then fine-tuning for the rest of the run.

    A pruned parameter is a new one, so the optimizer goes on without a state. It cannot resume: the run starts afresh.
    """
    try:
        import torch_pruning as tp
    except ImportError:
        raise missing_extra("torch-pruning", "rivals", "the method torch-pruning") from None
    del restart
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    limit = int(recipe.params * count_params(model))
    last = round(recipe.torch_pruning_at * recipe.epochs * steps_per_epoch(data, recipe))  # step of sparse learning
    with evaluating(model), torch.enable_grad():
        pruner = tp.pruner.GroupNormPruner(
            model, example(data)[0], importance=tp.importance.GroupMagnitudeImportance(p=2), reg=recipe.torch_pruning_reg,
            global_pruning=recipe.torch_pruning_global, pruning_ratio=1.0, max_pruning_ratio=0.95, iterative_steps=400, ignored_layers=[model.head],
            in_channel_groups={}, out_channel_groups={}, num_heads={},
        )  # fmt: skip
    begun, done = itertools.count(1), itertools.count(1)

    def press(*_: Any) -> None:
        if next(begun) <= last:
            pruner.regularize(model)

    def prune(*_: Any) -> None:
        if next(done) != last:
            return
        while count_params(model) > limit:
            pruner.step()
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer.state.clear()
        for group, fresh in zip(optimizer.param_groups, make_optimizer(model, recipe).param_groups, strict=True):
            group["params"] = fresh["params"]

    optimizer.register_step_pre_hook(press)
    optimizer.register_step_post_hook(prune)
    curve = fit(model, data, recipe, seed, optimizer, report=report)
    return Trained(model, curve, notes=[f"torch-pruning {tp.__version__}, reg {recipe.torch_pruning_reg}, pruned at step {last}"])


METHODS: dict[str, Callable[..., Trained]] = {
    "dense": dense,
    "svd": svd,
    "thin": thin,
    "thin-long": thin_long,
    "late": late,
    "torch-pruning": torch_pruning,
    "low-rank": low_rank,
    "channels": channels,
    "laconic": laconic,
}
