"""Whole neurons under a budget: the proximal step, what is priced how, and runs in which ranks and neurons go together."""

import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import pickle
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn, optim

import laconic
from laconic import timing
from laconic.budget import shapes_for_budget
from laconic.compaction import spectra
from laconic.costs import present_costs
from laconic.measure import count_macs, count_params
from laconic.models import GPT
from laconic.moments import InputMoments
from laconic.plan import make_plan
from laconic.slimming import difference, importances_of, slim_neurons, watch_inputs
from laconic.timing import RankTimes
from laconic.walk import Walk, most_important
from laconic.widths import choose_shapes

from .architectures import CASES, Basic, Net, conv
from .models import assert_same, cnn, inputs_for, mlp, set_clock, slow_but_for, snapshot
from .test_graph import HalfTrunk
from .test_shrinking import IMAGE, NETWORKS, Residual, noise, train, wide_mlp

BOTH = (laconic.LowRank(), laconic.Channels())
ROWS = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
STRUCTURES = {"neurons": (laconic.Channels(),), "both": BOTH}


def compressor_for(model: nn.Module, shape: tuple[int, ...], structures=BOTH, **options) -> laconic.Compressor:
    optimizer = options.pop("optimizer", None) or optim.AdamW(model.parameters(), lr=1e-3)
    return laconic.Compressor(model, optimizer, structures, example_inputs=(noise(model, shape, 0),), **{"every": 1, **options})


@pytest.fixture(autouse=True)
def no_clock(monkeypatch, tmp_path):
    """Layer times are made up (in proportion to parameters), so that nothing depends on the machine, or waits for it."""

    def measured(module, unfolding, shape, break_even, training):
        ranks = timing.grid(break_even)
        return timing.RankTimes(unfolding.dense_params / 1000, ranks, tuple(r * unfolding.unit_params / 1000 for r in ranks))

    monkeypatch.setattr("laconic.timing._measure", measured)
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))


# ---- the proximal step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["relative", "absolute"])
@pytest.mark.parametrize("penalty", [laconic.L1(), laconic.LogSum(0.1)], ids=lambda p: type(p).__name__)
def test_each_row_with_its_bias_is_shrunk_by_the_prox_of_its_norm(scale, penalty):
    model = mlp()
    plan = make_plan(model, [laconic.Channels(penalty=penalty, scale=scale)], (inputs_for(model),))
    site, layer = plan.neurons[0], model[0]
    rows = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    norms = rows.norm(dim=1)
    tau = 0.3
    unit = norms.square().mean().sqrt() if scale == "relative" else torch.tensor(1.0, dtype=torch.float64)
    weighted = tau if scale == "relative" else tau * rows.shape[1] ** 0.5
    wanted = rows * (unit * penalty.prox(norms / unit, weighted) / norms)[:, None]
    result = site.structure.shrink(site, tau)
    found = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(result.values, wanted.norm(dim=1))
    assert result.rank == int((wanted.norm(dim=1) > 0).sum())


def test_the_rows_of_a_pair_are_those_of_its_product():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 4)
    ).double()
    plan = make_plan(model, BOTH, (torch.randn(2, 3, 8, 8, dtype=torch.float64),))
    conv = plan.sites[1]
    laconic.compaction.cut_sites(model, plan, spectra(plan), {s.name: 3 if s is conv else None for s in plan.sites})
    group = next(g for g in plan.neurons if g.name == "2")
    x = torch.randn(1, 16, 6, 6, dtype=torch.float64)
    before = model[2](x)
    norms = group.structure.values(group)
    shrunk = group.structure.shrink(group, 0.5).values
    factors = (shrunk / norms)[None, :, None, None]
    assert 0 < float(factors.min()) < 1
    torch.testing.assert_close(model[2](x), before * factors)  # rows and biases alike


def test_sums_tie_the_rows_of_all_layers_that_put_the_units_out():
    model = Residual(8)
    plan = make_plan(model, [laconic.Channels()], (torch.randn(IMAGE),))
    stream = next(g for g in plan.neurons if g.name == "stem")
    assert {e.path for e in stream.group.producers} == {"stem", "blocks.0.3", "blocks.1.3"}
    rows = torch.cat(
        [torch.cat([m.weight.flatten(1), m.bias[:, None]], 1) for m in (model.stem, model.blocks[0][3], model.blocks[1][3])], 1
    )
    torch.testing.assert_close(stream.structure.values(stream), rows.detach().double().norm(dim=1))


def test_importance_is_the_variance_that_the_consumers_would_lose():
    model = cnn(torch.float64).train()
    x = inputs_for(model, 64)
    plan = make_plan(model, [laconic.Channels()], (x,))
    moments = watch_inputs(model, plan, [x])
    group = plan.neurons[1]  # the second convolution, flattened into the linear layer
    with torch.no_grad():
        seen = model.eval()[:7](x)
    lost = (model[7].weight.detach().square() * seen.var(0, correction=0)).sum(0).reshape(12, 9).sum(1)
    np.testing.assert_allclose(importances_of(plan, moments)[group.name], (lost / lost.sum()).numpy(), rtol=1e-9)
    torch.testing.assert_close(moments["7"].mean, seen.mean(0))


# ---- prices and shapes ----------------------------------------------------------------------------------------------


def faint() -> nn.Sequential:
    """The first half of its units hardly says anything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[:20] *= 1e-3
            layer.bias[:20] *= 1e-3
    return model


MANY = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
SEEN = {"one input": (MANY[:1], None), "many": (MANY, None), "calibration": (MANY[:1], [MANY[:128], MANY[128:]])}


@pytest.mark.parametrize("case", SEEN)
@torch.no_grad()
def test_the_faintest_units_go_however_little_was_seen(case):
    """The variance over one input is 0 for every unit."""
    inputs, calibration = SEEN[case]
    model = faint()
    before = model(MANY)
    report = laconic.compress(model, laconic.Channels(), laconic.Budget(params=0.4), example_inputs=(inputs,), calibration=calibration)
    assert float((model(MANY) - before).norm() / before.norm()) < 0.01
    said = [note for note in report.notes if note.startswith("neurons of 0, 2 were chosen by the weights alone")]
    assert len(said) == (case == "one input")


@pytest.mark.parametrize("calibration", [False, True], ids=["last step of training", "calibration"])
def test_a_cut_at_the_end_goes_by_training_or_by_calibration(calibration):
    """With the calibration's inputs, the first half of the units is silent; in training they are the others."""
    model = faint()
    with torch.no_grad():
        model[0].weight[:, 0] = torch.where(torch.arange(40) < 20, 3.0, 0.0)  # the first half hears the first input alone
        model[0].bias.zero_()
    optimizer = optim.SGD(model.parameters(), lr=1e-6)
    compressor = laconic.Compressor(
        model, optimizer, laconic.Channels(include="0", strength=0.0), budget=laconic.Budget(params=0.6), cut="end", every=1, total_steps=4, example_inputs=(MANY[:1],)
    )  # fmt: skip
    for _ in range(4):
        model(torch.eye(8)[:1] * torch.linspace(-3, 3, 32)[:, None]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    silent = MANY.clone()
    silent[:, 0] = 0
    compressor.compact(calibration=iter([silent]) if calibration else None)
    kept = set(compressor.plan.neurons[0].kept.tolist())
    assert len(kept) < 30
    heard = set(range(20, 40) if calibration else range(20))
    assert kept <= heard or kept >= heard


def test_units_that_a_penalty_has_zeroed_go_even_where_the_budget_has_room():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    structure = laconic.Channels(penalty=laconic.KeepLargest(8))
    compressor = compressor_for(model, (16,), structure, optimizer=optimizer, budget=laconic.Budget(params=0.5), total_steps=20)
    train(model, optimizer, (16,), 20)
    compressor.compact()
    assert [layer.out_features for layer in model[::2]] == [8, 8, 4]


@pytest.mark.parametrize("currency", ["params", "macs"])
@pytest.mark.parametrize("structures", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize(("build", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_the_walk_prices_a_shape_as_it_will_cost(build, shape, structures, currency):
    """What the walk says that its shape costs is what the model costs that is cut to it."""
    model = build()
    x = (noise(model, shape, 0),)
    plan = make_plan(model, structures, x)
    values = spectra(plan)
    budget = laconic.Budget(**{currency: 0.5})
    importances = importances_of(plan, {})
    walk = choose_shapes(plan, values, importances, budget.currencies, budget.limits(plan))
    slim_neurons(model, plan, importances, walk.kept(), example_inputs=x)
    np.testing.assert_allclose(present_costs(plan, [currency], walk.ranks), walk.spent, rtol=1e-9)
    laconic.compaction.cut_sites(model, plan, spectra(plan), walk.ranks)
    count = count_params(model) if currency == "params" else count_macs(model, x)
    assert walk.spent[0] == pytest.approx(
        count, rel=0.02 if isinstance(model, GPT) and currency == "macs" else 1e-9
    )  # fewer heads: less attention


def test_a_shape_for_any_budget_keeps_the_most_important_units():
    model = wide_mlp()
    x = (noise(model, (8, 64), 0),)
    plan = make_plan(model, [laconic.Channels()], x)
    importances = importances_of(plan, {})
    kept, _ = shapes_for_budget(plan, {}, importances, laconic.Budget(params=0.3))
    for group in plan.neurons:
        stay = kept[group.name]
        assert 0 < len(stay) < group.group.units
        assert importances[group.name][stay].min() >= np.delete(importances[group.name], stay).max()


@pytest.mark.parametrize("budget", [laconic.Budget(params=0.1), laconic.Budget(params=0.3, macs=0.4)], ids=["one", "two bounds"])
@pytest.mark.parametrize(("build", "shape"), [NETWORKS["CNN with BatchNorm"], NETWORKS["residual CNN"]], ids=["CNN", "residual"])
def test_the_walk_takes_the_cheapest_of_all_steps_every_time(build, shape, budget):
    """Against a walk that looks at every step anew."""
    plan = make_plan(build(), BOTH, (noise(build(), shape, 0),))
    arguments = (plan, spectra(plan), importances_of(plan, {}), budget.currencies, budget.limits(plan), frozenset())
    walk, plain = (laconic.walk.Walk(*arguments) for _ in range(2))
    walk.down()
    items = {x.name: x for x in (*plan.neurons, *plan.sites)}
    while np.any(plain.spent > plain.limits):
        steps = [(step[0], name, step[1]) for name, item in items.items() if (step := plain.best(item)) is not None]
        _, name, to = min(steps)
        plain.go(items[name], to)
        plain.weights = plain.currency_weights()
    assert (walk.units, walk.ranks) == (plain.units, plain.ranks)


def test_of_equals_the_first_stay():
    assert most_important(np.array([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]


def test_the_cheaper_of_two_equally_important_units_goes():
    """Two hidden layers, the second read by a much wider one: its units are dearer, at the same share."""
    model = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 400))
    plan = make_plan(model, [laconic.Channels()], (torch.randn(2, 10),))
    equal = {g.name: np.full(40, 1 / 40) for g in plan.neurons}
    kept, _ = shapes_for_budget(plan, {}, equal, laconic.Budget(params=0.6))
    assert len(kept["2"]) < len(kept["0"])


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "currency"),
    slow_but_for([(0.1, "macs")], [(0.8, "params"), (0.5, "macs"), (0.25, "params"), (0.1, "macs"), (0.05, "params")]),
)
@pytest.mark.parametrize("structures", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize(("build", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_every_budget_is_met_from_below_within_one_percent(build, shape, structures, share, currency):
    model = build()
    try:
        compressor = compressor_for(model, shape, structures, budget=laconic.Budget(**{currency: share}), total_steps=20)
    except laconic.InfeasibleBudgetError as error:
        assert share < error.smallest  # noqa: PT017
        share = error.smallest
        compressor = compressor_for(model, shape, structures, budget=laconic.Budget(**{currency: share}), total_steps=20)
    train(model, compressor.optimizers[0], shape, 20)
    report = compressor.compact()
    profile = laconic.measure.profile(model, (noise(model, shape, 0),), latency=False)
    dense, after = (report.params_before, profile.params) if currency == "params" else (report.macs_before, profile.macs)
    assert after <= share * dense
    assert after == (report.params_after if currency == "params" else report.macs_after)
    assert after > (share - 0.01) * dense or not further(compressor, currency, share * dense) or isinstance(model, GPT)
    assert report.surgery_error < 1e-3
    held = [p for g in compressor.optimizers[0].param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(list(model.parameters()))
    train(model, compressor.optimizers[0], shape, 2)


def further(compressor: laconic.Compressor, currency: str, limit: float) -> list[str]:
    """Sites and groups of which one more unit would fit."""
    plan = compressor.plan
    ranks = {s.name: s.rank for s in plan.sites}
    fits = [
        s.name
        for s in plan.sites
        if s.rank is not None and s.rank < s.break_even and present_costs(plan, [currency], ranks | {s.name: s.rank + 1})[0] <= limit
    ]
    walk = laconic.walk.Walk(plan, {}, {}, (currency,), np.array([limit]), frozenset())
    fits += [
        g.name
        for g in plan.neurons
        if len(g.kept) < g.group.units and (walk.spent + walk.change(walk.resized(g, len(g.kept) + 1)))[0] <= limit
    ]
    return fits


def test_neurons_go_on_the_way_and_never_come_back():
    build, shape = NETWORKS["CNN with BatchNorm"][0], (8, *IMAGE[1:])
    compressor = compressor_for(build(), shape, budget=laconic.Budget(params=0.1), total_steps=100)
    kept = []
    for t in range(100):
        train(compressor.model, compressor.optimizers[0], shape, range(t, t + 1))
        kept.append({g.name: set(g.kept.tolist()) for g in compressor.plan.neurons})
        for name, importance in compressor.state.importances.items():  # of the units that are there, a share for each
            assert len(importance) == len(kept[-1][name])
            assert importance.sum() == pytest.approx(1)
    for name in kept[0]:
        over = [k[name] for k in kept]
        assert all(later <= earlier for earlier, later in itertools.pairwise(over))
        assert len(set(map(len, over[50:]))) == 1
    assert sum(map(len, kept[30].values())) < sum(map(len, kept[0].values()))  # long before the structure is final


def to_be_resumed(seed: int) -> laconic.Compressor:
    torch.manual_seed(seed)
    return compressor_for(NETWORKS["CNN with BatchNorm"][0](), IMAGE, budget=laconic.Budget(params=0.15), total_steps=24, every=3)


@functools.cache
def uninterrupted() -> tuple[list, dict]:
    """The states before each step and at the end, and the report."""
    whole = to_be_resumed(0)
    states = []
    for t in range(24):
        states.append(snapshot(whole, whole.model, whole.optimizers[0]))
        train(whole.model, whole.optimizers[0], IMAGE, range(t, t + 1))
    return [*states, snapshot(whole, whole.model, whole.optimizers[0])], whole.compact().to_json()


@pytest.mark.parametrize("at", slow_but_for((1, 6, 12, 20), range(1, 24)))
def test_a_run_resumed_at_any_step_ends_bit_identical(at):
    states, report = uninterrupted()
    resumed = to_be_resumed(at)
    for part, state in zip((resumed, resumed.model, resumed.optimizers[0]), copy.deepcopy(states[at]), strict=True):
        part.load_state_dict(state)
    train(resumed.model, resumed.optimizers[0], IMAGE, range(at, 24))
    assert_same(snapshot(resumed, resumed.model, resumed.optimizers[0]), states[-1])
    assert_same(resumed.compact().to_json(), report)


def test_a_validation_between_two_steps_changes_nothing():
    shape, found = IMAGE, []
    for validate in (False, True):
        torch.manual_seed(0)
        compressor = compressor_for(NETWORKS["CNN with BatchNorm"][0](), shape, budget=laconic.Budget(params=0.2), total_steps=20, every=2)
        for t in range(20):
            if validate:
                compressor.model.eval()(100 * torch.randn(shape, generator=torch.Generator().manual_seed(t)))
                compressor.model.train()
            train(compressor.model, compressor.optimizers[0], shape, range(t, t + 1))
        found.append(snapshot(compressor.model))
    assert_same(*found)


def test_a_run_that_ends_early_is_cut_all_the_same():
    build, shape = NETWORKS["CNN with BatchNorm"]
    model = build()
    compressor = compressor_for(model, shape, budget=laconic.Budget(params=0.2), total_steps=100)
    train(model, compressor.optimizers[0], shape, 25)
    with pytest.warns(UserWarning, match="ended after 25 of 100 steps"):
        report = compressor.compact()
    assert report.params_after == count_params(model) <= 0.2 * report.params_before


def test_a_resumed_run_uses_the_times_it_was_begun_with():
    """Also of layers that have lost channels since."""

    def run() -> laconic.Compressor:
        torch.manual_seed(0)
        return compressor_for(wide_mlp(), (8, 64), budget=laconic.Budget(params=0.3, latency_ms=1e6), total_steps=20)

    whole = run()
    train(whole.model, whole.optimizers[0], (8, 64), 6)
    assert any(s.unfolding != s.whole for s in whole.plan.sites)
    saved = snapshot(whole, whole.model, whole.optimizers[0])
    resumed = run()
    for part, state in zip((resumed, resumed.model, resumed.optimizers[0]), saved, strict=True):
        part.load_state_dict(state)
    assert [s.times for s in resumed.plan.sites] == [s.times for s in whole.plan.sites]


def test_the_result_loads_into_the_dense_class(tmp_path):
    build, shape = NETWORKS["residual CNN"]
    model = build()
    compressor = compressor_for(model, shape, budget=laconic.Budget(params=0.2), total_steps=30)
    train(model, compressor.optimizers[0], shape, 30)
    report = compressor.compact()
    assert any(g.kept < g.units for g in report.groups)
    assert {x.outcome for x in report.layers} <= {"dense", "slim", "low-rank", "both"}
    laconic.save(model, tmp_path / "compact")
    again = laconic.load(tmp_path / "compact", build())
    x = noise(model, shape, 5)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))
    assert laconic.CompactReport.from_json(report.to_json()) == report


def test_a_trained_model_is_cut_without_training_too():
    model = Residual(32)
    x = torch.randn(IMAGE)
    report = laconic.compress(model, BOTH, laconic.Budget(macs=0.5), example_inputs=(x,), calibration=[x])
    assert count_macs(model, (x,)) == report.macs_after <= 0.5 * report.macs_before
    assert report.macs_after > 0.49 * report.macs_before


class Graph(nn.Module):
    """A graph network: neighbours are added up by a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
        return neighbours @ self.b((neighbours @ self.a(x)).relu())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("structures", STRUCTURES.values(), ids=STRUCTURES)
def test_example_inputs_may_be_sparse(layout, structures):
    made = (torch.eye(50) + torch.eye(50).roll(1, 0)).to_sparse()
    inputs = torch.randn(50, 8), made if layout == "coo" else made.to_sparse_csr()
    model = Graph()
    report = laconic.compress(model, structures, laconic.Budget(params=0.5), example_inputs=inputs)
    assert report.params_after <= 0.5 * report.params_before
    assert report.max_abs_diff > 0
    with pytest.raises(laconic.NonFiniteError, match=r"example_inputs\[1\] holds NaN or Inf"):
        laconic.compress(Graph(), structures, laconic.Budget(params=0.5), example_inputs=(inputs[0], inputs[1] * torch.inf))


def test_beside_an_energy_neurons_stay_and_that_is_said():
    x = torch.randn(IMAGE)
    report = laconic.compress(Residual(32), BOTH, energy=0.5, example_inputs=(x,))
    assert all(group.kept == group.units for group in report.groups)
    assert any("Channels has no effect beside energy=" in note for note in report.notes)


@pytest.mark.parametrize("post_hoc", [True, False])
def test_calibration_that_chooses_neurons_is_not_said_to_have_had_no_effect(post_hoc):
    model, budget, calibration = mlp(torch.float32), laconic.Budget(params=0.5), [torch.randn(64, 6)]
    options = {"budget": budget, "example_inputs": (calibration[0][:1],)}
    if post_hoc:
        report = laconic.compress(model, laconic.Channels(), calibration=calibration, **options)
    else:
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        compressor = laconic.Compressor(model, optimizer, laconic.Channels(), cut="end", total_steps=10, **options)
        with pytest.warns(UserWarning, match="no step of SGD was seen"):
            report = compressor.compact(calibration=calibration)
    assert any(group.kept < group.units for group in report.groups)
    assert not any("calibration had no effect" in note for note in report.notes)


def test_a_slim_model_can_be_slimmed_again():
    model = Residual(32)
    x = torch.randn(IMAGE)
    first = laconic.compress(model, laconic.Channels(), laconic.Budget(params=0.6), example_inputs=(x,))
    second = laconic.compress(model, BOTH, laconic.Budget(params=0.5), example_inputs=(x,))
    assert second.params_before == first.params_after
    assert second.params_after == count_params(model) <= 0.5 * first.params_after


def test_what_units_put_out_on_the_average_goes_to_the_biases_of_their_consumers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 5)).double()
    with torch.no_grad():
        model[0].weight[10:] *= 1e-3  # nearly constant
        model[0].bias[10:] += 1
    x = torch.randn(200, 6, dtype=torch.float64)
    before = model(x)
    laconic.compress(model, laconic.Channels(), laconic.Budget(params=0.4), example_inputs=(x,))
    assert model[0].out_features < 14
    assert float((model(x) - before).detach().abs().max()) < 0.01


def test_a_strength_alone_removes_exactly_the_neurons_that_are_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(64, 6, dtype=torch.float64)
    structures = laconic.Channels(penalty=laconic.L1(), strength=0.4)
    compressor = laconic.Compressor(model, optimizer, structures, example_inputs=(x,), every=1)
    for _ in range(60):
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    alive = int((torch.cat([model[0].weight, model[0].bias[:, None]], 1).norm(dim=1) > 0).sum())
    before = model(x)
    compressor.compact()
    assert 0 < alive < 20
    assert model[0].out_features == alive
    torch.testing.assert_close(model(x), before)


def test_multiples_that_the_hardware_likes():
    model = wide_mlp()
    structures = (laconic.Channels(multiple=8),)
    report = laconic.compress(model, structures, laconic.Budget(params=0.4), example_inputs=(noise(model, (8, 64), 0),))
    assert [g.kept % 8 for g in report.groups] == [0, 0]


@pytest.mark.parametrize(("share", "multiple"), [(0.5, 4), (0.5, 16), (0.1, 4), (0.1, 16), (0.04, 4)])
def test_ranks_keep_to_their_multiples_beside_neurons(share, multiple):
    model = wide_mlp()
    plan = make_plan(model, [laconic.LowRank(multiple=multiple), laconic.Channels()], (noise(model, (8, 64), 0),))
    budget, values = laconic.Budget(params=share), spectra(plan)
    importances = {g.name: np.full(len(g.kept), 1 / len(g.kept)) for g in plan.neurons}  # all alike: none is cheap
    values = {name: v * 0.5 ** np.arange(len(v)) for name, v in values.items()}  # ranks are
    _, ranks = shapes_for_budget(plan, values, importances, budget)
    cut = {s.name: (s, r) for s in plan.sites if (r := ranks[s.name]) is not None}
    assert cut
    assert all(r % multiple == 0 or s.break_even < multiple for s, r in cut.values())


def test_a_budget_that_multiples_cannot_meet_is_refused_before_training():
    with pytest.raises(laconic.InfeasibleBudgetError, match="smallest feasible: params="):
        compressor_for(
            wide_mlp(),
            (8, 64),
            structures=[laconic.LowRank(multiple=16), laconic.Channels(multiple=16)],
            budget=laconic.Budget(params=0.04),
            total_steps=20,
        )


BAD = {
    "no example inputs": (lambda: laconic.compress(mlp(), laconic.Channels(), laconic.Budget(params=0.5)), "Channels needs example_inputs"),
    "claimed twice": (
        lambda: laconic.compress(
            mlp(), [laconic.Channels(), laconic.Channels()], laconic.Budget(params=0.5), example_inputs=(inputs_for(mlp()),)
        ),
        "0 is claimed by 2 Channels structures",
    ),
    "excluded all": (
        lambda: laconic.compress(mlp(), laconic.Channels(exclude="*"), laconic.Budget(params=0.5), example_inputs=(inputs_for(mlp()),)),
        "nothing to compress",
    ),
    "include and exclude the same": (
        lambda: laconic.compress(
            mlp(), laconic.Channels(include="0", exclude="0"), laconic.Budget(params=0.5), example_inputs=(inputs_for(mlp()),)
        ),
        "nothing to compress",
    ),
    "pattern": (
        lambda: laconic.compress(mlp(), laconic.Channels(include="9"), laconic.Budget(params=0.5), example_inputs=(inputs_for(mlp()),)),
        "include='9' matches no module",
    ),
    "multiple": (lambda: laconic.Channels(multiple=0), "multiple = 0"),
    "alpha": (lambda: laconic.sparse_group_lasso(1.0, 1.5), "alpha = 1.5"),
    "entries without training": (
        lambda: laconic.compress(mlp(), laconic.Entries(strength=1.0), laconic.Budget(params=0.5)),
        "in training only",
    ),
    "entries and a budget": (
        lambda: laconic.Compressor(
            mlp(), optim.SGD(mlp().parameters(), lr=0.1), laconic.Entries(strength=1.0), budget=laconic.Budget(params=0.5), total_steps=9
        ),
        "save nothing that a budget counts",
    ),
    "penalty": (lambda: laconic.Channels(penalty=3), "penalty = 3"),
    "out of reach": (
        lambda: laconic.compress(mlp(), laconic.Channels(), laconic.Budget(params=0.01), example_inputs=(inputs_for(mlp()),)),
        "smallest feasible: params=0",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_clear_line(call, message):
    with pytest.raises(laconic.LaconicError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_smallest_feasible_budget_that_is_named_is_feasible_and_tight():
    x = (noise(wide_mlp(), (8, 64), 0),)
    for structures in STRUCTURES.values():
        with pytest.raises(laconic.InfeasibleBudgetError) as caught:
            laconic.compress(wide_mlp(), structures, laconic.Budget(params=1e-4), example_inputs=x)
        smallest = caught.value.smallest
        laconic.compress(wide_mlp(), structures, laconic.Budget(params=smallest), example_inputs=x)
        with pytest.raises(laconic.InfeasibleBudgetError):
            laconic.compress(wide_mlp(), structures, laconic.Budget(params=smallest - 2e-4), example_inputs=x)


def test_the_plan_shows_every_group_and_why_others_stay():
    model = cnn()
    text = str(make_plan(model, [laconic.Channels(exclude="3")], (inputs_for(model),)))
    assert "0  " in text
    assert "8 units" in text
    assert "not selected by include= / exclude=" in text
    assert "an output of the model" in text


def test_momentum_and_groups_of_the_optimizer_are_sliced_in_mid_run():
    build, shape = NETWORKS["MLP"]
    model = build()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1]},
    ]
    optimizer = optim.SGD(groups, lr=0.05, momentum=0.9)
    compressor = compressor_for(model, shape, (laconic.Channels(),), optimizer=optimizer, budget=laconic.Budget(params=0.3), total_steps=30)
    train(model, optimizer, shape, 30)
    assert compressor.state.settled
    for group, ndim in zip(optimizer.param_groups, (2, 1), strict=True):
        assert all(p.ndim == ndim for p in group["params"])
        assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in group["params"])


# ---- entries, and the sparse group lasso ----------------------------------------------------------------------------


def test_entries_then_neurons_is_the_prox_of_the_sparse_group_lasso():
    """Optimality: of 1/2 |x - w|^2 + tau ((1 - alpha) sqrt(P) sum_u |x_u| + alpha |x|_1), by its subgradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 2)).double()
    before = model[0].weight.detach().clone()
    tau, alpha = 0.3, 0.4
    structures = laconic.sparse_group_lasso(1.0, alpha, include="0")
    plan = make_plan(model, structures, (torch.randn(2, 5, dtype=torch.float64),))
    for site in (*plan.entries, *plan.neurons):
        site.structure.shrink(site, tau * site.structure.strength)
    x = model[0].weight.detach()
    for old, new in zip(before, x, strict=True):
        weight = tau * (1 - alpha) * 5**0.5
        if float(new.norm()) > 0:
            residual = old - new - weight * new / new.norm()  # must be tau alpha times a subgradient of |x|_1
            torch.testing.assert_close(residual[new != 0], tau * alpha * new.sign()[new != 0])
            assert bool((residual[new == 0].abs() <= tau * alpha + 1e-12).all())
        else:
            assert float((old.abs() - tau * alpha).clamp_min(0).norm()) <= weight + 1e-12
    assert 0 < int((x == 0).sum()) < x.numel()


def test_a_run_under_the_sparse_group_lasso_says_what_its_zeros_are_good_for():
    model = mlp()
    x = inputs_for(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, laconic.sparse_group_lasso(0.2, 0.5), example_inputs=(x,), every=1)
    for _ in range(30):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = compressor.state_dict()
    report = compressor.compact()
    assert any("% of the entries of 0.weight are zero" in note for note in report.notes)
    assert any("entries of 0.weight" in name for name in state["names"])


# ---- structured sparsity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", [(), (0,), (1, 2, 3), (0, 2, 3), range(5)], ids=str)
def test_slices_are_shrunk_by_the_prox_of_their_norms(over):
    """Optimality of 1/2 |X - W|^2 + tau sum_g |X_g|: X_g is in the direction of W_g, and shorter by tau, or zero."""
    conv = nn.Conv2d(3, 4, 3).double()
    model = nn.Sequential(conv)
    old = conv.weight.detach().clone()
    (site,) = make_plan(model, [laconic.Entries(strength=1.0, scale="absolute", over=over)]).entries
    rest = [d for d in range(4) if d not in over]
    slices = old.permute(*rest, *[d for d in range(4) if d in over]).reshape(math.prod(old.shape[d] for d in rest), -1)
    tau = float(slices.norm(dim=1).median())
    result = site.structure.shrink(site, tau)
    new = conv.weight.detach().permute(*rest, *[d for d in range(4) if d in over]).reshape(slices.shape)
    assert result.rank == int((new.norm(dim=1) > 0).sum()) == len(slices) // 2
    for before, after in zip(slices, new, strict=True):
        wanted = before * max(1 - tau / float(before.norm()), 0.0)
        torch.testing.assert_close(after, wanted)


def test_dimensions_that_a_weight_does_not_have_are_left_out():
    linear = nn.Linear(3, 4)
    (site,) = make_plan(nn.Sequential(linear), [laconic.Entries(strength=1.0, over=(0, 2, 3))]).entries
    torch.testing.assert_close(site.structure.values(site), linear.weight.detach().double().norm(dim=0, keepdim=True))


def test_structured_sparsity_removes_what_its_groups_make_useless():
    """Columns that are zero take neurons of the layer before; of a branch whose last weight is zero one hidden unit is left."""
    model = Residual(16).double()
    structures = laconic.structured_sparsity(filters=1.0, channels=1.0, shapes=1.0, depth=1.0)
    assert [s.over for s in structures[:-1]] == [(0, 2, 3, 4), (0,), (0, 1, 2, 3, 4)]
    x = torch.randn(IMAGE, dtype=torch.float64)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, structures, example_inputs=(x,))
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    last, other = model.blocks[0][3], model.blocks[1][3]
    with torch.no_grad():
        last.weight.zero_()  # depth: the whole weight
        other.weight[:, 3:].zero_()  # channels: nothing reads these hidden units
    before = model.eval()(x)
    report = compressor.compact()
    torch.testing.assert_close(model(x), before)
    assert [model.get_submodule(n).out_channels for n in convs] == [16, 1, 16, 3, 16]
    assert any("over (0,)" in note for note in report.notes)


def test_columns_pressed_to_zero_in_training_go():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    x = torch.randn(64, 6, dtype=torch.float64)
    y = x[:, :3].tanh()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    structures = laconic.structured_sparsity(channels=0.03, exclude="0")
    compressor = laconic.Compressor(model, optimizer, [*structures[:-1], laconic.Channels(strength=0.0)], example_inputs=(x,), every=1)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    unread = int((model[2].weight == 0).all(0).sum())
    before = model(x)
    compressor.compact()
    assert 0 < unread < 30
    assert model[0].out_features == 30 - unread
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("over", [(-1,), ("out",), (True,)])
def test_slices_over_no_dimension_are_refused(over):
    with pytest.raises(laconic.InvalidValueError, match=r"over = .*dimensions of a weight"):
        laconic.Entries(strength=1.0, over=over)


DEFAULTS = {
    "trains on": (lambda m, x: laconic.Compressor(m, optim.SGD(m.parameters(), 0.1), budget=laconic.Budget(params=0.5), total_steps=9, example_inputs=x).plan, True),
    "cut at the end": (
        lambda m, x: laconic.Compressor(m, optim.SGD(m.parameters(), 0.1), budget=laconic.Budget(params=0.5), total_steps=9, example_inputs=x, cut="end").plan, False,
    ),
    "no example inputs": (lambda m, x: laconic.Compressor(m, optim.SGD(m.parameters(), 0.1), budget=laconic.Budget(params=0.5), total_steps=9).plan, False),
}  # fmt: skip


@pytest.mark.parametrize("case", DEFAULTS)
def test_neurons_go_by_default_only_where_training_repairs_it(case):
    model = mlp()
    make, neurons = DEFAULTS[case]
    plan = make(model, (inputs_for(model),))
    assert plan.sites
    assert bool(plan.neurons) is neurons
    assert any("whole neurons stay" in note for note in plan.notes) is not neurons


def test_post_hoc_the_default_is_ranks_alone():
    model = mlp()
    report = laconic.compress(model, budget=laconic.Budget(params=0.4), example_inputs=(inputs_for(model),))
    assert not report.groups
    assert any("whole neurons stay: no training follows" in note for note in report.notes)
    assert any(layer.rank is not None for layer in report.layers)


@pytest.mark.parametrize(
    ("build", "low_rank", "times"),
    [(cnn, laconic.LowRank(), 2), (cnn, laconic.LowRank(inputs=False), 1), (mlp, laconic.LowRank(), 1)],
    ids=["three layers", "pairs only", "perceptron"],
)
def test_a_neuron_counts_twice_where_ranks_can_do_what_it_does(build, low_rank, times):
    """There the walk counts a group's share squared: once for what reads the units, once for what puts them out."""
    model = build()
    plan = make_plan(model, [low_rank, laconic.Channels()], (inputs_for(model),))
    importances = importances_of(plan, {})
    walk = Walk(plan, spectra(plan), importances, ("params",), np.array([np.inf]), frozenset())
    (group, *_) = plan.neurons
    walk.go(group, (5, 0))
    kept = np.sort(importances[group.name])[::-1][:5].sum() / importances[group.name].sum()
    assert walk.gain() == pytest.approx(times * np.log(kept))


def test_narrow_layers_stay_whole_where_a_pair_would_take_longer(monkeypatch, tmp_path):
    """A machine on which a pair takes a third of the layer however low its rank: at first that is a bargain, not for a narrow layer."""
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))

    def measured(module, unfolding, shape, break_even, training):
        ranks = timing.grid(break_even)
        return RankTimes(unfolding.dense_params / 1000, ranks, tuple(0.3 * unfolding.dense_params / 1000 for _ in ranks))

    def clock(model):
        return sum(p.numel() for p in model.parameters() if p.ndim > 1) / 1000

    monkeypatch.setattr("laconic.timing._measure", measured)
    set_clock(monkeypatch, clock)
    model = wide_mlp()
    dense = clock(model)
    compressor = compressor_for(model, (8, 64), budget=laconic.Budget(latency=0.05), total_steps=20)
    train(model, compressor.optimizers[0], (8, 64), 20)
    report = compressor.compact()
    assert clock(model) <= 0.05 * dense
    assert any(layer.rank is None and layer.slim for layer in report.layers)
    assert all(group.kept > 1 for group in report.groups)


@pytest.mark.parametrize("share", [0.6, 0.3])
def test_a_slim_layer_is_timed_as_it_will_be(monkeypatch, empty_table, share):
    """On a machine where a layer of half the weights takes more than half of the time."""

    def clock(model):
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        return sum((m.weight.numel() / 1000) ** 0.6 for m in layers)

    set_clock(monkeypatch, clock)
    model = wide_mlp()
    dense = clock(model)
    compressor = compressor_for(model, (8, 64), structures=laconic.Channels(), budget=laconic.Budget(latency=share), total_steps=20)
    train(model, compressor.optimizers[0], (8, 64), 20)
    compressor.compact()
    assert (share - 0.1) * dense <= clock(model) <= 1.05 * share * dense


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out of memory")], ids=lambda e: type(e).__name__)
def test_where_there_is_no_room_for_a_dense_model_at_the_end_the_report_is_not_lost(monkeypatch, empty_table, error):
    def clock(model):
        return count_params(model) / 1000

    def no_room(*_):
        raise error

    set_clock(monkeypatch, clock)
    model = wide_mlp()
    dense = clock(model)
    compressor = compressor_for(model, (8, 64), budget=laconic.Budget(latency=0.5), total_steps=20)
    train(model, compressor.optimizers[0], (8, 64), 20)
    monkeypatch.setattr("laconic.outcome.relative_latency", no_room)
    report = compressor.compact()
    assert clock(model) < 0.6 * dense
    assert (report.latency_before, report.latency_after) == (None, None)
    assert [note for note in report.notes if note.startswith("not timed beside the dense model")]
    assert str(report)


@pytest.mark.filterwarnings("ignore:laconic. the model is within the budget")
def test_sizes_are_multiples_of_eight_where_milliseconds_count():
    model = wide_mlp()
    inputs = (noise(model, (8, 64), 0),)
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    def plan_for(structures=None, **budget):
        compressor = laconic.Compressor(
            model, optimizer, structures, budget=laconic.Budget(**budget), total_steps=20, example_inputs=inputs
        )
        compressor.detach()
        return compressor.plan

    plan = plan_for(latency_ms=1e6)
    assert {s.structure.multiple for s in plan.sites} == {g.multiple for g in plan.neurons} == {8}
    assert any("multiples of 8" in note for note in plan.notes)
    for other in (plan_for(params=0.5), plan_for([laconic.LowRank(), laconic.Channels()], latency_ms=1e6)):
        assert {s.structure.multiple for s in other.sites} == {g.multiple for g in other.neurons} == {1}
        assert not any("multiples" in note for note in other.notes)


@pytest.mark.parametrize(("multiple", "heads"), [(8, 1), (16, 2), (24, 3)])
def test_a_head_counts_as_the_channels_that_it_has(multiple, heads):
    model = GPT(12, width=32, heads=4, layers=1, context=16)
    plan = make_plan(model, [laconic.Channels(multiple=multiple)], (torch.randint(12, (2, 16)),))
    of = {group.name: group.multiple for group in plan.neurons}
    assert of == {"token": multiple, "blocks.0.query": heads, "blocks.0.up": multiple}


def test_an_end_that_fails_after_the_cuts_gives_back_the_optimizer_and_the_gradients(monkeypatch):
    """Cuts take the states apart entry by entry, and slice the gradients; on an error all of it is there again."""
    model = wide_mlp()
    both = [laconic.LowRank(), laconic.Channels()]
    compressor = compressor_for(model, (8, 64), structures=both, budget=laconic.Budget(params=0.1), total_steps=20, cut="end")
    (optimizer,) = compressor.optimizers
    train(model, optimizer, (8, 64), 5)
    model(noise(model, (8, 64), 5)).square().mean().backward()
    parameters = dict(model.named_parameters())
    gradients = {name: p.grad.clone() for name, p in parameters.items()}
    before = copy.deepcopy(optimizer.state_dict())
    cut = compressor._cut

    def fails(*args, **options):
        cut(*args, **options)
        assert any(p.shape != parameters[n].shape for n, p in model.named_parameters() if n in parameters)
        raise RuntimeError("after the cuts")

    monkeypatch.setattr(compressor, "_cut", fails)
    with pytest.raises(RuntimeError, match="after the cuts"):
        compressor.compact()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert_same(optimizer.state_dict(), before)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in parameters.items())


class Noisy(nn.Module):
    """Random in eval mode, too, as a variational autoencoder is."""

    def __init__(self):
        super().__init__()
        self.inner = wide_mlp()

    def forward(self, x):
        return self.inner(x + 0.1 * torch.randn_like(x))


def test_a_batch_that_is_not_finite_and_whose_step_is_skipped_leaves_no_trace():
    """The step in which the inputs are watched: their means go into biases at the cut."""
    model = wide_mlp()
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    compressor = compressor_for(model, (64,), optimizer=optimizer, budget=laconic.Budget(params=0.3), total_steps=30)
    for t in range(30):
        for bad in (True, False):
            x = noise(model, (8, 64), t)
            x[0, 0] = math.nan if bad else x[0, 0]
            loss = model(x).square().mean()
            if not bad:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert len(compressor.plan.neurons[0].kept) < compressor.plan.neurons[0].group.units
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert compressor.state.moments == {} or all(bool(torch.isfinite(m.mean).all()) for m in compressor.state.moments.values())


class Conditional(nn.Module):
    """A layer that only some calls reach."""

    def __init__(self):
        super().__init__()
        self.a, self.condition, self.b = nn.Linear(16, 64), nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, x, condition=None):
        hidden = self.a(x)
        return self.b((hidden if condition is None else hidden + self.condition(condition)).relu())


@pytest.mark.parametrize("reached_in", [(), (0,), (1,), (0, 2), (20,)], ids=str)  # the first neurons go soon after
def test_a_layer_that_runs_in_training_and_not_on_the_example_inputs_is_told(reached_in):
    model = Conditional()
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    x = (torch.randn(4, 16), torch.randn(4, 8))
    compressor = laconic.Compressor(model, optimizer, BOTH, budget=laconic.Budget(params=0.5), total_steps=200, example_inputs=x[:1])
    told = (
        pytest.warns(UserWarning, match="condition: runs in training, but not on the example") if reached_in else contextlib.nullcontext()
    )
    with torch.no_grad():
        model(*x)  # not a step of the training
    with told as warned:
        for t in range(32):
            model(*x[: 1 + (t in reached_in)]).square().mean().backward()
            optimizer.step()
    assert len(warned or ()) == sum("condition: runs in training" in note for note in compressor.plan.notes) == bool(reached_in)
    assert set(compressor.state.shapes) <= {s.name for s in compressor.plan.sites}


def test_the_watch_for_unreached_layers_stays_out_of_compiled_code():
    model = Conditional()
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    x = (torch.randn(4, 16), torch.randn(4, 8))
    laconic.Compressor(model, optimizer, BOTH, budget=laconic.Budget(params=0.5), total_steps=100, example_inputs=x[:1])
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def train() -> None:
        for _ in range(3):
            compiled(*x).square().mean().backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="condition: runs in training, but not on the example inputs"):  # by the step that is not compiled
        train()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_a_compiled_model_is_watched_as_one_that_is_not():
    """What is compiled does not see hooks that are put on later."""
    gc.collect()  # runs that other tests have left in the middle
    runs = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = wide_mlp()
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        given = torch.compile(model, backend="eager") if compiled else model
        compressor = laconic.Compressor(
            given, optimizer, BOTH, budget=laconic.Budget(params=0.4), total_steps=40, every=2, example_inputs=(ROWS,)
        )
        seen = []
        for _ in range(40):
            given(ROWS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append({name: m.mean.clone() for name, m in compressor.state.moments.items()})
        runs[compiled] = seen, compressor.state.shapes, compressor.compact().notes
    assert any(runs[True][0])
    for plain, seen in zip(runs[False][0], runs[True][0], strict=True):
        torch.testing.assert_close(plain, seen)
    assert runs[True][1:] == runs[False][1:]
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_a_run_that_nobody_holds_any_more_leaves_the_compiler_alone():
    gc.collect()
    model = torch.compile(wide_mlp(), backend="eager")
    compressor = compressor_for(model, (8, 64), budget=laconic.Budget(params=0.4), total_steps=40)
    train(model, compressor.optimizers[0], (8, 64), 1)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"  # shapes are seen in the second step
    del model, compressor
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_neurons_that_go_unwatched_in_mid_run_are_said():
    """Trained in eval mode: no step of training is seen."""
    model = wide_mlp().eval()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    compressor = laconic.Compressor(model, optimizer, BOTH, budget=laconic.Budget(params=0.4), total_steps=40, example_inputs=(ROWS,))
    for _ in range(40):
        model(ROWS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum("chosen by the weights alone" in note for note in compressor.compact().notes) == 1


def test_a_layer_that_the_example_inputs_reach_is_not_told():
    model = Conditional()
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    x = (torch.randn(4, 16), torch.randn(4, 8))
    compressor = laconic.Compressor(model, optimizer, BOTH, budget=laconic.Budget(params=0.5), total_steps=100, example_inputs=x)
    for _ in range(3):
        model(*x).square().mean().backward()
        optimizer.step()
    assert not any("runs in training" in note for note in compressor.plan.notes)
    assert set(compressor.state.shapes) == {s.name for s in compressor.plan.sites}


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda parts: pickle.loads(pickle.dumps(parts))}
OPTIMIZERS = {"sgd": lambda p: optim.SGD(p, lr=0.05, momentum=0.9), "adamw": lambda p: optim.AdamW(p, lr=1e-3)}


@pytest.mark.parametrize(
    ("how", "build", "budget"),
    [
        ("deepcopy", "sgd", laconic.Budget(params=0.3)),
        ("pickle", "adamw", laconic.Budget(params=0.3)),
        ("deepcopy", "adamw", laconic.Budget(latency=0.4)),
        ("pickle", "sgd", laconic.Budget(latency=0.4)),
    ],
)
@pytest.mark.parametrize("at", slow_but_for((5, 12), [0, 1, 5, 12, 30]))
def test_model_optimizer_and_compressor_copied_together_train_on_as_they_would(monkeypatch, at, how, build, budget):
    set_clock(monkeypatch, lambda model: count_params(model) / 1000)
    model = wide_mlp()
    compressor = compressor_for(model, (8, 64), optimizer=OPTIMIZERS[build](model.parameters()), budget=budget, total_steps=40, every=3)

    def go(model, optimizer, steps):
        for t in steps:
            model(noise(model, (8, 64), t)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    go(model, compressor.optimizers[0], range(at))
    twin, other, theirs = COPIES[how]((model, compressor.optimizers[0], compressor))
    assert theirs.model is twin
    assert theirs.optimizers == [other]
    for m, c in ((twin, theirs), (model, compressor)):  # the copy first: it must not lean on the original
        go(m, c.optimizers[0], range(at, 40))
    assert compressor.steps == theirs.steps == 40
    report, wanted = theirs.compact(), compressor.compact()
    assert report.params_after == wanted.params_after < 0.6 * wanted.params_before
    assert_same(snapshot(twin), snapshot(model))


class Held(nn.Sequential):
    compressor = None


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0.0, 0.1])
@pytest.mark.parametrize("at", [0, 1, 5, 11, 20])
def test_a_copy_of_a_model_that_holds_its_compressor_trains_on_as_the_model(at, warmup):
    model = Held(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4), nn.Linear(4, 4))
    options = {
        "budget": laconic.Budget(params=0.3),
        "total_steps": 40,
        "every": 3 if warmup else 1,
        "schedule": laconic.Schedule(warmup=warmup),
    }
    model.compressor = compressor_for(model, (8, 64), **options)
    model.compressor._unreached |= {"3"}  # as if the example inputs did not reach it
    model.compressor._watch_unreached()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, model.compressor.optimizers[0], (8, 64), at)
        twin = copy.deepcopy(model)
        assert twin.compressor.model is twin
        for m in (twin, model):
            for t in range(at, 40):
                m(noise(m, (8, 64), t)).square().mean().backward()
                m.compressor.optimizers[0].step()
                m.compressor.optimizers[0].zero_grad()
    assert twin.compressor.compact().params_after == model.compressor.compact().params_after
    assert_same(snapshot(twin), snapshot(model))
    assert not any(m._forward_pre_hooks for m in (*twin.modules(), *model.modules()))


def test_a_copy_of_a_compressor_that_is_done_stays_so():
    model = wide_mlp()
    compressor = compressor_for(model, (8, 64), budget=laconic.Budget(params=0.3), total_steps=20)
    train(model, compressor.optimizers[0], (8, 64), 20)
    report = compressor.compact()
    twin, theirs = copy.deepcopy((model, compressor))
    train(twin, theirs.optimizers[0], (8, 64), 3)
    assert theirs.steps == 20
    assert theirs.compact() == report


def test_inputs_that_only_some_processes_saw_count(monkeypatch):
    """A layer that another process alone has run: before, each process had moments of its own layers, or a KeyError."""
    layers = nn.ModuleDict({"here": nn.Linear(4, 2), "there": nn.Linear(4, 2)})
    x = torch.randn(10, 4)
    other = InputMoments(dict(layers.items()))
    layers["there"](x)
    sums = other._sums
    mine = InputMoments({"here": layers["here"]})
    layers["here"](x)
    monkeypatch.setattr("laconic.moments.gathered", lambda value: [value, sums])
    found = mine.finish()
    other.drop()
    assert set(found) == {"here", "there"}
    torch.testing.assert_close(found["there"].mean, x.double().mean(0), rtol=1e-5, atol=1e-6)


def test_a_default_device_is_not_where_the_model_is():
    model = wide_mlp()
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(16, 64)
    with torch.device("meta"):
        compressor = laconic.Compressor(
            model,
            optimizer,
            BOTH,
            budget=laconic.Budget(params=0.3),
            total_steps=30,
            example_inputs=(x,),
            schedule=laconic.Schedule(settle=0.5),
        )
        for _ in range(30):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        report = compressor.compact()
    assert report.params_after <= 0.3 * report.params_before
    assert any(g.kept < g.units for g in report.groups)
    assert any(layer.rank is not None for layer in report.layers)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


class Classifier(nn.Module):
    """A model that puts out an object of its own."""

    def __init__(self):
        super().__init__()
        self.net = wide_mlp()

    def forward(self, x):
        return Output(self.net(x))


def test_outputs_may_be_a_dataclass():
    model = Classifier()
    report = laconic.compress(model, BOTH, budget=laconic.Budget(params=0.3), example_inputs=(torch.randn(4, 64),))
    assert report.groups[0].kept < report.groups[0].units
    assert report.max_abs_diff > 0


@pytest.mark.parametrize("fix", ["none", "contiguous", "multiples"])
def test_a_shortcut_that_gets_too_narrow_for_the_kernels_of_the_processor_is_told(fix):
    """The backward pass of PyTorch's CPU library crashes there on some processors: nothing here may run it."""
    model = Net(conv(3, 12), Basic(12, 24, 2), 24)
    if fix != "contiguous":
        model.to(memory_format=torch.channels_last)
    structure = laconic.Channels(multiple=8 if fix == "multiples" else 1)
    budget = laconic.Budget(params=0.25 if fix == "multiples" else 0.12)
    told = pytest.warns(UserWarning, match="body.short.0: a strided 1x1") if fix == "none" else contextlib.nullcontext()
    with told:
        report = laconic.compress(model, [structure], budget=budget, example_inputs=(torch.randn(2, 3, 8, 8),))
    narrow = model.body.short[0].in_channels < 8
    assert narrow == (fix != "multiples")
    assert any("body.short.0: a strided 1x1" in note for note in report.notes) == (fix == "none")


def test_a_model_that_is_random_in_eval_mode_is_cut_as_any_other():
    model = Noisy()
    compressor = compressor_for(model, (8, 64), budget=laconic.Budget(params=0.2), total_steps=20)
    train(model, compressor.optimizers[0], (8, 64), 20)
    report = compressor.compact()
    assert any(g.kept < g.units for g in report.groups)
    assert count_params(model) <= 0.2 * report.params_before


def test_inputs_are_watched_in_the_step_before_a_proximal_step_alone_and_copies_do_not_watch():
    """Half of the run is warm-up: nothing is seen there, and of the rest one step in ten."""
    model = wide_mlp()
    compressor = compressor_for(
        model, (8, 64), budget=laconic.Budget(params=0.5), total_steps=80, every=10, schedule=laconic.Schedule(warmup=0.5, settle=0.9)
    )
    watched = []
    for t in range(70):
        on = compressor._inputs is not None
        watched += [t + 1] if on else []
        if on:
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                twin(noise(model, (8, 64), 0)).sum().backward()
                assert all(hook.see is None for m in twin.modules() for hook in m._forward_pre_hooks.values())
            assert compressor._inputs._sums == {}
        train(model, compressor.optimizers[0], (8, 64), range(t, t + 1))
    assert watched == [40, 50, 60, 70]


def test_detaching_in_a_watched_step_waits_for_no_other_process(monkeypatch):
    model = wide_mlp()
    compressor = compressor_for(model, (8, 64), budget=laconic.Budget(params=0.5), total_steps=80, every=10)
    t = 0
    while compressor._inputs is None:
        train(model, compressor.optimizers[0], (8, 64), range(t, t := t + 1))
    monkeypatch.setattr("laconic.moments.gathered", mock.Mock(side_effect=AssertionError("the other processes were asked")))
    compressor.detach()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_report_says_that_no_step_was_seen_or_one_of_two_optimizers_lagged():
    model = wide_mlp()
    ours, others = optim.SGD(model[:1].parameters(), lr=0.1), optim.Adam(model[1:].parameters(), lr=0.1)
    compressor = compressor_for(model, (8, 64), optimizer=[ours, others], budget=laconic.Budget(params=0.5), total_steps=20)
    train(model, ours, (8, 64), 20)
    with (
        pytest.warns(UserWarning, match="no step of Adam was seen: is that what trains"),
        pytest.warns(UserWarning, match="after 0 of 20 steps"),
    ):
        report = compressor.compact()
    assert any(note.startswith("the run ended after 0 of 20 steps") for note in report.notes)


def test_many_more_steps_than_total_steps_are_told_once():
    model = wide_mlp()
    compressor = compressor_for(model, (8, 64), budget=laconic.Budget(params=0.5), total_steps=10)
    with pytest.warns(UserWarning, match=r"13 optimizer steps, but total_steps = 10") as caught:
        train(model, compressor.optimizers[0], (8, 64), 30)
    assert len([w for w in caught if "total_steps" in str(w.message)]) == 1
    assert any(note.startswith("30 optimizer steps, but total_steps = 10") for note in compressor.compact().notes)


def test_the_report_says_what_a_further_step_would_have_lost(tmp_path):
    """The cheapest steps are taken first: what is left costs more than anything that went; a tighter budget is dearer."""
    reports = []
    for share in (0.4, 0.2):
        torch.manual_seed(0)
        model = wide_mlp()
        compressor = compressor_for(model, (8, 64), budget=laconic.Budget(params=share), total_steps=20)
        train(model, compressor.optimizers[0], (8, 64), 20)
        reports.append(compressor.compact())
    cheapest = [min(x.price for x in (*r.layers, *r.groups) if x.price is not None) for r in reports]
    assert 0 < cheapest[0] < cheapest[1]
    assert "price: what the next rank, or unit, would lose" in str(reports[0])
    assert laconic.CompactReport.from_json(json.loads(json.dumps(reports[0].to_json()))) == reports[0]


def test_the_price_is_the_loss_for_a_percent_of_the_budget():
    build, shape = NETWORKS["MLP"]
    model = build()
    plan = make_plan(model, list(BOTH), (noise(model, shape, 0),))
    values, importances = spectra(plan), importances_of(plan, {})
    limits = laconic.Budget(params=0.3).limits(plan)
    walk = choose_shapes(plan, values, importances, ("params",), limits)
    found = walk.prices()
    walk.weights = 1 / limits
    for item in (*plan.neurons, *plan.sites):
        before, spent = walk.gain(), float(walk.spent[0])
        step = walk.best(item)
        assert (step is None) == (item.name not in found)
        if step is None:
            continue
        again = choose_shapes(plan, values, importances, ("params",), limits)
        again.go(item, step[1])
        percents = 100 * (spent - float(again.spent[0])) / float(limits[0])
        assert found[item.name] == pytest.approx((before - again.gain()) / percents)


@pytest.mark.parametrize(
    ("structures", "words"),
    [(laconic.Channels(), "narrowest; smallest"), (None, "narrowest and every weight at its lowest rank; smallest")],
)
def test_out_of_reach_speaks_of_what_there_is_to_take(structures, words):
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 9))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(laconic.InfeasibleBudgetError, match=f"every layer at its {words} feasible: params=0.0"):
        laconic.Compressor(
            model, optimizer, structures, budget=laconic.Budget(params=0.01), total_steps=20, example_inputs=(torch.randn(4, 6),)
        )


@pytest.mark.parametrize("name", ["scaled", "frozen norm", "attention with temperatures"])
def test_parameters_of_the_models_own_are_counted_and_go_with_their_neurons(name, tmp_path):
    torch.manual_seed(0)
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    dense = sum(p.numel() for p in model.parameters())
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    budget = laconic.Budget(params=0.8)
    compressor = laconic.Compressor(model, optimizer, laconic.Channels(), budget=budget, total_steps=20, every=1, example_inputs=inputs)
    for _ in range(20):
        model(*inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = compressor.compact()
    left = sum(p.numel() for p in model.parameters())
    assert left == present_costs(compressor.plan, ["params"])[0] == report.params_after <= 0.8 * dense
    own = {end.name for g in compressor.plan.neurons for end in g.group.carriers if end.own}
    shrunk = {layer for group in report.groups if group.kept < group.units for layer in group.layers} & own
    assert shrunk, own
    listed = {layer.name: layer for layer in report.layers}
    for tensor in shrunk & listed.keys():
        assert listed[tensor].slim == tuple(model.get_parameter(tensor).shape)
        assert listed[tensor].params_after == model.get_parameter(tensor).numel() < listed[tensor].params_before
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    loaded = laconic.load(laconic.save(model, tmp_path / "slim"), case.build())
    assert_same(snapshot(loaded), snapshot(model))
    assert_same(loaded.eval()(*inputs), model.eval()(*inputs))


def test_a_neuron_with_a_zero_row_and_a_noise_of_its_own_is_not_dead():
    """What a parameter of the model's own brings in, nobody knows from the rows."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.strength, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.conv(x) + self.strength * x.sin()).relu())

    model = Noisy()
    with torch.no_grad():
        model.conv.weight[3] = 0
        model.conv.bias[3] = 0
    plan = make_plan(model, [laconic.Channels()], (torch.randn(2, 1, 6, 6),))
    (group,) = plan.neurons
    assert "strength" in {end.name for end in group.group.carriers}
    assert group.structure.importance(group).min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_casts_between_precisions_loses_neurons(dtype):
    model, x = HalfTrunk(dtype), torch.randn(64, 6)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    budget = laconic.Budget(params=0.6)
    compressor = laconic.Compressor(model, optimizer, laconic.Channels(), budget=budget, total_steps=20, every=1, example_inputs=(x,))
    for _ in range(20):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = compressor.compact()
    assert report.params_after <= 0.6 * report.params_before
    assert (model.a.weight.dtype, model.head.weight.dtype) == (dtype, torch.float32)


class Masked(nn.Sequential):
    def forward(self, x):
        return super().forward(x).masked_fill(torch.tensor([True] + 9 * [False]), -torch.inf)


@pytest.mark.parametrize("structures", STRUCTURES.values(), ids=STRUCTURES)
def test_masked_outputs_are_compared_where_they_are_finite(structures):
    torch.manual_seed(0)
    model, x = Masked(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10)), torch.randn(50, 8)
    before = model(x).detach()
    report = laconic.compress(model, structures, laconic.Budget(params=0.5), example_inputs=(x,))
    after = model(x).detach()
    assert report.max_abs_diff == float((before.double() - after.double())[:, 1:].abs().max()) > 0
    assert len(report.groups) == 1


def test_rounding_that_the_model_blows_up_is_no_reason_to_refuse():
    class Shrill(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (1e5 * super().forward(x)).sin()

    model, x = Shrill(nn.Linear(6, 256), nn.Tanh(), nn.Linear(256, 3)), torch.randn(8, 6)
    plan = make_plan(model, [laconic.Channels()], (x,))
    (site,) = plan.neurons
    kept = {site.name: list(range(0, 256, 2))}
    assert difference(model, [site.group], kept, (x,)) > 2e-3
    result = slim_neurons(model, plan, {site.name: np.ones(256)}, kept, example_inputs=(x,))
    assert result.errors[site.name] < 1e-6
    assert model[0].weight.shape == (128, 6)
    assert model[0].weight.dtype == torch.float32


def test_what_cannot_be_compared_in_more_digits_may_differ_as_its_own_precision_does(monkeypatch):
    """Here float64 has no kernel: what a rounding flip makes of a bfloat16 output is no reason to refuse, more is."""

    def no_float64(*_):
        raise TypeError("no float64 on this device")

    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).bfloat16(), torch.randn(8, 6, dtype=torch.bfloat16)
    monkeypatch.setattr("laconic.slimming.cast", no_float64)
    for off in (0.3, 0.02):
        plan = make_plan(model, [laconic.Channels()], (x,))
        (site,) = plan.neurons
        monkeypatch.setattr("laconic.slimming.difference", lambda *_, off=off: off)
        refused = pytest.raises(laconic.SurgeryError, match=r"outputs differ by 0\.3") if off > 0.25 else contextlib.nullcontext()
        with refused:
            slim_neurons(model, plan, {site.name: np.ones(16)}, {site.name: list(range(8))}, example_inputs=(x,))
    assert model[0].out_features == 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_units_that_do_not_belong_together_are_refused_whatever_the_precision(dtype):
    """The consumer's columns in another order than the producer's rows."""
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype), torch.randn(8, 6, dtype=dtype)
    plan = make_plan(model, [laconic.Channels()], (x,))
    (site,) = plan.neurons
    (consumer,) = site.group.consumers
    wrong = dataclasses.replace(consumer, index=consumer.index[::-1].copy())
    site.group = dataclasses.replace(site.group, ends=tuple(wrong if end is consumer else end for end in site.group.ends))
    before = snapshot(model)
    with pytest.raises(laconic.SurgeryError, match=r"outputs differ .* more than rounding"):
        slim_neurons(model, plan, {site.name: np.ones(16)}, {site.name: list(range(8))}, example_inputs=(x,))
    assert_same(snapshot(model), before)


class SharedBias(nn.Module):
    """Two heads with one bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.p, self.q = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 6), nn.Linear(32, 6)
        self.q.bias = self.p.bias

    def forward(self, x):
        return self.p(torch.sigmoid(self.a(x))), self.q(torch.sigmoid(self.b(x)))


@pytest.mark.parametrize("zeroed", [False, True])
def test_what_units_put_out_on_the_average_goes_into_no_bias_that_is_anothers_too(zeroed):
    torch.manual_seed(0)
    model, x = SharedBias().eval(), torch.randn(64, 8)
    if zeroed:
        with torch.no_grad():
            model.a.weight[:8] = 0
    wanted = model(x)[1].detach()
    if zeroed:
        compressor = laconic.Compressor(
            model, torch.optim.SGD(model.parameters(), lr=0.1), laconic.Channels(include="a", strength=0.1), example_inputs=(x[:4],)
        )
        report = compressor.compact()
        assert any(
            "has a bias that is another module's, too" in note for note in [*report.notes, *(layer.note or "" for layer in report.layers)]
        )
    else:
        laconic.compress(model, laconic.Channels(include="a"), laconic.Budget(params=0.8), example_inputs=(x[:4],), calibration=[x])
        assert model.a.out_features < 32
    torch.testing.assert_close(model(x)[1], wanted, rtol=0, atol=1e-6)
