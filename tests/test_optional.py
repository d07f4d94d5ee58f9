"""Optional neurons: ranks alone where they keep more of the network, decided once, before anything is pressed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn, optim

import laconic
from laconic.compaction import spectra
from laconic.errors import CheckpointError, InfeasibleBudgetError, InvalidTypeError, SurgeryError
from laconic.plan import FORGONE, make_plan
from laconic.slimming import importances_of
from laconic.widths import choose_shapes, needless

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
    assert "neurons are optional" in str(compressor.plan)
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
    limits = laconic.Budget(params=PARAMS).limits(plan)
    names = frozenset(g.name for g in plan.neurons)
    given = (plan, values, importances, ["params"], limits)
    both, ranks = choose_shapes(*given), choose_shapes(*given, frozenset(), names)
    assert ranks.units == {g.name: g.group.units for g in plan.neurons}
    assert np.all(ranks.spent <= limits)
    assert ranks.gain() >= both.gain()
    assert needless(*given) == names
    # Half of the neurons say nothing: what goes for nothing tips the scales.
    dead = {n: np.where(np.arange(len(x)) % 2, x, 0.0) for n, x in importances.items()}
    assert choose_shapes(plan, values, dead, ["params"], limits).gain() > ranks.gain()
    assert needless(plan, values, dead, ["params"], limits) == frozenset()
    # So does a budget that ranks alone cannot meet.
    tight = np.array([0.02 * plan.params])
    assert np.all(choose_shapes(*given[:4], tight).spent <= tight)
    with pytest.raises(InfeasibleBudgetError):
        choose_shapes(*given[:4], tight, frozenset(), names)
    assert needless(*given[:4], tight) == frozenset()
    assert not needless(make_plan(model, BOTH, (torch.zeros(1, 3, 6, 6),)), *given[1:])


@pytest.mark.parametrize("at", [2, STEPS // 4, STEPS // 2])
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
    if at > 2:
        with pytest.raises(CheckpointError, match="fresh"):
            second.load_state_dict(saved[0])


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


def test_after_an_error_at_the_end_nothing_is_decided(monkeypatch):
    model = cnn()
    compressor = run(model, OPTIONAL, steps=2, cut="end")
    before, weights, neurons = copy.deepcopy(model.state_dict()), compressor.weights, list(compressor.plan.neurons)

    def fails(*_, **__):
        raise SurgeryError("no")

    with monkeypatch.context() as patched:
        patched.setattr("laconic.compressor.cut_sites", fails)
        with pytest.raises(SurgeryError):
            compressor.compact()
    assert compressor.state.forgone is None
    assert compressor.weights == weights
    assert compressor.plan.neurons == neurons
    assert not compressor.plan.forgone
    assert "0" not in compressor.plan.whole
    assert_same(model.state_dict(), before)
    assert any("ranks alone keep as much" in note for note in compressor.compact().notes)


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


def test_without_anything_to_choose_from_it_says_so():
    x = torch.zeros(1, 64)

    def made(structures, **options):
        model = wide_mlp()
        return laconic.Compressor(model, optim.SGD(model.parameters(), 0.1), structures, example_inputs=(x,), **options)

    alone = made(laconic.Channels(optional=True), budget=laconic.Budget(params=0.5), total_steps=10)
    unbounded = made([laconic.LowRank(strength=0.1), laconic.Channels(strength=0.1, optional=True)])
    for compressor in (alone, unbounded):
        assert compressor.state.forgone == []
        assert any("optional=True) has no effect" in note for note in compressor.plan.notes)
    with pytest.raises(InvalidTypeError, match="optional = 1"):
        laconic.Channels(optional=1)
