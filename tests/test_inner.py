"""A convolution's pair is cut again along the channels that it takes in, where the budget is served better: three layers."""

import copy
import functools
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

import laconic
from laconic.allocate import log_shares
from laconic.budget import choices_for, ranks_for_budget, shapes_for_budget
from laconic.compaction import cut_sites, replay_cuts, spectra
from laconic.costs import named_ranks, present_costs
from laconic.matricize import CHANNEL, SPATIAL
from laconic.measure import count_macs, count_params
from laconic.plan import Plan, make_plan
from laconic.slimming import importances_of, slim_neurons
from laconic.surgery.factorize import product
from laconic.walk import Walk
from laconic.widths import choose_shapes

from .models import assert_same, snapshot

X = (torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1)),)


class Net(nn.Module):
    """Convolutions whose kernels read a few directions of what they take in, and put out many."""

    def __init__(self, directions: int = 6, dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, padding=1)
        self.wide = nn.Conv2d(48, 64, 3, stride=2, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(64)
        self.last = nn.Conv2d(64, 40, (3, 5), padding=(1, 2), dilation=(2, 1), padding_mode="reflect")
        self.head = nn.Linear(40, 10)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.wide, self.last):
            taken = layer.in_channels
            basis = torch.linalg.qr(torch.randn(taken, taken, generator=generator)).Q[:, :directions]
            mixed = torch.einsum("oikl,ij->ojkl", layer.weight.detach(), basis @ basis.T)
            layer.weight.data = 5 * mixed + 0.02 * layer.weight.detach()
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.wide(self.stem(x).relu())).relu()
        return self.head(self.last(x).relu().mean((2, 3)))


def example(model: nn.Module) -> tuple[Tensor]:
    return (X[0].to(next(model.parameters()).dtype),)


def plan_for(model: nn.Module, matricization: str = CHANNEL, **options) -> Plan:
    return make_plan(model, [laconic.LowRank(matricization=matricization, **options)], example(model))


def run(model: nn.Module, optimizer: optim.Optimizer, steps: range) -> None:
    for t in steps:
        x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(x.to(example(model)[0].dtype)).square().mean().backward()
        optimizer.step()


def compressor_for(model: nn.Module, make=lambda p: optim.AdamW(p, lr=1e-3), **options) -> laconic.Compressor:
    settings = {"structures": laconic.LowRank(), "budget": laconic.Budget(params=0.15), "total_steps": 20, "every": 2}
    return laconic.Compressor(model, make(model.parameters()), example_inputs=example(model), **settings | options)


# ---- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matricization", [CHANNEL, SPATIAL])
@pytest.mark.parametrize("cut", [False, True], ids=["dense", "pair"])
def test_joint_shares_are_the_energies_of_both_projections(matricization, cut):
    model = Net(dtype=torch.float64)
    plan = plan_for(model, matricization)
    if cut:
        cut_sites(model, plan, spectra(plan), {s.name: 12 if s.name == "wide.weight" else None for s in plan.sites})
    site = next(s for s in plan.sites if s.name == "wide.weight")
    weight = product(site.modules[0], site.unfolding) if cut else site.modules[0].weight.detach()
    _, s, vh = np.linalg.svd(site.unfolding.unfold(weight)[0].numpy(), full_matrices=False)
    rows = (s[:, None] * vh).reshape(len(s), 48, -1)
    v = np.linalg.eigh(np.einsum("rik,rjk->ij", rows, rows))[1][:, ::-1]
    joint = np.exp(site.joint_shares.numpy())
    for r, inner in [(1, 1), (3, 2), (7, 6), (12, 20), (12, 48)]:
        kept = np.einsum("rik,ij->rjk", rows[:r], v[:, :inner])
        assert joint[r - 1, inner - 1] == pytest.approx(np.sum(kept**2) / np.sum(rows[:r] ** 2), rel=1e-8)
    assert np.all(np.diff(joint, axis=1) >= -1e-12)
    assert joint[:, -1] == pytest.approx(1.0)


# ---- the cut --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matricization", [CHANNEL, SPATIAL])
@pytest.mark.parametrize("at_once", [True, False])
def test_three_layers_compute_what_the_projected_weight_computes_and_cost_what_the_plan_says(matricization, at_once):
    model = Net(dtype=torch.float64)
    before = copy.deepcopy(model).eval()
    plan = plan_for(model, matricization)
    ranks = {"stem.weight": None, "wide.weight": 14, "wide.0.weight": 5, "last.weight": 11, "last.0.weight": 7, "head.weight": 4}
    wanted = present_costs(plan, ["params", "macs"], ranks)
    if not at_once:
        cut_sites(
            model, plan, spectra(plan), {n: None if n.endswith(".0.weight") else r for n, r in ranks.items()}, example_inputs=example(model)
        )
        assert present_costs(plan, ["params", "macs"], ranks) == pytest.approx(wanted)
    result = cut_sites(model, plan, spectra(plan), ranks, example_inputs=example(model))
    assert [count_params(model), count_macs(model, example(model))] == wanted.tolist()
    assert present_costs(plan, ["params", "macs"]).tolist() == wanted.tolist()
    assert {n: r for n, r in result.ranks.items() if n.endswith(".0.weight")} == {"wide.0.weight": 5, "last.0.weight": 7}
    (first, kernel), last = model.wide[0], model.wide[1]
    assert (first.kernel_size, first.out_channels, kernel.in_channels, kernel.out_channels, last.in_channels) == ((1, 1), 5, 5, 14, 14)
    for site in plan.sites:
        if site.inner is not None and site.inner.rank is not None:
            left, right = site.factors
            before.get_submodule(site.layer).weight.data = site.unfolding.fold(left @ right)
    before.head.weight.data = product(model.head, plan.sites[-1].unfolding)
    torch.testing.assert_close(model.eval()(*example(model)), before(*example(model)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(float(plan.sites[1].norm), float(before.wide.weight.detach().norm()), rtol=1e-9, atol=1e-9)


def test_a_weight_that_reads_few_directions_loses_nothing():
    model = Net(directions=6, dtype=torch.float64)
    plan = plan_for(model)
    values = spectra(plan)
    assert values["wide.0.weight"][19, 5] > -0.01  # the logarithm of what six of 48 keep, at rank 20
    assert values["wide.0.weight"][19, 2] < -0.1


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize("currency", ["params", "macs"])
def test_the_choice_is_within_the_budget_and_cuts_again_where_few_directions_are_read(share, neurons, currency):
    model = Net()
    structures = [laconic.LowRank(), laconic.Channels()] if neurons else [laconic.LowRank()]
    plan = make_plan(model, structures, X)
    values, budget = spectra(plan), laconic.Budget(**{currency: share})
    if neurons:
        walk = choose_shapes(plan, values, importances_of(plan, {}), budget.currencies, budget.limits(plan))
        assert np.all(walk.spent <= budget.limits(plan))
        inner = {n: s for n, s in walk.inner.items() if s}
    else:
        ranks = ranks_for_budget(plan, values, budget)
        assert present_costs(plan, [currency], ranks)[0] <= budget.limits(plan)[0]
        inner = {s.name: ranks[s.inner.name] for s in plan.sites if s.inner is not None and ranks[s.inner.name]}
    assert inner or neurons or share > 0.2
    assert all(inner[n] < plan_site.unfolding.sides[1] for plan_site in plan.sites if (n := plan_site.name) in inner)
    if neurons and inner:  # what the walk says it spends is what its layers cost
        total = sum(walk.cost(path) - walk.costs[path] for path in walk.layers)
        assert total == pytest.approx(0)


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_the_walk_spends_what_the_model_costs_that_it_leads_to(share):
    model = Net(4)
    plan = make_plan(model, [laconic.LowRank(), laconic.Channels()], X)
    values, importances, budget = spectra(plan), importances_of(plan, {}), laconic.Budget(params=share, macs=0.9)
    walk = choose_shapes(plan, values, importances, budget.currencies, budget.limits(plan))
    assert any(walk.inner.values())
    slim_neurons(model, plan, importances, walk.kept(), example_inputs=X)
    cut_sites(model, plan, spectra(plan), named_ranks(plan, walk.ranks, walk.inner))
    assert [count_params(model), count_macs(model, X)] == pytest.approx(walk.spent)


def test_three_layers_that_have_become_dearer_than_a_pair_are_a_pair_again():
    plan = make_plan(Net(4), [laconic.LowRank(), laconic.Channels()], X)
    walk = Walk(plan, spectra(plan), importances_of(plan, {}), ("params",), np.array([1.0]), frozenset())
    site = next(s for s in plan.sites if s.name == "wide.weight")
    walk.go(site, (2, 30))  # 48 x 30 + 30 x 9 x 2 parameters where a pair's first layer has 48 x 9 x 2
    slope, to = walk.best(site)
    assert to == (2, 0)
    assert slope <= 0


def test_options_cost_what_the_model_would():
    model = Net()
    plan = plan_for(model)
    names = ("params", "macs")
    choice = next(c for c in choices_for(plan, spectra(plan), names) if c.name == "wide.weight")
    none = dict.fromkeys([s.name for s in (*plan.sites, *plan.inner)])
    rest = present_costs(plan, names, none) - next(c for o, c in zip(choice.ranks, choice.costs, strict=True) if o is None)
    options = [i for i, o in enumerate(choice.ranks) if isinstance(o, tuple)]
    assert len(options) > 100
    for i in options[:: len(options) // 20]:
        rank, inner = choice.ranks[i]
        expected = present_costs(plan, names, none | {"wide.weight": rank, "wide.0.weight": inner})
        assert rest + choice.costs[i] == pytest.approx(expected)


@pytest.mark.parametrize("directions", [4, 16, 64])
def test_three_layers_are_taken_where_they_keep_more_than_pairs_at_the_same_budget(directions):
    model, budget, gains = Net(directions), laconic.Budget(params=0.2), []
    for inputs in (False, True):
        plan = plan_for(model, inputs=inputs)
        values = spectra(plan)
        ranks = ranks_for_budget(plan, values, budget)
        kept = [log_shares(values[s.name])[r - 1] for s in plan.sites if (r := ranks[s.name]) is not None]
        kept += [values[s.inner.name][ranks[s.name] - 1, r - 1] for s in plan.sites if s.inner is not None and (r := ranks[s.inner.name])]
        gains.append(sum(kept))
    assert gains[1] >= gains[0] - 0.01  # the last step that does not fit
    assert directions > 4 or gains[1] > gains[0] / 2


@pytest.mark.parametrize("neurons", [False, True])
def test_the_second_cut_keeps_to_the_multiples_that_the_hardware_likes(neurons):
    structures = [laconic.LowRank(multiple=4)] + ([laconic.Channels(multiple=4)] if neurons else [])
    compressor = compressor_for(Net(4), structures=structures, budget=laconic.Budget(params=0.2))
    run(compressor.model, compressor.optimizers[0], range(20))
    inputs = [layer.inputs for layer in compressor.compact().layers if layer.inputs is not None]
    assert inputs
    assert all(s % 4 == 0 for s in inputs)


@pytest.mark.parametrize("share", [0.3, 0.15, 0.08])
def test_the_plan_of_both_cuts_beside_neurons_keeps_to_the_multiples(share):
    model = Net(4)
    plan = make_plan(model, [laconic.LowRank(multiple=4), laconic.Channels()], example(model))
    importances = {g.name: np.full(len(g.kept), 1 / len(g.kept)) for g in plan.neurons}
    _, ranks = shapes_for_budget(plan, spectra(plan), importances, laconic.Budget(params=share))
    inner = {s.name for s in plan.inner}
    again = [r for name, r in ranks.items() if r is not None and name in inner]
    assert again
    assert all(r % 4 == 0 for r in again)


@pytest.mark.parametrize("options", [{"inputs": False}, {"matricization": "out*kh*kw,in"}])
def test_pairs_stay_pairs_where_nothing_is_cut_again(options):
    model = Net(4)
    compressor = compressor_for(model, structures=laconic.LowRank(**options))
    assert not compressor.plan.inner
    run(model, compressor.optimizers[0], range(20))
    report = compressor.compact()
    assert any(layer.rank is not None for layer in report.layers)
    assert all(layer.inputs is None for layer in report.layers)


# ---- a run ----------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda p: optim.AdamW(p, lr=1e-3),
    "SGD": lambda p: optim.SGD(p, lr=1e-3, momentum=0.9),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-4, centered=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("neurons", [False, True])
def test_a_run_cuts_again_meets_the_budget_and_trains_on(make, neurons, tmp_path):
    model = Net(4)
    structures = [laconic.LowRank(), laconic.Channels()] if neurons else [laconic.LowRank()]
    compressor = compressor_for(model, make, structures=structures)
    optimizer = compressor.optimizers[0]
    run(model, optimizer, range(10))
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    before = [p.detach().clone() for p in model.parameters()]
    run(model, optimizer, range(10, 20))
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if a.ndim > 1)
    assert all(optimizer.state[p] for p in model.parameters())
    report = compressor.compact()
    assert report.params_after == count_params(model) <= 0.15 * report.params_before
    again = {layer.name: layer.inputs for layer in report.layers if layer.inputs is not None}
    assert again
    for layer in report.layers:
        if layer.name in again:
            assert layer.params_after == sum(
                p.numel() for n, p in model.get_submodule(layer.name).named_parameters() if n.endswith("weight")
            )
            assert f"inputs {layer.inputs} of" in str(report)
    assert laconic.report.CompactReport.from_json(report.to_json()) == report
    laconic.save(model, tmp_path / "small")
    loaded = laconic.load(tmp_path / "small", Net())
    assert torch.equal(loaded.eval()(*X), model.eval()(*X))


STRUCTURES = {False: [laconic.LowRank()], True: [laconic.LowRank(), laconic.Channels()]}


@functools.cache
def uninterrupted(name: str, neurons: bool) -> tuple[list[bytes], laconic.report.CompactReport, list]:
    """The states before each step, in files; the report, and model and optimizer at the end."""
    torch.manual_seed(0)
    model = Net(4)
    compressor = compressor_for(model, OPTIMIZERS[name], structures=STRUCTURES[neurons])
    optimizer = compressor.optimizers[0]
    files = []
    for t in range(20):
        torch.save({"c": compressor.state_dict(), "m": model.state_dict(), "o": optimizer.state_dict()}, file := io.BytesIO())
        files.append(file.getvalue())
        run(model, optimizer, range(t, t + 1))
    return files, compressor.compact(), snapshot(model, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 8, 14])
@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_run_resumed_before_or_after_the_second_cut_ends_bit_identical(at, neurons, name):
    files, report, end = uninterrupted(name, neurons)
    assert any(layer.inputs is not None for layer in report.layers)
    state = torch.load(io.BytesIO(files[at]), weights_only=True)
    torch.manual_seed(1)
    other = Net(4)
    resumed = compressor_for(other, OPTIMIZERS[name], structures=STRUCTURES[neurons])
    resumed.load_state_dict(state["c"])
    other.load_state_dict(state["m"])
    resumed.optimizers[0].load_state_dict(state["o"])
    run(other, resumed.optimizers[0], range(at, 20))
    assert resumed.compact() == report
    assert_same(snapshot(other, resumed.optimizers[0]), end)


def test_cut_at_the_end_and_post_hoc():
    model = Net(4)
    compressor = compressor_for(model, cut="end")
    run(model, compressor.optimizers[0], range(20))
    assert any(layer.inputs is not None for layer in compressor.compact().layers)
    run(model, compressor.optimizers[0], range(2))
    model = Net(4)
    report = laconic.compress(model, budget=laconic.Budget(params=0.15), example_inputs=X)
    assert any(layer.inputs is not None for layer in report.layers)
    assert report.params_after == count_params(model) <= 0.15 * report.params_before


def test_a_second_cut_that_is_refused_leaves_all_as_it_was(monkeypatch):
    model = Net(4)
    before = copy.deepcopy(model.state_dict())
    real = laconic.compaction.surgery_error
    monkeypatch.setattr("laconic.compaction.surgery_error", lambda site, pair: real(site, pair) if ".0." not in site.name else 1.0)
    with pytest.raises(laconic.SurgeryError, match=r"wide\.0: the factors differ"):
        laconic.compress(model, budget=laconic.Budget(params=0.15), example_inputs=X)
    assert_same(model.state_dict(), before)
    compressor = compressor_for(model)
    with pytest.raises(laconic.SurgeryError, match=r"wide\.0: the factors differ"):  # in mid-run
        run(model, compressor.optimizers[0], range(20))
    held = {id(p) for g in compressor.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert not any(s.rank and s.name not in compressor.state.cuts.ranks for s in compressor.plan.sites)


@pytest.mark.filterwarnings("ignore:laconic. the model is within the budget")
def test_a_budget_in_milliseconds_has_pairs_only_and_says_so():
    compressor = compressor_for(Net(4), budget=laconic.Budget(latency=1.0))
    assert any("no pair is cut again along its inputs" in note and "wide" in note for note in compressor.plan.notes)
    assert not compressor.plan.inner
    resumed = compressor_for(Net(4), budget=laconic.Budget(latency=1.0))
    resumed.load_state_dict(compressor.state_dict())
    assert not resumed.plan.inner


def test_replayed_cuts_have_the_same_shapes():
    model = Net(4)
    compressor = compressor_for(model)
    run(model, compressor.optimizers[0], range(20))
    fresh = Net(4)
    plan = plan_for(fresh)
    replay_cuts(fresh, plan, {}, compressor.state.cuts.ranks, [])
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_steps_down_of_the_walk_never_cost_more():
    """Also once a pair has become so small that three layers would: it is whole again then."""
    model = Net(4)
    plan = make_plan(model, [laconic.LowRank(), laconic.Channels()], X)
    values = spectra(plan)
    spent = []
    for share in (0.6, 0.4, 0.2, 0.1, 0.05, 0.03, 0.02):
        budget = laconic.Budget(params=share)
        walk = choose_shapes(plan, values, importances_of(plan, {}), budget.currencies, budget.limits(plan))
        for site in plan.sites:
            if walk.inner[site.name]:
                three = walk.cost(site.layer)
                inner, walk.inner[site.name] = walk.inner[site.name], 0
                assert three[0] < walk.cost(site.layer)[0]
                walk.inner[site.name] = inner
        spent.append(float(walk.spent[0]))
    assert all(a > b for a, b in pairwise(spent))
