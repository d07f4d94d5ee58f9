"""Torch-Pruning's GroupNormPruner (DepGraph, CVPR 2023): the package itself."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..data import Dataset
from ..errors import missing_extra
from ..measure import count_params, evaluating
from ..recipe import Recipe
from ..training import Report, Restart, fit, make_optimizer, steps_per_epoch
from .base import Method, Trained, build, example


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
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


TORCH_PRUNING = Method("Torch-Pruning", train)
