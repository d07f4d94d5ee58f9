"""One training loop for the demo, the recipes and every method compared: a method differs only in what it is given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Dataset
from .measure import count_params
from .recipe import Recipe


@dataclass(slots=True)
class Progress:
    """What a progress display may show after every step."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    accuracy: float | None  # on the test images, after the last whole epoch
    params: int
    seconds: float

    @property
    def seconds_left(self) -> float:
        return self.seconds / max(self.step, 1) * (self.total_steps - self.step)


@dataclass(slots=True)
class Curve:
    """One entry per epoch."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    params: list[int] = field(default_factory=list)


Report = Callable[[Progress], None]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during training; carries the model as it is, so that nothing is lost."""

    def __init__(self, model: nn.Module, step: int, total_steps: int):
        super().__init__(f"interrupted at step {step} of {total_steps}")
        self.model = model


def steps_per_epoch(data: Dataset, recipe: Recipe) -> int:
    return len(data.train_x) // recipe.batch_size


def batches(data: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented batches; the last, smaller one is dropped."""
    order = torch.randperm(len(data.train_x), generator=generator)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        index = order[start : start + batch_size]
        yield data.augment(data.train_x[index], generator), data.train_y[index]


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 500) -> float:
    """Share of right answers, in eval mode."""
    training = model.training
    model.eval()
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True))
    model.train(training)
    return right / len(y)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; no decay on biases and norms."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": other, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr)


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear rise over the share `warmup`, then half a cosine to zero."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    seed: int,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int | None = None,
    report: Report | None = None,
) -> Curve:
    """Train for the recipe's epochs (or `epochs`); the time of evaluations is not counted.

    Raises:
        TrainingInterrupted: on Ctrl-C.
    """
    epochs = epochs or recipe.epochs
    total = epochs * steps_per_epoch(data, recipe)
    generator = torch.Generator().manual_seed(seed + 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, recipe.lr_warmup))
    curve = Curve()
    seconds, step = 0.0, 0
    model.train()
    try:
        for epoch in range(epochs):
            losses = []
            for x, y in batches(data, recipe.batch_size, generator):
                start = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(model(x), y, label_smoothing=recipe.label_smoothing)
                loss.backward()
                optimizer.step()
                scheduler.step()
                seconds += time.perf_counter() - start
                step += 1
                losses.append(float(loss.detach()))
                if report is not None:
                    last = curve.accuracy[-1] if curve.accuracy else None
                    report(Progress(step, total, epoch, losses[-1], last, count_params(model), seconds))
            curve.loss.append(sum(losses) / len(losses))
            curve.accuracy.append(accuracy(model, data.test_x, data.test_y))
            curve.seconds.append(seconds)
            curve.params.append(count_params(model))
    except KeyboardInterrupt:
        raise TrainingInterrupted(model, step, total) from None
    return curve
