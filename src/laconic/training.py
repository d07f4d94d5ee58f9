"""One training loop for the demo, the recipes and every method compared: a method differs only in what it is given."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .compressor import Compressor
from .data import Dataset, Images, taken
from .distributed import gathered, rank, world_size
from .errors import InvalidValueError, first_line
from .measure import count_params, evaluating
from .recipe import Recipe
from .running import RunCheckpoints


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
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Groups = list[dict[str, Any]]


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
        yield batch(data, order[start : start + batch_size], generator)


def batch(data: Dataset, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """These training images, augmented, with their labels, where the model is. Of several processes each takes its share."""
    index = index[rank() :: world_size()]
    x, y = data.augment(data.train_x[index], generator), data.train_y[index]
    return x.to(data.device, non_blocking=True), y.to(data.device, non_blocking=True)


def accuracy(model: nn.Module, x: Images, y: Tensor, batch_size: int = 500) -> float:
    """Share of right answers, in eval mode. Several processes divide the images, and all get the answer."""
    device = next(model.parameters()).device
    mine = slice(rank(), None, world_size())
    parts = zip(taken(x, mine).split(batch_size), y[mine].split(batch_size), strict=True)
    with evaluating(model):
        right = sum(int((model(a.to(device)).argmax(-1) == b.to(device)).sum()) for a, b in parts)
    return sum(gathered(right)) / y.numel()


def cross_entropy(outputs: Tensor, y: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Over all predictions: of an image one, of a text one for each character."""
    return F.cross_entropy(outputs.flatten(0, -2), y.flatten(), label_smoothing=label_smoothing, reduction=reduction)


def bits(model: nn.Module, x: Images, y: Tensor, batch_size: int = 500) -> float:
    """Mean negative log-likelihood of the right answers in bits, in eval mode: of a text, bits per character."""
    device = next(model.parameters()).device
    with evaluating(model):
        parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
        total = sum(float(cross_entropy(model(a.to(device)), b.to(device), reduction="sum")) for a, b in parts)
    return total / y.numel() / math.log(2)


def adamw(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=recipe.lr)


def sgd(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


OPTIMIZERS: dict[str, Callable[[Groups, Recipe], torch.optim.Optimizer]] = {"adamw": adamw, "sgd": sgd}


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's; no decay on biases and norms."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups: Groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": other, "weight_decay": 0.0}]
    return OPTIMIZERS[recipe.optimizer](groups, recipe)


def cosine(step: int, rise: int, total: int, recipe: Recipe) -> float:
    """Half a cosine to zero."""
    del recipe  # same signature as the other
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def steps(step: int, rise: int, total: int, recipe: Recipe) -> float:
    """Times `gamma` at each milestone."""
    del rise
    return float(recipe.gamma ** sum(step >= round(share * total) for share in recipe.milestones))


SCHEDULES: dict[str, Callable[[int, int, int, Recipe], float]] = {"cosine": cosine, "steps": steps}


def learning_rate_factor(step: int, total: int, recipe: Recipe) -> float:
    """Linear rise over the share `lr_warmup`, then as the recipe's schedule says."""
    rise = max(1, round(recipe.lr_warmup * total))
    return (step + 1) / rise if step < rise else SCHEDULES[recipe.schedule](step, rise, total, recipe)


def join(device: str) -> torch.device:
    """The device to train on; under torchrun, become one of its processes (nccl on CUDA devices, one each; else gloo).

    Raises:
        InvalidValueError: there is no such device here.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InvalidValueError(f"device = {device!r}: {first_line(error)}") from None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if place.type == "cuda":
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return place


def wrapped(model: nn.Module) -> nn.Module:
    """For several processes (torchrun): their gradients are averaged."""
    return nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model


def parameters_of(model: nn.Module) -> list[tuple[int, torch.Size]]:
    return [(id(p), p.shape) for p in model.parameters()]


@dataclass(frozen=True, slots=True)
class Restart:
    """Running checkpoints: where, how often, whether to go on from them, and what must be the same then.

    `every` in steps; 0: after every epoch.
    """

    directory: Path
    every: int = 0
    resume: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Position:
    """Where in its run a loop is: `done` images of this epoch's `order` have been used."""

    order: Tensor
    step: int = 0
    epoch: int = 0
    done: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    seed: int,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int | None = None,
    report: Report | None = None,
    compressor: Compressor | None = None,
    restart: Restart | None = None,
    loss: Loss | None = None,
) -> Curve:
    """Train for the recipe's epochs (or `epochs`); the time of evaluations and of saving is not counted.

    Started in several processes, they train one model: each takes its share of every batch.

    `loss` of the outputs, the inputs and the labels; None: cross-entropy with the recipe's label smoothing.

    Raises:
        TrainingInterrupted: on Ctrl-C.
    """
    if recipe.batch_size % world_size():
        raise InvalidValueError(f"batch_size = {recipe.batch_size}: cannot be divided among {world_size()} processes")
    epochs = epochs or recipe.epochs
    total = epochs * steps_per_epoch(data, recipe)
    generator = torch.Generator().manual_seed(seed + 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, recipe))
    curve, at = Curve(), Position(torch.empty(0, dtype=torch.int64))

    def save() -> None:
        if checkpoints is not None:
            extra = {"curve": dataclasses.asdict(curve), "position": dataclasses.asdict(at), "generator": generator.get_state()}
            checkpoints.save(at.step, extra)

    checkpoints = None
    if restart is not None:
        checkpoints = RunCheckpoints(
            restart.directory, model, compressor, settings=restart.settings, optimizer=optimizer, scheduler=scheduler
        )
        found = checkpoints.resume() if restart.resume else None
        if not restart.resume and rank() == 0:
            checkpoints.clear()
        if found is not None:
            curve, at = Curve(**found[1]["curve"]), Position(**found[1]["position"])
            generator.set_state(found[1]["generator"])
        else:
            save()  # what was measured when the compressor was built is kept from the first moment on
    every = restart.every if restart is not None and restart.every else steps_per_epoch(data, recipe)
    model.train()
    net, held = wrapped(model), parameters_of(model)
    try:
        while at.epoch < epochs:
            if at.done == 0:
                at.order = torch.randperm(len(data.train_x), generator=generator)
            while at.done + recipe.batch_size <= len(at.order):
                x, y = batch(data, at.order[at.done : at.done + recipe.batch_size], generator)
                start = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                value = loss(net(x), x, y) if loss else cross_entropy(net(x), y, recipe.label_smoothing)
                value.backward()
                optimizer.step()
                if net is not model and held != parameters_of(model):  # layers were cut
                    net, held = wrapped(model), parameters_of(model)
                scheduler.step()
                at.losses.append(float(value.detach()))  # waits for a GPU
                at.seconds += time.perf_counter() - start
                at.step += 1
                at.done += recipe.batch_size
                if report is not None:
                    last = curve.accuracy[-1] if curve.accuracy else None
                    report(Progress(at.step, total, at.epoch, at.losses[-1], last, count_params(model), at.seconds))
                if at.step % every == 0:
                    save()
            curve.loss.append(sum(at.losses) / len(at.losses))
            curve.accuracy.append(accuracy(model, data.test_x, data.test_y))
            curve.seconds.append(at.seconds)
            curve.params.append(count_params(model))
            at.epoch, at.done, at.losses = at.epoch + 1, 0, []
    except KeyboardInterrupt:
        raise TrainingInterrupted(model, at.step, total) from None
    return curve
