"""The object beside the optimizer: what a step owes, who pays it, and that nothing else changes."""

import gc
import itertools
import math
import sys
import types
import weakref
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.testing._internal.two_tensor import TwoTensor

import laconic
from laconic import reference
from laconic.schedule import Controller
from laconic.surgery.optimizer import Replacement, states_to_slice, unknown_state

from .models import Shared, Tied, assert_same, backward, inputs_for, mlp, snapshot

STRENGTH = 0.4
OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: optim.Adam(p, lr=0.1),
    "adam amsgrad": lambda p: optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.01),
    "adam foreach": lambda p: optim.Adam(p, lr=0.1, foreach=True),
    "adam fused": lambda p: optim.Adam(p, lr=0.1, fused=True),
    "adam tensor rate": lambda p: optim.Adam(p, lr=torch.tensor(0.1, dtype=torch.float64)),
    "adamw": lambda p: optim.AdamW(p, lr=0.1),
    "adamw foreach": lambda p: optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "adagrad foreach": lambda p: optim.Adagrad(p, lr=0.1, foreach=True),
    "adagrad fused": lambda p: optim.Adagrad(p, lr=0.1, fused=True),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.1),
    "adadelta foreach": lambda p: optim.Adadelta(p, lr=0.1, foreach=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "rmsprop foreach": lambda p: optim.RMSprop(p, lr=0.1, foreach=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.1),
    "radam": lambda p: optim.RAdam(p, lr=0.1),
    "adamax": lambda p: optim.Adamax(p, lr=0.1),
    "rprop": lambda p: optim.Rprop(p, lr=0.1),
    "asgd": lambda p: optim.ASGD(p, lr=0.1),
}
every_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)


def nuclear(strength: float = STRENGTH, **options) -> laconic.LowRank:
    return laconic.LowRank(penalty=laconic.L1(), strength=strength, scale="absolute", **options)


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.ndim > 1}


def shrink_by_hand(weight: Tensor, tau: float) -> None:
    with torch.no_grad():
        weight.copy_(torch.from_numpy(reference.svt(weight.detach().double().numpy(), tau)))


def assert_close(model: nn.Module, wanted: nn.Module, **tolerance) -> None:
    for (name, a), b in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}", **tolerance or {"rtol": 1e-9, "atol": 1e-10})


# ---- strength 0 -----------------------------------------------------------------------------------------------------


@every_optimizer
def test_strength_zero_leaves_training_bit_identical(build):
    model, bare = mlp(torch.float32), mlp(torch.float32)
    optimizer, alone = build(model.parameters()), build(bare.parameters())
    laconic.Compressor(model, optimizer, laconic.LowRank(strength=0.0), every=1)
    for t in range(5):
        for m, o in ((model, optimizer), (bare, alone)):
            backward(m, t)
            o.step()
            o.zero_grad()
    assert_same(snapshot(model, optimizer), snapshot(bare, alone))


# ---- the threshold --------------------------------------------------------------------------------------------------


def scheduled(optimizers: list) -> list:
    return [optim.lr_scheduler.LambdaLR(o, lambda t: 0.8**t) for o in optimizers]


def two_groups(build):
    """The first weight in a group with half the learning rate of the rest."""

    def optimizers(model: nn.Module) -> list:
        first, *rest = model.parameters()
        o = build([{"params": [first]}, {"params": rest}])
        rate = o.param_groups[0]["lr"]
        o.param_groups[0]["lr"] = rate * 0.5
        return [o]

    return optimizers, {"0.weight": 0.05, "2.weight": 0.1, "4.weight": 0.1}


def muon_and_adamw(model: nn.Module) -> list:
    hidden = [model[0].weight, model[2].weight]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    return [optim.Muon(hidden, lr=0.02), optim.AdamW(rest, lr=0.1)]


THRESHOLDS = {name: two_groups(build) for name, build in OPTIMIZERS.items()} | {
    "muon and adamw": (muon_and_adamw, {"0.weight": 0.02, "2.weight": 0.02, "4.weight": 0.1})
}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("optimizers_for", "rates"), THRESHOLDS.values(), ids=THRESHOLDS)
def test_the_threshold_is_strength_times_the_summed_rates_of_the_weights_own_group(optimizers_for, rates, every):
    """Against a loop that knows the schedule in closed form and shrinks with NumPy."""
    model, wanted = mlp(), mlp()
    optimizers, alone = optimizers_for(model), optimizers_for(wanted)
    laconic.Compressor(model, optimizers, nuclear(), every=every)
    owed = dict.fromkeys(rates, 0.0)
    schedulers = scheduled(optimizers), scheduled(alone)
    for t in range(6):
        for m, os, ss in ((model, optimizers, schedulers[0]), (wanted, alone, schedulers[1])):
            backward(m, t)
            for o in os:
                o.step()
                o.zero_grad()
            if m is wanted:
                for name, weight in matrices(wanted).items():
                    owed[name] += rates[name] * 0.8**t
                    if (t + 1) % every == 0:
                        shrink_by_hand(weight, STRENGTH * owed[name])
                        owed[name] = 0.0
            for s in ss:
                s.step()
    assert_close(model, wanted)


def svdvals(weight: Tensor) -> np.ndarray:
    return np.linalg.svd(weight.detach().double().numpy(), compute_uv=False)


def one_step(model: nn.Module, optimizer: optim.Optimizer) -> None:
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("steps", [1, 4, 5, 6])
def test_compact_pays_what_is_still_owed(steps):
    model, bare = mlp(), mlp()
    optimizer, alone = optim.SGD(model.parameters(), lr=0.1), optim.SGD(bare.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, nuclear(), every=3)
    for t in range(steps):
        for m, o in ((model, optimizer), (bare, alone)):
            backward(m, t)
            o.step()
            o.zero_grad()
        if (t + 1) % 3 == 0:
            for weight in matrices(bare).values():
                shrink_by_hand(weight, STRENGTH * 0.3)
    compressor.compact(energy=1.0)
    for weight in matrices(bare).values():
        shrink_by_hand(weight, STRENGTH * 0.1 * (steps % 3))
    x = inputs_for(bare)
    torch.testing.assert_close(model(x), bare(x), rtol=1e-8, atol=1e-9)


def test_accumulated_gradients_count_as_one_step():
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, nuclear(), every=2)
    wanted = mlp()
    alone = optim.SGD(wanted.parameters(), lr=0.1)
    for t in range(8):
        for m, o in ((model, optimizer), (wanted, alone)):
            backward(m, t, scale=0.25)
            if t % 4 == 3:
                o.step()
                o.zero_grad()
    for weight in matrices(wanted).values():
        shrink_by_hand(weight, STRENGTH * 0.2)
    assert compressor.steps == 2
    assert_close(model, wanted)


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()

    def forward(self, x: Tensor, branch: str) -> Tensor:
        return self.get_submodule(branch)(x)


def test_a_weight_without_gradient_in_a_step_owes_nothing_for_it():
    model, wanted = TwoBranches(), TwoBranches()
    wanted.load_state_dict(model.state_dict())
    optimizer, alone = (optim.Adam(m.parameters(), lr=0.1) for m in (model, wanted))
    laconic.Compressor(model, optimizer, nuclear(), every=3)
    for t in range(3):
        for m, o in ((model, optimizer), (wanted, alone)):
            m(torch.ones(2, 6, dtype=torch.float64) * t + 1, "left" if t < 2 else "right").square().sum().backward()
            o.step()
            o.zero_grad(set_to_none=True)
    shrink_by_hand(wanted.left.weight, STRENGTH * 0.2)
    shrink_by_hand(wanted.right.weight, STRENGTH * 0.1)
    assert_close(model, wanted)


def test_frozen_weights_are_not_touched_and_named():
    model = mlp()
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, nuclear(), every=1)
    one_step(model, optimizer)
    assert torch.equal(model[2].weight, before)
    assert svdvals(model[0].weight).sum() < svdvals(mlp()[0].weight).sum()
    assert "frozen" in str(compressor.plan)


def test_a_weight_frozen_during_the_run_is_left_alone_from_then_on():
    """Also where it still owes for a step before."""
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    laconic.Compressor(model, optimizer, nuclear(), every=2)
    one_step(model, optimizer)
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    one_step(model, optimizer)
    assert torch.equal(model[2].weight, before)


def test_optimizers_that_step_at_different_times_pay_for_their_own_steps():
    model, wanted = mlp(), mlp()

    def split(m):
        return [optim.SGD([m[0].weight], lr=0.1), optim.SGD([m[2].weight, m[4].weight], lr=0.05)]

    optimizers, alone = split(model), split(wanted)
    compressor = laconic.Compressor(model, optimizers, nuclear(), every=2)
    for t in range(4):
        for m, os in ((model, optimizers), (wanted, alone)):
            backward(m, t)
            os[0].step()
            if t % 2:
                os[1].step()
            if m is wanted and t % 2:
                shrink_by_hand(m[0].weight, STRENGTH * 0.2)
            if m is wanted and t == 3:
                shrink_by_hand(m[2].weight, STRENGTH * 0.1)
                shrink_by_hand(m[4].weight, STRENGTH * 0.1)
            m.zero_grad()
    assert compressor.steps == 4
    assert_close(model, wanted)


@pytest.mark.parametrize("build", [Tied, Shared])
def test_a_weight_that_is_used_twice_is_shrunk_once(build):
    torch.manual_seed(0)
    model = build().double()
    wanted = build().double()
    wanted.load_state_dict(model.state_dict())
    optimizer, alone = (optim.SGD(m.parameters(), lr=0.1) for m in (model, wanted))
    laconic.Compressor(model, optimizer, nuclear(), every=1)
    for m, o in ((model, optimizer), (wanted, alone)):
        backward(m, 0)
        o.step()
    for weight in matrices(wanted).values():
        shrink_by_hand(weight, STRENGTH * 0.1)
    assert_close(model, wanted)


# ---- scale ----------------------------------------------------------------------------------------------------------


def shrunk_values(scale: str, factor: float, penalty) -> np.ndarray:
    """Singular values of a weight of the given size after one prox of tau = 0.04, with the gradient and its step left out."""
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(factor)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    laconic.Compressor(model, optimizer, laconic.LowRank(penalty=penalty, strength=STRENGTH, scale=scale, include="2"), every=1)
    model[2].weight.grad = torch.zeros_like(model[2].weight)
    optimizer.step()
    return svdvals(model[2].weight)


def test_a_relative_threshold_is_in_units_of_the_root_mean_square_singular_value():
    before = svdvals(mlp()[2].weight)
    unit = math.sqrt(np.mean(before**2))
    np.testing.assert_allclose(shrunk_values("relative", 1, laconic.L1()), np.maximum(before - 0.04 * unit, 0), atol=1e-12)
    np.testing.assert_allclose(shrunk_values("absolute", 1, laconic.L1()), np.maximum(before - 0.04, 0), atol=1e-12)


@pytest.mark.parametrize("penalty", [laconic.L1(), laconic.LogSum(), laconic.LogSum(epsilon=0.01), laconic.Hoyer()], ids=repr)
def test_a_relative_threshold_does_not_care_for_the_size_of_the_weight(penalty):
    np.testing.assert_allclose(shrunk_values("relative", 1000, penalty), 1000 * shrunk_values("relative", 1, penalty), rtol=1e-6)


def test_the_published_setting_is_absolute_once_per_epoch_with_the_energy_rule():
    model, wanted = mlp(), mlp()
    optimizer, alone = (optim.SGD(m.parameters(), lr=0.1) for m in (model, wanted))
    compressor = laconic.Compressor.as_published(model, optimizer, strength=STRENGTH, steps_per_epoch=4, energy=0.8)
    for t in range(8):
        for m, o in ((model, optimizer), (wanted, alone)):
            backward(m, t)
            o.step()
            o.zero_grad()
        if t % 4 == 3:
            for weight in matrices(wanted).values():
                shrink_by_hand(weight, STRENGTH * 0.4)
        assert_close(model, wanted)
    report = compressor.compact()
    for layer, weight in zip(report.layers, matrices(wanted).values(), strict=True):
        squares = svdvals(weight) ** 2
        rank = next(r for r in itertools.count(1) if squares[:r].sum() >= 0.8 * squares.sum())
        assert layer.rank == (rank if rank * sum(weight.shape) < weight.numel() else None)


def test_the_published_setting_unfolds_kernels_by_space():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 5, 5))
    compressor = laconic.Compressor.as_published(model, optim.SGD(model.parameters(), lr=0.1), 0.1, 10)
    assert [tuple(s.matrix.shape[1:]) for s in compressor.plan.sites] == [(24, 9), (4, 72)]


# ---- which optimizers -----------------------------------------------------------------------------------------------


class PlainSGD:
    """An optimizer that is no torch.optim.Optimizer and has no hooks."""

    def __init__(self, params, lr):
        self.param_groups = [{"params": list(params), "lr": lr}]

    def step(self):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= self.param_groups[0]["lr"] * p.grad


class Wrapper:
    """As Accelerate's: holds an optimizer and has no hooks of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


class LikeAccelerate(optim.Optimizer):
    """Is an Optimizer by inheritance only: its `__init__` was never called."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    def step(self):
        self.optimizer.step()


def explicit(model):
    optimizer = PlainSGD(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, nuclear(), every=2)
    return optimizer, compressor.step


def wrapped(wrapper):
    def build(model):
        optimizer = wrapper(optim.SGD(model.parameters(), lr=0.1))
        laconic.Compressor(model, optimizer, nuclear(), every=2)
        return optimizer, lambda: None

    return build


FOLLOWED = {"explicit step": explicit, "wrapper": wrapped(Wrapper), "like accelerate": wrapped(LikeAccelerate)}


@pytest.mark.parametrize("build", FOLLOWED.values(), ids=FOLLOWED)
def test_an_optimizer_without_hooks_of_its_own_can_be_followed(build):
    model, wanted = mlp(), mlp()
    optimizer, tell = build(model)
    alone = optim.SGD(wanted.parameters(), lr=0.1)
    for t in range(4):
        backward(model, t)
        optimizer.step()
        tell()
        model.zero_grad()
        backward(wanted, t)
        alone.step()
        wanted.zero_grad()
        if t % 2:
            for weight in matrices(wanted).values():
                shrink_by_hand(weight, STRENGTH * 0.2)
    assert_close(model, wanted)


def test_an_optimizer_without_hooks_and_state_can_be_cut_in_mid_run():
    model = mlp()
    optimizer = PlainSGD(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.7), total_steps=10, every=1)
    for t in range(10):
        backward(model, t)
        optimizer.step()
        compressor.step()
        model.zero_grad()
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert compressor.compact().params_after <= 0.7 * 247


def test_step_is_refused_where_hooks_do_it():
    model = mlp()
    compressor = laconic.Compressor(model, optim.SGD(model.parameters(), lr=0.1), nuclear())
    with pytest.raises(laconic.LaconicError, match=r"optimizer\.step\(\) is enough"):
        compressor.step()


def test_after_detach_the_optimizer_runs_alone():
    model, bare = mlp(), mlp()
    optimizer, alone = (optim.SGD(m.parameters(), lr=0.1) for m in (model, bare))
    laconic.Compressor(model, optimizer, nuclear(), every=1).detach()
    one_step(model, optimizer)
    one_step(bare, alone)
    assert_same(snapshot(model), snapshot(bare))


# ---- memory ---------------------------------------------------------------------------------------------------------


@dataclass
class Held:
    """Everything that an object keeps alive, without what belongs to the model and the optimizers."""

    skip: tuple = ()
    seen: set[int] = field(default_factory=set)
    arrays: list = field(default_factory=list)
    bytes: int = 0

    def visit(self, x) -> "Held":
        if id(x) in self.seen or any(x is s for s in self.skip) or isinstance(x, (type, types.ModuleType, types.FunctionType, str)):
            return self
        self.seen.add(id(x))
        if isinstance(x, (Tensor, np.ndarray)):
            if isinstance(x, Tensor) and x.device.type == "meta":
                return self
            self.arrays.append(x)
            self.bytes += x.untyped_storage().nbytes() if isinstance(x, Tensor) else (x if x.base is None else x.base).nbytes
            return self
        self.bytes += sys.getsizeof(x)
        for y in gc.get_referents(x):
            self.visit(y)
        return self


def held_by(compressor: laconic.Compressor) -> Held:
    model, optimizers = compressor.model, compressor.optimizers
    parts = [*model.modules(), *model.parameters(), *model.buffers(), *optimizers]
    return Held(tuple(parts) + tuple(vars(m) for m in model.modules())).visit(vars(compressor))


@pytest.mark.slow
def test_between_steps_less_than_one_percent_of_the_model_is_kept_and_no_weight():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    schedule = laconic.Schedule(warmup=0, settle=1)
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.3), total_steps=1000, every=1, schedule=schedule)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = held_by(compressor)
    assert len(held.arrays) >= 3  # the walk sees the spectra
    assert max(x.numel() if isinstance(x, Tensor) else x.size for x in held.arrays) <= 1024
    assert held.bytes < 0.01 * sum(p.numel() * p.element_size() for p in model.parameters())


def test_a_cut_in_mid_run_lets_the_dense_weights_go():
    model = mlp()
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    dense = [weakref.ref(p) for p in matrices(model).values()]
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.6), total_steps=10, every=1)
    for t in range(6):
        backward(model, t)
        optimizer.step()
        optimizer.zero_grad()
    gc.collect()
    still_dense = sum(isinstance(m, nn.Linear) for m in model)
    assert still_dense < 3
    assert sum(ref() is not None for ref in dense) == still_dense
    assert compressor.compact().params_after <= 0.6 * 247


# ---- the life of a run ----------------------------------------------------------------------------------------------


def test_during_the_warm_up_nothing_is_pressed():
    model, bare = mlp(), mlp()
    optimizer, alone = (optim.SGD(m.parameters(), lr=0.1) for m in (model, bare))
    laconic.Compressor(
        model, optimizer, budget=laconic.Budget(params=0.6), total_steps=20, every=1, schedule=laconic.Schedule(warmup=0.3, settle=0.8)
    )
    same = []
    for t in range(8):
        for m, o in ((model, optimizer), (bare, alone)):
            backward(m, t)
            o.step()
            o.zero_grad()
        same.append(torch.equal(model[2].weight, bare[2].weight))
    assert same == [True] * 5 + [False] * 3


def test_pressure_makes_the_cut_cheaper():
    """The same network, data and budget: pressed until the cut, or cut cold."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(12, 3), nn.Linear(3, 12)).double()
    x = torch.randn(256, 12, dtype=torch.float64)
    y = teacher(x).detach()

    def loss_after_cut(pressed: bool) -> float:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 12)).double()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        budget = laconic.Budget(params=0.4)
        options = {"budget": budget, "total_steps": 300, "cut": "end", "every": 5}
        compressor = laconic.Compressor(model, optimizer, **options) if pressed else None
        for _ in range(300):
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        _ = compressor.compact() if compressor else laconic.compress(model, budget=budget)
        return nn.functional.mse_loss(model(x), y).item()

    assert loss_after_cut(pressed=True) < 0.5 * loss_after_cut(pressed=False)


def test_metrics_are_a_flat_dict_of_floats_for_a_logger():
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, nuclear(100.0), every=1)
    one_step(model, optimizer)
    metrics = compressor.metrics()
    assert all(type(v) is float for v in metrics.values())
    assert metrics["laconic/step"] == 1
    assert metrics["laconic/strength"] == 100
    assert metrics["laconic/rank/2.weight"] == 0  # a threshold above the largest singular value
    biases = 12 + 10 + 3
    assert metrics["laconic/params_fraction"] == biases / 247


def test_the_history_stays_short_and_spans_the_run():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = optim.SGD(model.parameters(), lr=1e-4)
    compressor = laconic.Compressor(model, optimizer, nuclear(0.01), every=1)
    for _ in range(450):
        model[0].weight.grad = torch.ones(4, 4)
        optimizer.step()
    steps = [h.step for h in compressor.history]
    assert 50 <= len(steps) <= 200
    assert steps[0] == 1
    assert steps[-1] > 440
    assert len(set(np.diff(steps))) == 1


WARM_UPS = {
    "linear from zero": lambda o: optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 10)),
    "one cycle": lambda o: optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=100),
}


@pytest.mark.parametrize("warm_up", WARM_UPS.values(), ids=WARM_UPS)
def test_the_first_strength_does_not_depend_on_a_learning_rate_that_is_still_warming_up(warm_up):
    def first_strength(schedule) -> float:
        model = mlp()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        schedule(optimizer)
        compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.6), total_steps=100)
        return compressor.metrics()["laconic/strength"]

    assert first_strength(warm_up) == pytest.approx(first_strength(lambda o: None))


SET_LATER = {
    "by the loop": lambda o: None,
    "one cycle": lambda o: optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=100),
}


@pytest.mark.parametrize("lr", [0.0, 1e-5])
@pytest.mark.parametrize("schedule", SET_LATER.values(), ids=SET_LATER)
def test_nor_on_the_learning_rate_that_the_optimizer_was_built_with(schedule, lr):
    """A rate that is set after the compressor is built; before, the pressure was too high by the same factor."""

    def weights(lr: float) -> list[Tensor]:
        torch.manual_seed(0)
        model = mlp()
        optimizer = optim.SGD(model.parameters(), lr=lr)
        laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.6), total_steps=100)
        scheduler = schedule(optimizer)
        for step in range(40):
            if scheduler is None:
                optimizer.param_groups[0]["lr"] = 0.1
            backward(model, step)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return [p.detach() for p in model.parameters()]

    torch.testing.assert_close(weights(lr), weights(0.1), rtol=1e-5, atol=1e-5)


def test_nor_on_the_rates_of_what_is_not_pressed():
    """An embedding, or biases, at a hundred times the rate: the pressure on the weights was a hundredth of what was meant."""

    def weights(lr: float) -> list[Tensor]:
        torch.manual_seed(0)
        model = mlp()
        biases = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}, {"params": biases, "lr": lr}]
        optimizer = optim.SGD(groups, lr=0.1)
        laconic.Compressor(model, optimizer, laconic.LowRank(), budget=laconic.Budget(params=0.6), total_steps=100)
        for step in range(30):
            backward(model, step)
            for bias in biases:
                bias.grad = torch.zeros_like(bias)  # its rate must not move the rest of the network
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    torch.testing.assert_close(weights(10.0), weights(0.1))


def test_an_optimizer_without_a_learning_rate_of_its_own_is_refused():
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None  # as of Adafactor with its defaults
    with pytest.raises(laconic.UnsupportedOptimizerError, match="lr=None"):
        laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.6), total_steps=100)


def test_names_that_an_optimizer_keeps_follow_the_cuts():
    model = mlp()
    optimizer = optim.AdamW(model.named_parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.5), total_steps=20)
    for step in range(20):
        backward(model, step)
        optimizer.step()
    assert any(layer.rank is not None for layer in compressor.compact().layers)
    group = optimizer.param_groups[0]
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    assert {name: p for name, p in zip(group["param_names"], group["params"], strict=True) if p.ndim == 2} == weights


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize("compiled", [True, False])
def test_what_is_compiled_begins_anew_when_the_shapes_are_final(compiled, monkeypatch):
    resets = []
    model = mlp()
    given = torch.compile(model, backend="eager") if compiled else model
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(given, optimizer, budget=laconic.Budget(params=0.5), total_steps=20)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(compressor.state.settled))
    for step in range(20):
        backward(model, step)
        optimizer.step()
    assert resets == [True] * compiled


def test_with_several_optimizers_steering_happens_once_per_round_and_the_cut_pays_every_debt(monkeypatch):
    """The second optimizer holds none of the weights; at the cut the first one's weights still owe for a step."""
    model = mlp()
    optimizers = [
        optim.SGD([p for p in model.parameters() if p.ndim > 1], lr=0.1),
        optim.SGD([p for p in model.parameters() if p.ndim == 1], lr=0.1),
    ]
    schedule = laconic.Schedule(warmup=0, settle=0.7)
    compressor = laconic.Compressor(model, optimizers, budget=laconic.Budget(params=0.6), total_steps=10, every=2, schedule=schedule)
    steered, owed = [], []
    update, settle = Controller.update, compressor._settle
    monkeypatch.setattr(Controller, "update", lambda *args: (steered.append(compressor.steps), update(*args)))
    monkeypatch.setattr(compressor, "_settle", lambda: (owed.append(sum(compressor.state.owed.values())), settle()))
    for t in range(10):
        backward(model, t)
        for o in optimizers:
            o.step()
        model.zero_grad()
    assert steered == [2, 4, 6, 7]
    assert owed == [0]


LATE = {
    "on a layer that is cut": (laconic.LowRank(), lambda m: m[0].register_forward_hook(print_nothing), "0: hooks"),
    "on a weight that is cut": (laconic.LowRank(), lambda m: m[0].weight.register_hook(print_nothing), "0: hooks"),
    "on weights that lose neurons": (laconic.Channels(), lambda m: m[2].weight.register_hook(print_nothing), "2: hooks"),
}


def print_nothing(*_) -> None:
    pass


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("optimizer", [optim.AdamW, partial(optim.SGD, lr=0.01)])  # whose pairs have hooks of laconic's own
def test_hooks_that_were_put_on_later_are_not_lost_without_a_word(late, optimizer):
    structure, put_on, what = LATE[late]
    model = mlp()
    x = inputs_for(model)
    optimizer = optimizer(model.parameters())
    compressor = laconic.Compressor(model, optimizer, structure, budget=laconic.Budget(params=0.5), total_steps=20, example_inputs=(x,))
    put_on(model)

    def train() -> None:
        for _ in range(20):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match=f"laconic: {what} that were put there after") as warned:
        train()
    assert len([w for w in warned if "put there after" in str(w.message)]) == 1  # none of laconic's own
    assert any("put there after" in note for note in compressor.compact().notes)


def test_hooks_of_laconics_own_are_not_warned_of(recwarn):
    model = mlp()
    optimizer = optim.AdamW(model.parameters())
    x = inputs_for(model)
    laconic.Compressor(model, optimizer, laconic.LowRank(), budget=laconic.Budget(params=0.5), total_steps=1, example_inputs=(x,))
    model(x).square().mean().backward()
    optimizer.step()  # cut in the very step after which it watches what the layers take in
    assert isinstance(model[0], nn.Sequential)
    assert not recwarn.list


def test_scaled_gradients_of_a_pair_that_is_cut_again_are_not_taken_for_the_users(recwarn):
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 4, 1)]
    model = nn.Sequential(
        layers[0], nn.GroupNorm(4, 24), nn.ReLU(), layers[1], nn.GroupNorm(4, 24), nn.ReLU(), layers[2], nn.ReLU(), layers[3]
    )
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(4, 3, 8, 8), torch.randn(4, 4, 8, 8)
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.2), total_steps=40, example_inputs=(x,))
    for _ in range(40):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert compressor.state.gradient_scales
    assert not any("put there after" in note for note in compressor.compact().notes)
    assert not any("put there after" in str(w.message) for w in recwarn.list)


# ---- loops of users: what they hand over, and what must hold when something fails ------------------------------------------


def wide(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(20, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 3))
    )


X, Y = torch.randn(32, 20, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 3
THIRD = laconic.Budget(params=0.3)
BOTH = [laconic.LowRank(), laconic.Channels()]


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int, x: Tensor = X) -> None:
    for _ in range(steps):
        nn.functional.cross_entropy(model(x), Y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("cut", ["early", "end"])
@pytest.mark.parametrize("budget", [laconic.Budget(params=1.0), laconic.Budget(max_params=10**6)], ids=["all", "more than all"])
def test_a_budget_that_holds_already_changes_nothing(budget, cut):
    plain, model = wide(), wide()
    train(plain, optim.AdamW(plain.parameters(), lr=3e-3), 20)
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)
    with pytest.warns(UserWarning, match="within the budget as it is: nothing is pressed or cut"):
        compressor = laconic.Compressor(model, optimizer, budget=budget, total_steps=20, cut=cut, example_inputs=(X,))
    train(model, optimizer, 20)
    report = compressor.compact()
    assert report.params_after == report.params_before
    assert_same(snapshot(model), snapshot(plain))


def test_an_optimizer_of_the_model_before_it_was_unfused_is_told():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(20, 2, batch_first=True), nn.Linear(20, 60)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0])

    model = Block()
    optimizer = optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match=r"in none of the optimizers.*q_proj.*not in the model: was it unfused.*Make the optimizer last"):
        laconic.Compressor(laconic.unfuse(model), optimizer, laconic.LowRank(strength=0.1))


def test_a_run_of_one_step_keeps_what_the_budget_allows():
    model = wide()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    compressor = laconic.Compressor(model, optimizer, budget=THIRD, total_steps=1, example_inputs=(X,))
    train(model, optimizer, 1)
    report = compressor.compact()
    assert 0.28 < report.params_after / report.params_before <= 0.3


def test_the_share_that_is_logged_is_that_of_the_model_with_layers_in_three():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(64, 3),
    )
    dense = sum(p.numel() for p in model.parameters())
    optimizer, images = optim.AdamW(model.parameters(), lr=3e-3), torch.randn(32, 3, 6, 6)
    compressor = laconic.Compressor(
        model, optimizer, laconic.LowRank(), budget=laconic.Budget(params=0.1), total_steps=20, example_inputs=(images[:1],)
    )
    train(model, optimizer, 20, images)
    assert any(s.rank is not None for s in compressor.plan.inner)
    assert compressor.metrics()["laconic/params_fraction"] == pytest.approx(sum(p.numel() for p in model.parameters()) / dense)


def test_a_resume_with_other_example_inputs_is_refused():
    """A budget in parameters prices what they say of operations."""

    def fresh(**options) -> laconic.Compressor:
        model = wide()
        return laconic.Compressor(model, optim.AdamW(model.parameters()), laconic.LowRank(), budget=THIRD, total_steps=20, **options)

    state = fresh(example_inputs=(X,)).state_dict()
    fresh(example_inputs=(X,)).load_state_dict(state)
    with pytest.raises(laconic.CheckpointError, match=r"MACs of the example inputs was \d+, is None"):
        fresh().load_state_dict(state)


@pytest.mark.filterwarnings("ignore:laconic. the run ended after")
@pytest.mark.parametrize("calibration", [[X[:, :7]], iter(()), None], ids=["of another shape", "used up", "neurons gone before"])
def test_after_a_compact_that_fails_gradients_are_scaled_as_before(monkeypatch, calibration):
    monkeypatch.setattr(laconic.compressor, "FIRST_CUT", 10.0)
    model = normed()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    compressor = laconic.Compressor(
        model, optimizer, BOTH, budget=laconic.Budget(params=0.2), total_steps=100, example_inputs=(X,), every=2
    )
    while not compressor.state.gradient_scales:
        train(model, optimizer, 1)
    before = {name: len(p._backward_hooks or {}) for name, p in model.named_parameters()}
    assert sum(before.values()) >= 2
    monkeypatch.setattr(laconic.compaction, "surgery_error", lambda *_: 1.0)
    with pytest.raises(laconic.LaconicError, match="calibration" if calibration is not None else "more than rounding"):
        compressor.compact(calibration=calibration)
    monkeypatch.undo()
    assert {name: len(p._backward_hooks or {}) for name, p in model.named_parameters()} == before
    train(model, optimizer, 1)


def test_a_fresh_model_that_cannot_be_cut_leaves_the_run_on_its_own(monkeypatch):
    model = wide()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    compressor = laconic.Compressor(model, optimizer, laconic.LowRank(), budget=THIRD, total_steps=20, cut="end", every=5)
    train(model, optimizer, 10)
    with monkeypatch.context() as patch:
        patch.setattr(laconic.compaction, "surgery_error", lambda *_: 1.0)
        with pytest.raises(laconic.SurgeryError, match="more than rounding"):
            compressor.compact(into=wide())
    assert compressor.model is model
    train(model, optimizer, 10)
    assert compressor.compact().params_after <= 0.3 * compressor.plan.params


def test_a_model_that_is_cast_after_planning_is_refused_in_the_first_step():
    model = wide()
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    laconic.Compressor(model, optimizer, budget=THIRD, total_steps=20, example_inputs=(X,))
    model.to(torch.bfloat16)
    with pytest.raises(
        laconic.SurgeryError, match=r"torch.bfloat16 on cpu in the first step, and were torch.float32 on cpu.*build it after"
    ):
        train(model, optimizer, 1, X.bfloat16())


def test_packed_state_is_neither_carried_nor_sliced():
    """It says that it has the shape of the weight, as the 8-bit state of torchao does."""
    model = wide()
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    weight = model[2].weight
    assert unknown_state(optimizer, weight) is None
    moment = optimizer.state[weight]["exp_avg"]
    optimizer.state[weight]["exp_avg"] = TwoTensor(moment, moment)
    assert unknown_state(optimizer, weight) == "exp_avg"
    of_all = [Replacement(p, p, lambda x: x) for p in model.parameters()]
    assert [r.old is weight for r, _ in states_to_slice(optimizer, of_all)] == [False] * 5


def test_state_that_cannot_be_sliced_is_said():
    model = wide()
    optimizer = optim.Adafactor(model.parameters(), lr=1e-2)
    laconic.Compressor(model, optimizer, laconic.Channels(), budget=THIRD, total_steps=20, example_inputs=(X,))
    with pytest.warns(UserWarning, match=r"2\.weight.*the optimizer's state could not be sliced with the neurons, and starts anew"):
        train(model, optimizer, 10)


def test_an_optimizer_whose_state_cannot_be_carried_may_come_after_a_cut(monkeypatch):
    """What is cut already stays at its rank."""
    monkeypatch.setattr(laconic.compressor, "FIRST_CUT", 10.0)
    model = wide()
    optimizer: optim.Optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    compressor = laconic.Compressor(model, optimizer, laconic.LowRank(), budget=laconic.Budget(params=0.15), total_steps=60, every=2)
    done = 0
    while not compressor.metrics()["laconic/cuts"]:
        train(model, optimizer, 1)
        done += 1
    optimizer = optim.Adafactor(model.parameters(), lr=1e-2)
    compressor.move_to(optimizer)
    with pytest.warns(UserWarning, match=r"cut at compact\(\) alone"):
        train(model, optimizer, 60 - done)
    report = compressor.compact()
    assert report.params_after <= 0.15 * report.params_before


@pytest.mark.parametrize("build", [lambda p: optim.AdamW(p, lr=0.01), lambda p: optim.SGD(p, lr=0.01)], ids=["adamw", "sgd"])
def test_a_layer_without_a_gradient_does_not_hide_what_its_optimizer_is(build):
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unused = wide(), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Unused()
    optimizer = build(model.parameters())
    compressor = laconic.Compressor(model, optimizer, laconic.LowRank(), budget=laconic.Budget(params=0.2), total_steps=20)
    train(model, optimizer, 20)
    assert model.unused.__class__ is nn.Sequential
    assert ("unused.weight" in compressor.state.gradient_scales) == isinstance(optimizer, optim.SGD)
