"""Torch-Pruning (DepGraph, CVPR 2023), the package itself: its group-norm pruner with sparse learning, and Taylor importances.

Train (the group-norm pruner regularises the gradients meanwhile), prune to the budget at a share of the run, train on, as its examples do.
A pruned parameter is a new one, so the optimizer goes on without a state.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from ..data import Dataset
from ..errors import InfeasibleBudgetError, missing_extra
from ..measure import count_params, evaluating
from ..models.transformers import Block
from ..recipe import Recipe
from ..training import Report, cross_entropy, make_optimizer, steps_per_epoch
from .base import Method, Trained, build, cut_and_train_on, cut_share, example, sample

TAYLOR_AT = 0.2  # setting of Taylor importances: the share of the run at which it is pruned
SCORED = 512  # training images whose loss gives the gradients of the Taylor importances


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, taylor: bool = False) -> Trained:
    try:
        import torch_pruning as tp
    except ImportError:
        raise missing_extra("torch-pruning", "rivals", "the methods torch-pruning and torch-pruning-taylor") from None
    model = build(data, recipe, seed)
    optimizer = make_optimizer(model, recipe)
    limit = int(recipe.params * count_params(model))
    share = cut_share(recipe, TAYLOR_AT) if taylor else recipe.setting or recipe.torch_pruning_at
    last = round(share * recipe.epochs * steps_per_epoch(data, recipe))
    options: dict[str, Any] = {
        "importance": tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2),
        "global_pruning": recipe.torch_pruning_global, "pruning_ratio": 1.0, "max_pruning_ratio": 0.95, "iterative_steps": 400,
        "ignored_layers": [model.head], "in_channel_groups": {}, "out_channel_groups": {}, "num_heads": heads_of(model),
        "unwrapped_parameters": [(p, p.ndim - 1) for p in model.parameters(recurse=False)],
    }  # fmt: skip
    with evaluating(model), torch.enable_grad():
        if taylor:
            pruner = tp.pruner.BasePruner(model, example(data)[0], **options)
        else:
            pruner = tp.pruner.GroupNormPruner(model, example(data)[0], reg=recipe.torch_pruning_reg, **options)
    begun = itertools.count(1)

    def press(*_: Any) -> None:
        if next(begun) <= last:
            pruner.regularize(model)

    def prune() -> None:
        if taylor:
            optimizer.zero_grad()
            scored = sample(data, SCORED)
            cross_entropy(model(data.train_x[scored].to(data.device)), data.train_y[scored].to(data.device)).backward()
        while (before := count_params(model)) > limit:
            pruner.step()
            if count_params(model) == before and pruner.current_step >= pruner.iterative_steps:
                raise InfeasibleBudgetError(f"params = {recipe.params}: Torch-Pruning stops at {before} parameters, above {limit}", 1.0)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    if not taylor:
        optimizer.register_step_pre_hook(press)
    curve, _ = cut_and_train_on(model, data, recipe, seed, share, prune, report, optimizer=optimizer)
    how = "Taylor importances" if taylor else f"reg {recipe.torch_pruning_reg}"
    return Trained(model, curve, notes=[f"torch-pruning {tp.__version__}, {how}, pruned at step {last}"])


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """Of the layers whose outputs a block splits into heads: the same number of channels has to go from each head."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    return {layer: block.heads for block in blocks for layer in (block.query, block.key, block.value)}


def train_taylor(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
    return train(data, recipe, seed, report, taylor=True)


TORCH_PRUNING = Method("Torch-Pruning", train, (0.35, 0.2, 0.5), resumes=False)
TORCH_PRUNING_TAYLOR = Method("Torch-Pruning, Taylor", train_taylor, (TAYLOR_AT, 0.35, 0.5), resumes=False)
