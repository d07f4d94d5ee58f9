"""What all methods share: the contract, the network, the data that they may look at."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..checkpoint import load_weights
from ..data import Dataset
from ..errors import InfeasibleBudgetError
from ..measure import count_macs, count_params, relative_latency
from ..models import MODELS, Shape, multiples, thin_widths, widest
from ..recipe import Recipe
from ..report import CompactReport
from ..training import Curve, Report, Restart, fit, make_optimizer, steps_per_epoch
from ..widths import LANES

AT_ONCE = 0.02  # share of a run: not before the optimizer has its moments


@dataclass(slots=True)
class Trained:
    """A trained model, how training went, and what compaction did (None where there was none)."""

    model: nn.Module
    curve: Curve
    report: CompactReport | None = None
    notes: list[str] = field(default_factory=list)
    total_steps: int | None = None


Result = TypeVar("Result")
Train = Callable[..., Trained]  # of (data, recipe, seed, report), and `restart` where the method can resume


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the comparison.

    Attributes:
        label: how progress bars and tables call it.
        train: from data, recipe, and seed to a model within the recipe's budget; reports progress where asked. It must never look at the test images.
        settings: what `recipe.setting` may be, to be tried on held-out training images (`laconic bench --tune`); the first is the
            one that is taken where the recipe has none. What is set: the first constant of the method's file.
        resumes: `train` takes `restart`, too, and goes on from running checkpoints. One that changes the network by a hook of its own cannot.
    """

    label: str
    train: Train
    settings: Sequence[float] = ()
    resumes: bool = True

    def run(self, data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
        """Train; one that cannot resume writes no running checkpoints."""
        return self.train(data, recipe, seed, report, **({"restart": restart} if self.resumes else {}))


def network(data: Dataset, recipe: Recipe, widths: tuple[int, ...]) -> nn.Module:
    """The recipe's network with these widths, as PyTorch initialises it."""
    return MODELS[recipe.model](data.train_x.shape[1:], data.classes, shape_of(recipe, widths))


def shape_of(recipe: Recipe, widths: tuple[int, ...]) -> Shape:
    return Shape(widths=widths, pools=recipe.pools, depth=recipe.depth, kernel=recipe.kernel, heads=recipe.heads, gain=recipe.gain)


def build(data: Dataset, recipe: Recipe, seed: int, widths: tuple[int, ...] | None = None) -> nn.Module:
    """The recipe's network, initialised from the seed or (unless other widths are asked for) from the recipe's weights."""
    torch.manual_seed(seed)
    model = network(data, recipe, widths or recipe.widths)
    if recipe.init and widths is None:
        load_weights(model, Path(recipe.init.replace("{seed}", str(seed))))
    model.to(data.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on CPU
    return model


def thin_network(data: Dataset, recipe: Recipe, seed: int) -> nn.Module:
    """The recipe's network with all widths scaled down to its budget: in parameters, and in MACs and measured milliseconds where these are bounded."""
    dense = build(data, recipe, seed)
    limit, steps = int(recipe.params * count_params(dense)), multiples(recipe.model, shape_of(recipe, recipe.widths))
    widths = thin_widths(lambda widths: network(data, recipe, widths), recipe.widths, limit, steps)
    if recipe.macs or recipe.latency:

        def fits(widths: tuple[int, ...]) -> bool:
            thin = build(data, recipe, seed, widths)
            if recipe.macs and count_macs(thin, example(data)) > recipe.macs * count_macs(dense, example(data)):
                return False
            return not recipe.latency or relative_latency(thin, dense, example(data, 64))[0] <= recipe.latency

        widths = widest(widths, fits, LANES if recipe.latency else 1)
    return build(data, recipe, seed, widths)


def example(data: Dataset, batch: int = 1) -> tuple[torch.Tensor]:
    """One image, or a batch: MACs and milliseconds are then those of it."""
    return (data.train_x[:batch].to(data.device),)


def sample(data: Dataset, count: int) -> torch.Tensor:
    """Numbers of so many training images at random, always the same ones: some sets are sorted by class."""
    return torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))[:count]


def calibration(data: Dataset) -> list[torch.Tensor]:
    """Inputs for BatchNorm re-estimation: 2,048 training images, without augmentation."""
    return list(data.train_x[sample(data, 2048)].to(data.device).split(256))


def after_step(optimizer: torch.optim.Optimizer, step: int, act: Callable[[], None]) -> None:
    """Once, when the optimizer has made this many steps."""
    done = itertools.count(1)

    def hook(*_: Any) -> None:
        if next(done) == step:
            act()

    optimizer.register_step_post_hook(hook)


def start_afresh(optimizer: torch.optim.Optimizer, model: nn.Module, recipe: Recipe) -> None:
    """Where layers were replaced: the optimizer takes the new parameters and goes on without a state, at the learning rate where it is."""
    optimizer.state.clear()
    for group, fresh in zip(optimizer.param_groups, make_optimizer(model, recipe).param_groups, strict=True):
        group["params"] = fresh["params"]


def cut_and_train_on(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    seed: int,
    share: float,
    cut: Callable[[], Result],
    report: Report | None,
    **options: Any,
) -> tuple[Curve, Result]:
    """Train; `cut` replaces layers at this share of the run, and the optimizer goes on without a state. The curve, and what `cut` gave.

    Args:
        options: of `fit`.
    """
    optimizer = options.pop("optimizer", None) or make_optimizer(model, recipe)
    results: list[Result] = []

    def act() -> None:
        results.append(cut())
        start_afresh(optimizer, model, recipe)

    after_step(optimizer, max(1, round(share * recipe.epochs * steps_per_epoch(data, recipe))), act)
    return fit(model, data, recipe, seed, optimizer, report=report, **options), results[0]


def cut_share(recipe: Recipe, default: float) -> float:
    """After which share of the run to cut: the setting if there is one; at once where the run starts from trained weights; else the method's default."""
    return recipe.setting or (AT_ONCE if recipe.init else default)


def one_share(recipe: Recipe, limit: int, fixed: int, costs: Sequence[Callable[[float], int]]) -> float:
    """The largest share, in thousandths, whose costs (parameters of each layer at this share) fit beside what is fixed.

    Raises:
        InfeasibleBudgetError: not even the smallest one does.
    """
    fitting = [k / 1000 for k in range(1, 1001) if fixed + sum(cost(k / 1000) for cost in costs) <= limit]
    if not fitting:
        raise InfeasibleBudgetError(
            f"params = {recipe.params}: out of reach with the same share of every layer but the first and the last", 1.0
        )
    return fitting[-1]
