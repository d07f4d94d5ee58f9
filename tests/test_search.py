"""The smallest model that is good enough."""

import copy

import pytest
import torch
from torch import nn

import laconic
from laconic.errors import InfeasibleBudgetError, InvalidTypeError, InvalidValueError

from .models import cnn, mlp


def layered(rank: int, size: int = 24) -> nn.Sequential:
    """One matrix of a known rank: every budget above that rank loses nothing, every one below it a lot."""
    model = nn.Sequential(nn.Linear(size, size, bias=False), nn.ReLU(), nn.Linear(size, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(size, rank) @ torch.randn(rank, size))
    return model


def fidelity(model: nn.Module):
    x = torch.randn(200, 24)
    wanted = model(x).detach()
    return lambda candidate: -float((candidate(x) - wanted).square().mean() / wanted.square().mean())


def test_it_finds_the_budget_below_which_quality_is_lost():
    model = layered(rank=5)
    whole = sum(p.numel() for p in model.parameters())
    found = laconic.smallest(model, fidelity(model), 1e-3, structures=laconic.LowRank(include="0"), precision=0.01)
    assert [x.rank for x in found.report.layers if x.name == "0"] == [5]
    assert sum(p.numel() for p in found.model.parameters()) == 5 * 48 + 48
    assert (5 * 48 + 48) / whole <= found.budget < (6 * 48 + 48) / whole
    assert found.score >= -1e-3
    assert found.dense_score == 0


def test_the_given_model_is_not_changed_and_the_trials_are_told():
    model = layered(rank=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    told = []
    found = laconic.smallest(model, fidelity(model), 1e-3, structures=laconic.LowRank(include="0"), report=told.append)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert tuple(told) == found.trials
    assert {t.good for t in told} == {True, False}
    assert all(t.good == (t.score >= -1e-3) for t in told)
    first, *lines = str(found).split("\n")
    assert first == f"{found.budget:.4g} of the dense cost: score {found.score:.4g} (dense 0)"
    told.sort(key=lambda t: t.budget)
    assert lines[: len(told)] == [f"  {t.budget:.4g}: {t.score:.4g}, {'' if t.good else 'not '}good enough" for t in told]
    assert "\n".join(lines[len(told) :]) == str(found.report)


def test_where_nothing_may_be_lost_the_dense_model_comes_back():
    model = nn.Sequential(nn.Linear(24, 24, bias=False))
    found = laconic.smallest(model, fidelity(model), 0.0)
    assert found.report is None
    assert found.budget == 1
    assert str(found).startswith("no budget that was tried is good enough, the dense model: score 0 (dense 0)")
    assert torch.equal(found.model[0].weight, model[0].weight)
    assert found.model is not model


def test_where_anything_goes_the_smallest_feasible_is_found():
    model = layered(rank=5)
    found = laconic.smallest(model, lambda m: 0.0, 0.0)
    least = sum(p.numel() for p in found.model.parameters())
    assert [x.rank for x in found.report.layers] == [1, 1]
    assert least == (24 + 24) + (24 + 2)
    with pytest.raises(InfeasibleBudgetError):
        laconic.compress(layered(rank=5), budget=laconic.Budget(max_params=least - 1))


def test_with_training_every_trial_starts_from_the_given_weights():
    model = layered(rank=5)
    starts = []

    def shrink(candidate: nn.Module, budget: laconic.Budget) -> laconic.CompactReport:
        starts.append(candidate[0].weight.detach().clone())
        optimizer = torch.optim.SGD(candidate.parameters(), lr=1e-3)
        compressor = laconic.Compressor(candidate, optimizer, budget=budget, total_steps=10)
        for _ in range(10):
            candidate(torch.randn(8, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return compressor.compact()

    found = laconic.smallest(model, lambda m: -float(sum(p.numel() for p in m.parameters()) < 400), 0.5, shrink=shrink, precision=0.1)
    assert len(starts) == len(found.trials) + 1 > 3  # the first budget was refused as infeasible
    assert all(torch.equal(w, model[0].weight) for w in starts)
    assert 400 <= found.report.params_after < 480


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"currency": "parms"}, r"currency = 'parms' is unknown; did you mean 'params'\?"),
        ({"currency": None}, "currency = None is unknown; valid: "),
        ({"evaluate": 0.5}, r"evaluate = 0\.5: expected a function of the model"),
        ({"shrink": 3}, "shrink = 3: expected a function of the model and a budget"),
        ({"report": 3}, "report = 3: expected a function of a trial"),
        ({"max_loss": "0.01"}, r"max_loss = '0\.01': expected a number"),
        ({"lowest": "a"}, "lowest = 'a': expected a number"),
        ({"precision": None}, "precision = None: expected a number"),
        ({"max_loss": -0.1}, r"max_loss = -0\.1: must be finite and at least 0"),
        ({"max_loss": float("nan")}, r"max_loss = nan"),
        ({"lowest": 0.0}, r"lowest = 0\.0: a fraction"),
        ({"precision": 1.0}, r"precision = 1\.0"),
        ({"evaluate": lambda m: float("nan")}, r"evaluate returned nan"),
        ({"evaluate": lambda m: None}, r"evaluate returned None: the score must be a finite number"),
        ({"evaluate": lambda m: torch.ones(40, 2)}, r"evaluate returned Tensor tensor\(.*: the score must be a finite number"),
    ],
)
def test_bad_input_is_one_clear_line(options, message):
    arguments = {"evaluate": lambda m: 0.0, "max_loss": 0.1, **options}
    with pytest.raises(InvalidTypeError if "expected" in message else InvalidValueError, match=message) as caught:
        laconic.smallest(layered(5), **arguments)
    assert "\n" not in str(caught.value)


def shrinks_nothing(model: nn.Module, budget: laconic.Budget) -> None:
    pass


def shrinks_a_copy(model: nn.Module, budget: laconic.Budget) -> laconic.CompactReport:
    return laconic.compress(copy.deepcopy(model), budget=budget, example_inputs=(torch.zeros(1, 24),))


@pytest.mark.parametrize("shrink", [shrinks_nothing, shrinks_a_copy])
@pytest.mark.parametrize(("currency", "cost"), [("params", "624 params"), ("macs", "624 macs")])
def test_a_shrink_that_leaves_the_model_as_it_was_is_refused(shrink, currency, cost):
    scored = []
    options = {"currency": currency, "shrink": shrink, "example_inputs": (torch.zeros(1, 24),), "lowest": 0.5}
    message = (
        rf"Budget\({currency}=0\.5\), but the model still has {cost}, above the budget's 312: did shrink call compact\(\), and does it"
    )
    with pytest.raises(InvalidValueError, match=message) as caught:
        laconic.smallest(layered(5), lambda m: float(len(scored.append(m) or scored)), 0.1, **options)
    assert "\n" not in str(caught.value)
    assert len(scored) == 1  # the dense one


@pytest.mark.parametrize(
    ("build", "x"), [(lambda: layered(5), torch.zeros(4, 24)), (cnn, torch.zeros(2, 3, 8, 8)), (mlp, torch.zeros(2, 6).double())]
)
@pytest.mark.parametrize("currency", ["params", "macs"])
def test_what_the_package_itself_shrinks_is_within_the_budget_by_the_same_count(build, x, currency):
    def shrink(candidate: nn.Module, budget: laconic.Budget) -> laconic.CompactReport:
        structures = [laconic.LowRank(), laconic.Channels()]
        return laconic.compress(candidate, structures, budget, example_inputs=(x,))

    for how in (None, shrink):
        found = laconic.smallest(build().eval(), lambda m: 0.0, 0.1, currency=currency, shrink=how, example_inputs=(x,))
        assert found.budget < 1


def test_a_time_is_not_held_against_a_shrink():
    found = laconic.smallest(layered(5), lambda m: 0.0, 0.1, currency="latency", shrink=shrinks_nothing)
    assert found.budget < 1
