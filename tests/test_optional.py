"""Optional neurons: ranks alone where they keep more of the network, decided once, before anything is pressed."""

import contextlib
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn, optim

import laconic
from laconic.budget import needless, no_options
from laconic.compaction import spectra
from laconic.errors import InfeasibleBudgetError, InvalidTypeError, NonFiniteError, SurgeryError
from laconic.plan import FORGONE, _wide_layer, make_plan
from laconic.slimming import importances_of
from laconic.timing import RankTimes, grid
from laconic.walk import inner_ranks
from laconic.widths import choose_shapes

from .models import assert_same
from .test_neurons import no_clock  # noqa: F401
from .test_shrinking import wide_mlp

OPTIONAL = [laconic.LowRank(), laconic.Channels(optional=True)]
BOTH = [laconic.LowRank(), laconic.Channels()]
STEPS = 40
RANK = 4
PARAMS = 0.3


def cnn() -> nn.Module:
    """Convolutions of nearly low rank: pairs of layers keep more of them than narrow layers do."""
    torch.manual_seed(0)
    layers = []
    for taken, out in ((3, 16), (16, 24), (24, 32)):
        layers += [nn.Conv2d(taken, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        with torch.no_grad():
            u, s, v = torch.linalg.svd(layers[-3].weight.flatten(1), full_matrices=False)
            s[RANK:] *= 0.3
            layers[-3].weight.copy_((u * s @ v).unflatten(1, (taken, 3, 3)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def run(model, structures=None, steps=STEPS, compressor=None, optimizer=None, params=PARAMS, **options):
    """Train for some steps; returns the compressor."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 6, 6) if isinstance(model[0], nn.Conv2d) else (model[0].in_features,)
    x, y = torch.randn(32, *shape, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    optimizer = optimizer or optim.AdamW(model.parameters(), lr=3e-3)
    compressor = compressor or laconic.Compressor(
        model, optimizer, structures, budget=laconic.Budget(params=params), total_steps=STEPS, example_inputs=(x[:1],), **options
    )
    for _ in range(steps):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return compressor


def test_where_ranks_keep_more_the_default_is_ranks_alone_bit_for_bit():
    models = [cnn(), cnn(), cnn()]
    default, ranks, both = (run(m, s) for m, s in zip(models, (None, [laconic.LowRank()], BOTH), strict=True))
    assert default.state.forgone == ["0", "3", "6"]
    assert both.state.forgone == []
    assert default.weights == ranks.weights
    reports = [c.compact() for c in (default, ranks, both)]
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert not torch.equal(models[1][-1].weight, models[2][-1].weight)  # the choice makes a difference
    assert reports[0].layers == reports[1].layers
    assert any(note.startswith("neurons of 0, 3, 6 all stay: ranks alone keep as much") for note in reports[0].notes)
    assert "Channels" in FORGONE
    assert not reports[0].groups


def test_where_both_keep_more_the_default_is_both_bit_for_bit():
    torch.manual_seed(0)
    models = [model := wide_mlp(), copy.deepcopy(model)]
    default, both = (run(m, s, params=0.05) for m, s in zip(models, (None, BOTH), strict=True))
    assert default.state.forgone == []
    assert any(len(g.kept) < g.group.units for g in default.plan.neurons)
    default.compact(), both.compact()
    assert_same(models[0].state_dict(), models[1].state_dict())


def test_the_plan_says_beforehand_that_it_will_be_decided_and_afterwards_what():
    model = cnn()
    compressor = run(model, steps=0)
    assert "neurons of 0, 3, 6 are optional" in str(compressor.plan)
    assert "16 units" in str(compressor.plan)
    keys = compressor.metrics().keys()
    run(model, steps=STEPS // 4, compressor=compressor, optimizer=compressor.optimizers[0])
    assert compressor.state.forgone
    assert FORGONE in str(compressor.plan)
    assert "16 units" not in str(compressor.plan)
    assert {k for k in compressor.metrics() if "/units/" in k} == {k for k in keys if "/units/" in k}


def test_the_choice_is_the_one_of_the_walk_that_keeps_more():
    plan = make_plan(model := cnn(), OPTIONAL, (torch.zeros(1, 3, 6, 6),))
    values, importances = spectra(plan), importances_of(plan, {})
    budget = laconic.Budget(params=PARAMS)
    names = frozenset(g.name for g in plan.neurons)
    limits = budget.limits(plan)
    both = choose_shapes(plan, values, importances, ["params"], limits)
    ranks = choose_shapes(dataclasses.replace(plan, neurons=[]), values, importances, ["params"], limits)
    assert np.all(ranks.spent <= limits)
    assert ranks.gain() >= both.gain()
    assert needless(plan, values, importances, budget) == names
    # Half of the neurons say nothing: what goes for nothing tips the scales.
    dead = {n: np.where(np.arange(len(x)) % 2, x, 0.0) for n, x in importances.items()}
    assert choose_shapes(plan, values, dead, ["params"], limits).gain() > ranks.gain()
    assert needless(plan, values, dead, budget) == frozenset()
    # So does a budget that ranks alone cannot meet.
    tight = laconic.Budget(params=0.02)
    assert np.all(choose_shapes(plan, values, importances, ["params"], tight.limits(plan)).spent <= tight.limits(plan))
    with pytest.raises(InfeasibleBudgetError):
        choose_shapes(dataclasses.replace(plan, neurons=[]), values, importances, ["params"], tight.limits(plan))
    assert needless(plan, values, importances, tight) == frozenset()
    assert not needless(make_plan(model, BOTH, (torch.zeros(1, 3, 6, 6),)), values, importances, budget)


class Forked(nn.Module):
    """Neurons in one layer, ranks in another: neither can do the other's work."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(96, 96, 3, padding=1, bias=False), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.conv(x).mean((2, 3))[:, :4] + self.b(torch.relu(self.a(x.mean((2, 3))[:, :8])))


@pytest.mark.parametrize("share", [0.02, 0.03, 0.05, 0.1, 0.3, 0.9])
def test_what_ranks_alone_are_chosen_for_is_met_by_them(share):
    torch.manual_seed(0)
    model, x = Forked(), torch.randn(8, 96, 4, 4)
    structures = [laconic.LowRank(multiple=8, include="conv"), laconic.Channels(include="a", optional=True)]
    optimizer = optim.SGD(model.parameters(), 1e-3)
    budget = laconic.Budget(params=share)
    try:
        compressor = laconic.Compressor(model, optimizer, structures, budget=budget, total_steps=20, example_inputs=(x,))
    except InfeasibleBudgetError:  # said at once, not in mid-run
        assert share == 0.02
        return
    for _ in range(20):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert compressor.compact().params_after <= share * compressor.plan.params


def test_ranks_that_are_tried_reach_down_to_the_smallest_multiple():
    assert [inner_ranks(taken, 8).tolist() for taken in (512, 12, 8)] == [sorted({8, *inner_ranks(512, 8).tolist()}), [8], []]
    assert not np.any(inner_ranks(512, 8) % 8)
    assert inner_ranks(4, 1).tolist() == [1, 2, 3]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("latency", [0.85, 0.928, 0.98])
def test_a_walk_ends_where_a_pair_is_smaller_but_slower(latency):
    torch.manual_seed(0)
    layers = [nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 48), nn.ReLU(), *(nn.Linear(48, 48) for _ in range(3)), nn.Linear(48, 10)]
    plan = make_plan(nn.Sequential(*layers), [laconic.LowRank()], (torch.zeros(1, 32),))
    for site in plan.sites:  # a call takes 2, a pair two calls
        u = site.unfolding
        ranks = grid(max(site.break_even, 1))
        site.times = RankTimes(1e-3 * u.dense_params + 2, ranks, tuple(1e-3 * r * u.unit_params + 4 for r in ranks))
    plan.fixed_ms, plan.latency_ms = 0.5, 0.5 + sum(s.times.dense for s in plan.sites)
    plan.layers = [_wide_layer(s.layer, s.modules[0], s) for s in plan.sites]
    budget = laconic.Budget(params=0.504, latency=latency)
    with contextlib.suppress(InfeasibleBudgetError):
        walk = choose_shapes(plan, spectra(plan), {}, budget.currencies, budget.limits(plan))
        assert np.all(walk.spent <= budget.limits(plan))


@pytest.mark.parametrize("at", [2, 5])
def test_a_resumed_run_has_decided_the_same(at):
    whole = cnn()
    wanted = run(whole)
    model = cnn()
    first = run(model, steps=at)
    saved = copy.deepcopy((first.state_dict(), model.state_dict(), first.optimizers[0].state_dict()))
    fresh = cnn()
    second = run(fresh, steps=0)
    second.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    second.optimizers[0].load_state_dict(saved[2])
    assert second.state.forgone == first.state.forgone
    assert (first.state.forgone is None) == (at == 2)
    run(fresh, steps=STEPS - at, compressor=second, optimizer=second.optimizers[0])
    assert second.weights == wanted.weights
    assert_same(fresh.state_dict(), whole.state_dict())


@pytest.mark.parametrize("at", [2, 6])
def test_a_run_goes_back_in_place_as_long_as_nothing_is_cut(at):
    model = cnn()
    compressor = run(model, OPTIONAL, steps=at, cut="end")
    saved, neurons, decided = copy.deepcopy(compressor.state_dict()), list(compressor.plan.neurons), compressor.state.forgone
    run(model, steps=3, compressor=compressor, optimizer=compressor.optimizers[0])
    assert compressor.state.forgone == ["0", "3", "6"]
    compressor.load_state_dict(saved)
    assert compressor.plan.neurons == neurons
    assert compressor.state.forgone == decided
    assert ("0" in compressor.plan.whole) == (at == 6)


def test_a_copy_made_after_the_decision_trains_on_alike():
    model = cnn()
    first = run(model, steps=STEPS // 4)
    other, second = copy.deepcopy((model, first))
    for m, c in ((model, first), (other, second)):
        run(m, steps=STEPS - STEPS // 4, compressor=c, optimizer=c.optimizers[0])
        c.compact()
    assert_same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("steps", [2, STEPS // 2])
def test_a_cut_at_the_end_decides_as_well(steps):
    models = [cnn(), cnn()]
    reports = [run(m, s, steps=steps, cut="end").compact() for m, s in zip(models, (OPTIONAL, [laconic.LowRank()]), strict=True)]
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert any("ranks alone keep as much" in note for note in reports[0].notes)


def fail_to_compact(compressor, monkeypatch):
    def fails(*_, **__):
        raise SurgeryError("no")

    with monkeypatch.context() as patched:
        patched.setattr("laconic.compressor.cut_sites", fails)
        with pytest.raises(SurgeryError):
            compressor.compact()


def test_after_an_error_at_the_end_nothing_is_decided(monkeypatch):
    model = cnn()
    compressor = run(model, OPTIONAL, steps=2, cut="end")
    before, weights, neurons = copy.deepcopy(model.state_dict()), compressor.weights, list(compressor.plan.neurons)
    fail_to_compact(compressor, monkeypatch)
    assert compressor.state.forgone is None
    assert compressor.weights == weights
    assert compressor.plan.neurons == neurons
    assert not compressor.plan.forgone
    assert "0" not in compressor.plan.whole
    assert_same(model.state_dict(), before)
    assert any("ranks alone keep as much" in note for note in compressor.compact().notes)


@pytest.mark.filterwarnings("ignore:laconic. the run ended")
def test_after_an_error_at_the_end_the_watch_for_unreached_layers_goes_on(monkeypatch):
    model = cnn()
    compressor = run(model, OPTIONAL, steps=2)
    compressor._unreached |= {"2"}  # as if the example inputs did not reach it
    compressor._watch_unreached()
    fail_to_compact(compressor, monkeypatch)
    with pytest.warns(UserWarning, match="2: runs in training, but not on the example inputs"):
        model(torch.randn(4, 3, 6, 6)).sum().backward()


def test_compress_decides_too():
    models = [cnn(), cnn()]
    x = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    budget = laconic.Budget(params=PARAMS)
    reports = [laconic.compress(m, s, budget, example_inputs=(x,)) for m, s in zip(models, (OPTIONAL, None), strict=True)]
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert any("ranks alone keep as much" in note for note in reports[0].notes)


def test_several_optimizers():
    models = [cnn(), cnn()]
    ends = []
    for model, structures in zip(models, (None, [laconic.LowRank()]), strict=True):
        parameters = list(model.parameters())
        optimizers = [optim.AdamW(parameters[:4], lr=3e-3), optim.SGD(parameters[4:], lr=3e-2, momentum=0.9)]
        compressor = laconic.Compressor(
            model,
            optimizers,
            structures,
            budget=laconic.Budget(params=PARAMS),
            total_steps=STEPS,
            example_inputs=(torch.zeros(1, 3, 6, 6),),
        )
        x, y = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
        for _ in range(STEPS):
            nn.functional.cross_entropy(model(x), y).backward()
            for o in optimizers:
                o.step()
                o.zero_grad()
        compressor.compact()
        ends.append(compressor.state.forgone)
    assert ends == [["0", "3", "6"], []]
    assert_same(models[0].state_dict(), models[1].state_dict())


def test_into_a_fresh_model_what_was_decided_is_said_as_well():
    model = cnn()
    compressor = run(model, OPTIONAL, cut="end")
    report = compressor.compact(into=cnn())
    assert any("neurons of 0, 3, 6 all stay: ranks alone keep as much" in note for note in report.notes)
    assert compressor.metrics()["laconic/units/3"] == 24


def test_a_loss_that_diverged_before_the_decision_is_said_as_ever():
    model = cnn()
    compressor = run(model, steps=3)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="gradient"):
        run(model, steps=STEPS, compressor=compressor, optimizer=compressor.optimizers[0])


def test_without_anything_to_choose_from_it_says_so():
    x = torch.zeros(1, 64)

    def made(structures, **options):
        model = wide_mlp()
        return laconic.Compressor(model, optim.SGD(model.parameters(), 0.1), structures, example_inputs=(x,), **options)

    for compressor in (
        made(laconic.Channels(optional=True), budget=laconic.Budget(params=0.5), total_steps=10),
        made([laconic.LowRank(strength=0.1), laconic.Channels(strength=0.1, optional=True)]),
    ):
        assert compressor.state.forgone == []
        assert any("optional=True) has no effect" in note for note in compressor.plan.notes)
    plan = make_plan(wide_mlp(), OPTIONAL, (x,))
    for bounds in ({"latency": 0.9}, {"macs": 0.5}, {"params": 0.5, "macs": 0.5}):
        budget = laconic.Budget(**bounds)
        assert needless(plan, spectra(plan), importances_of(plan, {}), budget) == frozenset()
        assert "optional=True) has no effect" in no_options(plan, budget)[0]
        by_default = made(None, budget=budget, total_steps=10)
        assert by_default.plan.neurons
        assert not any(g.structure.optional for g in by_default.plan.neurons)
        assert not any("optional" in note for note in by_default.plan.notes)
    assert no_options(plan, laconic.Budget(params=0.9)) == []
    report = laconic.compress(wide_mlp(), OPTIONAL, energy=0.9, example_inputs=(x,))
    assert any("optional=True) has no effect" in note for note in report.notes)
    with pytest.raises(InvalidTypeError, match="optional = 1"):
        laconic.Channels(optional=1)
