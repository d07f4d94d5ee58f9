"""A recipe: everything that decides a run, as a small TOML file."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import RecipeError, nearest
from .models import MODELS

CHOICES = {"tier": ("cpu", "gpu"), "optimizer": ("adamw", "sgd"), "schedule": ("cosine", "steps"), "model": tuple(MODELS)}
ITEMS: dict[str, type | tuple[type, ...]] = {"tuple[str, ...]": str, "tuple[int, ...]": int, "tuple[float, ...]": (int, float)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Attributes:
    name: of the recipe; where its results go.
    tier: "cpu": runs in minutes on a core; "gpu": full published schedules, which `laconic bench` runs only with --tier gpu.
    task: data set: one of `laconic.data.DATASETS`, an .npz file, a text (.txt), or a folder of images.
    size: of the images of a folder in pixels, of the windows of a text in characters.
    train_limit: use only a prefix of the training images; 0: all.
    model: one of `laconic.models.MODELS`; widths, pools, depth, kernel, heads: of it, as far as it has them.
    gain: a transformer's weights start with a standard deviation of `gain` over the root of its width; 0: with 0.02, whatever the width.
    epochs, batch_size, lr, weight_decay, label_smoothing: of the training.
    rates: learning rates of single methods in place of `lr`, by the name of the method.
    optimizer: "adamw", or "sgd" with `momentum` (Nesterov's if `nesterov`).
    lr_warmup, schedule: the learning rate rises over the share `lr_warmup` of the steps; then it falls to zero as a "cosine", or in
        "steps": it is multiplied by `gamma` at each of the `milestones`, shares of the run.
    init: weights to start from instead of random ones (a file or a saved model; `{seed}` stands for the seed); "": none. Networks of
        other widths start from scratch all the same.
    thin_epochs: of the rival that is given laconic's training time instead of its steps; 0: twice the epochs.
    params: the budget as a fraction of the dense parameters (1: no bound); macs, latency: of the dense MACs, and of the
        milliseconds for a batch of 64 on this machine, too; 0: no bound.
    warmup, settle: `laconic.Schedule`; `settle = 0.0`: laconic's own; `settle = 1.0` cuts at the end, without training afterwards.
    structures: what laconic may use: `low-rank`, `channels`, `channels-optional`, `channels-even`; none: what it chooses by itself.
    penalty_epsilon: of their `LogSum`; strength: 0 lets the budget steer it.
    setting: of a rival, what its file names first; 0: its default.
    matricization: of the convolutions.
    torch_pruning_reg, torch_pruning_at, torch_pruning_global: of the rival: strength of its regularizer; the share of the run
        after which it prunes; whether it ranks the channels of all layers together, or takes the same share of each.
    only_faster: leave dense what does not get faster when cut (only with `settle = 1.0`).
    """

    name: str
    task: str
    tier: str = "cpu"
    size: int = 32
    train_limit: int = 0
    model: str = "convnet"
    widths: tuple[int, ...]
    pools: tuple[int, ...] = ()
    depth: int = 20
    kernel: int = 3
    heads: int = 4
    gain: float = 0.0
    epochs: int
    batch_size: int = 64
    lr: float = 2e-3
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    lr_warmup: float = 0.2
    optimizer: str = "adamw"
    momentum: float = 0.9
    nesterov: bool = False
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    init: str = ""
    thin_epochs: int = 0
    params: float = 0.25
    macs: float = 0.0
    latency: float = 0.0
    warmup: float = 0.1
    settle: float = 0.0
    penalty_epsilon: float = 0.1
    strength: float = 0.0
    setting: float = 0.0
    matricization: str = "out,in*kh*kw"
    structures: tuple[str, ...] = ()
    only_faster: bool = False
    torch_pruning_reg: float = 1e-4
    torch_pruning_at: float = 0.35
    torch_pruning_global: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if kind in ITEMS:
                fine = isinstance(value, (list, tuple)) and all(isinstance(v, ITEMS[kind]) and not isinstance(v, bool) for v in value)
                object.__setattr__(self, field.name, tuple(value) if fine else value)
            elif kind == "float":
                fine = is_number(value)
            elif kind == "dict[str, float]":
                fine = isinstance(value, dict) and all(map(is_number, value.values()))
            else:
                fine = type(value).__name__ == kind
            if not fine:
                raise RecipeError(f"recipe: {field.name} = {value!r} should be a {kind}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(f"recipe: {name} = {getattr(self, name)!r} is unknown{nearest(getattr(self, name), choices)}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"recipe: {name} = {getattr(self, name)} must be at least 1")
        for name, rate in {"lr": self.lr, **{f"rates.{method}": rate for method, rate in self.rates.items()}}.items():
            if not rate > 0:
                raise RecipeError(f"recipe: {name} = {rate} must be above 0")
        if not self.gain >= 0:
            raise RecipeError(f"recipe: gain = {self.gain} must be 0 or above")
        if self.warmup != 0.1 and not self.settle:
            raise RecipeError(f"recipe: warmup = {self.warmup} without settle: give both, or neither for laconic's own schedule")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"recipe: momentum = {self.momentum} must be at least 0 and below 1")
        if self.nesterov and not self.momentum:
            raise RecipeError("recipe: nesterov = true needs a momentum above 0")
        if not 0 < self.gamma <= 1:
            raise RecipeError(f"recipe: gamma = {self.gamma} must be above 0 and at most 1: the rate is multiplied by it")
        bounds = (self.lr_warmup if self.schedule == "steps" else 0, *self.milestones, 1)
        if any(not a < b for a, b in itertools.pairwise(bounds)):
            raise RecipeError(
                f"recipe: milestones = {list(self.milestones)} must be rising shares of the run, after lr_warmup = {self.lr_warmup} and below 1"
            )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shipped_recipes() -> dict[str, Path]:
    """Recipes inside the package, by name."""
    folder = Path(str(resources.files("laconic"))) / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.toml"))}


def load_recipe(source: str | Path) -> Recipe:
    """Read a recipe from a TOML file, or by the name of a shipped one.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown or missing key (the nearest valid one is named), a wrong type.
    """
    shipped = shipped_recipes()
    path = shipped.get(str(source), Path(source))
    if not path.is_file():
        raise RecipeError(f"recipe {str(source)!r} is neither a file nor a shipped recipe{nearest(str(source), shipped)}")
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: not valid TOML: {error}") from None
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    for key in data:
        if key not in fields:
            raise RecipeError(f"recipe {path}: unknown key {key!r}{nearest(key, fields)}")
    data.setdefault("name", path.stem)
    missing = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING and n not in data]
    if missing:
        raise RecipeError(f"recipe {path}: missing {', '.join(missing)}")
    return Recipe(**data)
