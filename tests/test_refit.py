"""Layers of a cut model, fitted to what they put out before."""

import copy

import pytest
import torch
from torch import nn

import laconic
from laconic import errors
from laconic.measure import evaluating
from laconic.models import GPT
from laconic.refit import RIDGE, _streams, refit_layers
from laconic.surgery.channels import channels_kept

from .architectures import Basic, Net, conv
from .models import assert_same, snapshot


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with evaluating(model):
        return model(x)


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(20, context=12, layers=2, width=32, heads=4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net(conv(3, 12), nn.Sequential(Basic(12, 12), Basic(12, 24, 2)), 24)


EVEN, RANKS = [laconic.Channels(even=True)], [laconic.LowRank()]
BOTH = [laconic.LowRank(), laconic.Channels()]
IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(20, (64, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("structures", [EVEN, RANKS, BOTH], ids=["even", "ranks", "both"])
@pytest.mark.parametrize(("build", "x"), [(perceptron, ROWS), (net, IMAGES), (gpt, TEXT)], ids=["perceptron", "convolutions", "GPT"])
def test_a_cut_model_comes_nearer_to_the_dense_one_on_inputs_that_it_was_not_fitted_on(build, x, structures):
    """Half of the inputs are for the fit, the others are looked at."""
    fit, other = x.split(len(x) // 2)
    wanted = outputs(build(), other)
    off = {}
    for refit in (False, True):
        model = build()
        report = laconic.compress(
            model, structures, laconic.Budget(params=0.4), example_inputs=(x[:2],), calibration=fit.split(len(fit) // 2), refit=refit
        )
        off[refit] = float((outputs(model, other) - wanted).square().mean())
        assert any("layers were fitted" in note for note in report.notes) is refit
        assert report.params_after <= 0.4 * report.params_before
    assert off[True] < 0.8 * off[False]


def by_hand(model: nn.Sequential, dense: nn.Sequential, x: torch.Tensor) -> None:
    """Layer by layer, as one system of equations each: rows of inputs, and below them the rows of the ridge."""
    here, there = x.double(), x.double()
    for layer, old in zip(model, dense, strict=True):
        if isinstance(layer, nn.Linear):
            kept = channels_kept(layer, "out")
            ones = torch.cat([here, torch.ones(len(here), 1, dtype=here.dtype)], 1)
            start = torch.cat([layer.weight, layer.bias[:, None]], 1).double()
            ridge = (RIDGE * ones.square().sum() / ones.shape[1]).sqrt() * torch.eye(ones.shape[1], dtype=here.dtype)
            put = there @ old.weight.double().T + old.bias.double()
            system, wanted = torch.cat([ones, ridge]), torch.cat([put[:, kept], ridge @ start.T])
            fitted = torch.linalg.lstsq(system, wanted).solution.T
            layer.weight.data, layer.bias.data = fitted[:, :-1].float(), fitted[:, -1].float()
            here, there = ones @ torch.cat([layer.weight, layer.bias[:, None]], 1).double().T, put
        else:
            here, there = layer(here), layer(there)


def test_each_layer_is_the_solution_of_its_least_squares():
    dense, model = perceptron(), perceptron()
    laconic.compress(model, laconic.Channels(), laconic.Budget(params=0.4), example_inputs=(ROWS[:2],))
    oracle = copy.deepcopy(model)
    by_hand(oracle, dense, ROWS)
    refit_layers(model, dense, [ROWS[:100], ROWS[100:]])
    for a, b in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    """Two blocks that add to a stream; `passed` is done to what the second puts out."""

    def __init__(self, passed=lambda x: x):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)])
        self.up = nn.ModuleList([nn.Linear(8, 12), nn.Linear(8, 8)])
        self.back = nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 8, bias=False)])
        self.passed = passed

    def forward(self, x):
        x = x + self.back[0](self.up[0](self.norms[0](x)).relu())
        return self.norms[2](x + self.passed(self.back[1](self.up[1](self.norms[1](x)).relu())))


def test_a_layer_that_adds_to_a_stream_is_fitted_to_what_the_stream_lacks_by_then():
    """The gradient of the error of the stream is zero, in which there is what the first block could not make good."""
    torch.manual_seed(0)
    dense = Residual()
    model = copy.deepcopy(dense)
    for layer in (*model.up, *model.back):
        layer.weight.data += 0.1 * torch.randn_like(layer.weight)
    start, x = model.back[1].weight.detach().double(), torch.randn(200, 8)
    refit_layers(model, dense, [x])
    taken, streams = [], []
    model.back[1].register_forward_pre_hook(lambda _, args: taken.append(args[0].double()))
    for net in (model, dense):
        net.norms[2].register_forward_pre_hook(lambda _, args: streams.append(args[0].double()))
        net(x)
    weight, (found, wanted) = model.back[1].weight.detach().double(), streams
    ridge = RIDGE * taken[0].square().sum() / 8
    gradient = (found - wanted).T @ taken[0] + ridge * (weight - start)
    assert gradient.abs().max() < 1e-4 * (wanted.T @ taken[0]).abs().max()


@pytest.mark.parametrize(
    ("passed", "last"),
    [
        (lambda x: x, True),
        (lambda x: 0.5 * x, False),
        (lambda x: x.relu(), False),
        (lambda x: x.flip(-1), False),
        (lambda x: x.flip(0), False),
    ],
    ids=["added", "scaled", "bent", "other-channels", "other-rows"],
)
def test_a_layer_adds_to_a_stream_where_what_the_next_norm_takes_in_moves_with_it(passed, last):
    torch.manual_seed(0)
    with torch.no_grad():
        found = _streams(Residual(passed).eval(), ["up.0", "back.0", "up.1", "back.1"], (torch.randn(20, 8),))
    assert found == {"back.0": "norms.1"} | ({"back.1": "norms.2"} if last else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_is_beside_a_few_large_numbers_and_in_16_bits(dtype):
    torch.manual_seed(0)
    x = torch.randn(20, 8)
    if dtype == torch.float32:  # in 16 bits rounding would hide what is added
        x[3, 2] = 3000
    for passed, last in ((lambda x: x, {"back.1": "norms.2"}), (lambda x: 0.5 * x, {})):
        model = Residual(passed).eval()
        with torch.no_grad():
            for layer in model.back:
                layer.weight.mul_(1e-3)
            found = _streams(model.to(dtype), ["up.0", "back.0", "up.1", "back.1"], (x.to(dtype),))
        assert found == {"back.0": "norms.1"} | last


def test_a_layer_that_is_narrower_and_a_pair_is_fitted_to_the_channels_that_it_has():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))
    model = copy.deepcopy(dense)
    laconic.compress(model, laconic.Channels(include="2"), laconic.Budget(params=0.7), example_inputs=(ROWS[:2],))
    laconic.compress(model, laconic.LowRank(include="2"), laconic.Budget(params=0.6))
    kept = channels_kept(model[2], "out")
    assert len(model[2]) == 2
    assert not (kept == range(len(kept))).all()

    def off() -> float:
        return float((outputs(model[:3], ROWS) - outputs(dense[:3], ROWS)[:, kept]).square().mean())

    before = off()
    assert refit_layers(model, dense, [ROWS]).startswith("3 layers were fitted")
    assert off() < before


def test_a_model_that_was_cut_before_is_fitted_to_what_it_was_then():
    model = perceptron()
    laconic.compress(model, laconic.Channels(), laconic.Budget(params=0.7), example_inputs=(ROWS[:2],))
    once = copy.deepcopy(model)
    off = {}
    for refit in (False, True):
        again = copy.deepcopy(once)
        laconic.compress(again, laconic.Channels(), laconic.Budget(params=0.5), example_inputs=(ROWS[:2],), calibration=[ROWS], refit=refit)
        off[refit] = float((outputs(again, ROWS) - outputs(once, ROWS)).square().mean())
    assert off[True] < 0.8 * off[False]


def test_a_layer_that_is_called_by_name_is_fitted():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = perceptron()

        def forward(self, x):
            for layer in self.body:
                x = layer(input=x)
            return x

    dense, model = Named(), Named()
    laconic.compress(model, laconic.LowRank(), laconic.Budget(params=0.6))
    assert "layers were fitted" in refit_layers(model, dense, [ROWS])


def test_patches_of_a_convolution_are_what_it_multiplies():
    """Fitted to another convolution of the same shape on enough inputs, it becomes that one."""
    for kind, x, options in (
        (nn.Conv2d, torch.randn(40, 3, 9, 8), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
        (nn.Conv1d, torch.randn(80, 3, 20), {"kernel_size": 4, "stride": 3, "padding": 2}),
    ):
        torch.manual_seed(0)
        dense, model = (nn.Sequential(kind(3, 5, **options), nn.ReLU()) for _ in range(2))
        refit_layers(model, dense, [x])
        torch.testing.assert_close(model[0].weight, dense[0].weight, rtol=0, atol=5e-3)  # the ridge holds it back
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=2e-2)


class Odd(nn.Module):
    """A layer that runs twice, one that is frozen, two that share a weight, a grouped convolution's place."""

    def __init__(self):
        super().__init__()
        self.twice, self.frozen, self.one, self.two, self.last = (nn.Linear(6, 6) for _ in range(5))
        self.two.weight = self.one.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.last(self.two(self.one(self.frozen(self.twice(self.twice(x))))))


def test_what_runs_twice_is_frozen_or_shared_stays_as_it_is():
    torch.manual_seed(0)
    dense, model = Odd(), Odd()
    before = copy.deepcopy(model.state_dict())
    note = refit_layers(model, dense, [ROWS])
    assert note.startswith("1 layers were fitted")
    assert note.endswith("; not fitted: twice, frozen, one, two")
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"last.weight", "last.bias"}


def test_a_fit_that_leads_away_is_not_kept(monkeypatch):
    dense, model = perceptron(), perceptron()
    before = snapshot(model)
    with torch.no_grad():
        dense[4].weight.add_(0.1)
    found = iter([0.5, 0.6])
    monkeypatch.setattr("laconic.refit._distance", lambda *_: next(found))
    note = refit_layers(model, dense, [ROWS])
    assert note == "no layer was fitted: the outputs would differ from the dense model's by 0.6 of their size, as cut by 0.5"
    assert_same(snapshot(model), before)


def test_statistics_are_estimated_anew_and_modes_stay():
    model = net().train()
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    laconic.compress(model, RANKS, laconic.Budget(params=0.5), example_inputs=(IMAGES[:2],), calibration=[IMAGES], refit=True)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.training for m in model.modules())
    assert {m: m.momentum for m in norms} == momenta
    seen = []
    handle = norms[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs(model, IMAGES)
    handle.remove()
    # (the statistics were taken while the norms before this one went by their batch)
    torch.testing.assert_close(norms[-1].running_mean, seen[0].mean((0, 2, 3)), rtol=0.1, atol=0.05)


def test_a_fit_without_inputs_is_refused_and_an_error_leaves_the_model():
    model = perceptron()
    before = snapshot(model)
    with pytest.raises(errors.InvalidValueError, match=r"^refit=True fits layers on calibration inputs: give calibration="):
        laconic.compress(model, budget=laconic.Budget(params=0.5), refit=True)
    with pytest.raises(errors.SurgeryError, match=r"^the model does not run on calibration \(RuntimeError: .*; check that every batch"):
        laconic.compress(model, budget=laconic.Budget(params=0.5), calibration=[ROWS, ROWS[:, :3]], refit=True)
    assert_same(snapshot(model), before)
