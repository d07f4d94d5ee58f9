"""Cutting: which ranks, what comes out, what it may cost, what happens to the optimizer, and what a refusal leaves behind."""

import copy
import io
import json
import sys
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

import laconic
from laconic import compaction, timing
from laconic.allocate import Floats
from laconic.matricize import unfoldings
from laconic.report import CompactReport
from laconic.report.html import headline

from .cases import LAYERS, with_spectrum
from .models import Shared, Tied, assert_same, backward, cnn, inputs_for, low_rank, mlp, snapshot

NOTHING = laconic.LowRank(strength=0.0)
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def compressed(model: nn.Module, **options) -> tuple[CompactReport, nn.Module]:
    report = laconic.compress(model, **options)
    return report, model


def ranks(report: CompactReport) -> dict[str, int | None]:
    return {layer.name: layer.rank for layer in report.layers}


def spectrum(weight: Tensor) -> Floats:
    return np.linalg.svd(weight.detach().double().flatten(1).numpy(), compute_uv=False)


def sgd(model: nn.Module) -> optim.SGD:
    return optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def wide(values_by_layer: dict[int, list[float]], size: int = 16) -> nn.Sequential:
    """Square layers without bias, with the given spectra."""
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in values_by_layer)).double()
    for layer, (seed, values) in zip(model, values_by_layer.items(), strict=True):
        layer.weight.data = torch.from_numpy(with_spectrum(size, size, values, seed))
    return model


# ---- which ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_budget_and_energy_only_what_is_zero_to_rounding_goes(dtype):
    model = low_rank(mlp(dtype), {"0.weight": 3, "4.weight": 1})
    x = inputs_for(model)
    before = model(x).detach()
    report = laconic.Compressor(model, sgd(model), NOTHING, example_inputs=(x,)).compact()
    assert ranks(report) == {"0": 3, "2": None, "4": 1}
    torch.testing.assert_close(model(x), before, rtol=0, atol=50 * torch.finfo(dtype).eps)
    assert report.max_abs_diff <= 50 * torch.finfo(dtype).eps


def test_a_weight_that_is_entirely_zero_keeps_rank_one_and_its_output():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    before = model(inputs_for(model)).detach()
    report = laconic.Compressor(model, sgd(model), NOTHING).compact()
    assert ranks(report) == {"0": None, "2": 1, "4": None}
    torch.testing.assert_close(model(inputs_for(model)), before)


@pytest.mark.parametrize("cut", ["compact", "compress"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.9, 0.99])
def test_an_energy_share_is_kept_by_every_layer_with_as_few_ranks_as_possible(share, cut):
    model = wide({0: list(np.geomspace(1, 1e-3, 16)), 1: list(np.linspace(1, 0.01, 16)), 2: [1.0] * 16})
    squares = [spectrum(layer.weight) ** 2 for layer in model]
    wanted = [next(r for r in range(1, 17) if s[:r].sum() >= share * s.sum()) for s in squares]
    report = (
        laconic.Compressor(model, sgd(model), NOTHING).compact(energy=share) if cut == "compact" else laconic.compress(model, energy=share)
    )
    guarded = [r if r * 32 < 256 else None for r in wanted]  # two layers of rank 8 are no smaller than one
    assert list(ranks(report).values()) == guarded
    for layer, s in zip(report.layers, squares, strict=True):
        assert layer.energy == pytest.approx(s[: layer.rank].sum() / s.sum() if layer.rank else 1.0)


@pytest.mark.parametrize(("rank", "cut_to"), [(7, 7), (8, None), (9, None)])
def test_above_break_even_a_layer_stays_dense(rank, cut_to):
    report, _ = compressed(wide({0: [1.0] * rank}), energy=1.0)
    assert ranks(report) == {"0": cut_to}
    assert "smaller up to rank 7 only" in report.layers[0].note or cut_to


@pytest.mark.parametrize("size", [64, 66])
def test_ranks_are_rounded_up_to_a_multiple(size):
    model = wide({0: [1.0] * 9, 1: [1.0] * 30}, size)
    report, _ = compressed(model, structures=laconic.LowRank(multiple=8), energy=1.0)
    assert ranks(report) == {"0": 16, "1": None if size == 64 else 32}  # rounded up to 32, 64 x 64 is no smaller


def test_ranks_for_a_budget_are_multiples_too():
    report, _ = compressed(
        wide({0: list(np.geomspace(1, 0.1, 64)), 1: [1.0] * 64}, 64),
        structures=laconic.LowRank(multiple=8),
        budget=laconic.Budget(params=0.5),
    )
    assert all(layer.rank % 8 == 0 for layer in report.layers)


BUDGETS = {
    "params": {"params": 0.4},
    "tight params": {"params": 0.27},
    "macs": {"macs": 0.3},
    "both": {"params": 0.5, "macs": 0.35},
    "absolute": {"max_params": 700},
    "absolute macs": {"max_macs": 9000},
}  # fmt: skip


@pytest.mark.parametrize("post_hoc", [True, False])
@pytest.mark.parametrize("limits", BUDGETS.values(), ids=BUDGETS)
def test_a_budget_is_never_exceeded_and_no_further_unit_would_fit(limits, post_hoc):
    model = cnn()
    x = inputs_for(model, batch=1)
    dense = laconic.profile(model, (x,), latency=False)
    budget = laconic.Budget(**limits)
    if post_hoc:
        report = laconic.compress(model, budget=budget, example_inputs=(x,))
    else:
        optimizer = sgd(model)
        compressor = laconic.Compressor(model, optimizer, budget=budget, total_steps=8, example_inputs=(x,), cut="end", every=2)
        for t in range(8):
            backward(model, t)
            optimizer.step()
            optimizer.zero_grad()
        report = compressor.compact()
    after = laconic.profile(model, (x,), latency=False)
    assert (report.params_before, report.macs_before) == (dense.params, dense.macs)
    assert (report.params_after, report.macs_after) == (after.params, after.macs)
    room = {
        "params": min(limits.get("params", 1) * dense.params, limits.get("max_params", 1e9)) - after.params,
        "macs": min(limits.get("macs", 1) * dense.macs, limits.get("max_macs", 1e9)) - after.macs,
    }
    assert min(room.values()) >= 0
    positions = {"0": 64, "3": 9, "7": 1}  # outputs of each layer
    for layer in report.layers:
        if layer.rank is not None and (layer.rank + 1) * (unit := layer.params_after // layer.rank) < layer.params_before:
            assert unit > room["params"] or unit * positions[layer.name] > room["macs"], layer


def test_a_budget_of_everything_leaves_the_model_dense():
    model = mlp()
    before = snapshot(model)
    report = laconic.compress(model, budget=laconic.Budget(params=1.0))
    assert set(ranks(report).values()) == {None}
    assert_same(snapshot(model), before)


def test_the_product_rule_starves_no_layer():
    """A strong layer beside a weak one: the relative loss counts, not the absolute one."""
    flat = list(np.linspace(1, 0.5, 16))
    report, _ = compressed(wide({0: flat, 1: [1e-3 * v for v in flat]}), budget=laconic.Budget(params=0.4))
    first, second = ranks(report).values()
    assert abs(first - second) <= 1


def test_an_infeasible_budget_says_what_is_feasible_and_that_is_true():
    model = cnn()
    before = snapshot(model)
    with pytest.raises(laconic.InfeasibleBudgetError) as caught:
        laconic.compress(model, budget=laconic.Budget(params=0.01))
    assert_same(snapshot(model), before)
    smallest = caught.value.smallest
    with pytest.raises(laconic.InfeasibleBudgetError):
        laconic.compress(model, budget=laconic.Budget(params=smallest - 2e-4))
    report = laconic.compress(model, budget=laconic.Budget(params=smallest))
    assert set(ranks(report).values()) == {1}


def test_only_faster_leaves_dense_what_measures_slower(monkeypatch):
    """The timing is replaced: pairs with 16 inputs pretend to be slower than their layer."""

    def pretend(module, inputs, seconds):
        slow = isinstance(module, nn.Sequential) and inputs[0].shape[-1] == 16
        return laconic.Latency(3.0 if slow else 1.0 if isinstance(module, nn.Sequential) else 2.0, 0.0, 1, 1, "cpu")

    monkeypatch.setattr(compaction, "measure_latency", pretend)

    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 16), nn.Linear(16, 16))

    x = torch.randn(2, 16)
    report, cut = compressed(model(), energy=0.3, example_inputs=(x,), only_faster=True, structures=laconic.LowRank())
    assert [type(m).__name__ for m in cut] == ["Linear", "Sequential", "Sequential", "Linear"]
    assert [(layer.ms_before, layer.ms_after) for layer in report.layers] == [(None, None), (2.0, 1.0), (2.0, 1.0), (None, None)]
    assert sum("measured no faster" in note for note in report.notes) == 2

    budgeted, cut = compressed(
        model(), budget=laconic.Budget(params=0.7), example_inputs=(x,), only_faster=True, structures=laconic.LowRank()
    )
    assert [type(m).__name__ for m in cut][::3] == ["Linear", "Linear"]
    assert budgeted.params_after <= 0.7 * budgeted.params_before

    forced, cut = compressed(
        model(), budget=laconic.Budget(params=0.3), example_inputs=(x,), only_faster=True, structures=laconic.LowRank()
    )
    assert isinstance(cut[0], nn.Sequential)
    assert any("because the budget needs it" in note for note in forced.notes)


# ---- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("linear-one-output", "conv2d-depthwise")])
def test_the_result_is_plain_layers_that_compute_the_truncated_layer(name):
    layer, x = LAYERS[name].make(), LAYERS[name].input()
    model = nn.Sequential(layer)
    unfolding = unfoldings(layer)[0]
    u, s, vh = np.linalg.svd(unfolding.unfold(layer.weight).detach().numpy(), full_matrices=False)
    truncated = copy.deepcopy(layer)
    truncated.weight.data = unfolding.fold(torch.from_numpy((u[..., :1] * s[..., None, :1]) @ vh[..., :1, :]))
    report = laconic.compress(
        model,
        budget=laconic.Budget(max_params=sum(p.numel() for p in layer.parameters()) - layer.weight.numel() + unfolding.unit_params),
        example_inputs=(x,),
    )
    assert ranks(report) == {"0": 1}
    assert type(model[0]) is nn.Sequential
    assert all(type(m) in (*PLAIN, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) for m in model[0])
    torch.testing.assert_close(model(x), truncated(x))


@pytest.mark.parametrize("build", [mlp, cnn, Tied, Shared])
def test_the_report_tells_the_true_change_of_the_outputs(build):
    model = build().train()
    x = inputs_for(model)
    before = copy.deepcopy(model).eval()(x)
    report = laconic.compress(model, energy=0.6, example_inputs=(x,))
    after = copy.deepcopy(model).eval()(x)
    assert report.max_abs_diff == float((before.double() - after.double()).detach().abs().max())
    assert report.max_abs_diff > 1e-3
    assert 0 < report.surgery_error < 1e-6 or before.dtype == torch.float64
    assert model.training


class Detector(nn.Module):
    """What it finds is as much as it finds; in training, a score for each place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.box, self.score = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 1)

    def forward(self, x: Tensor):
        h = self.body(x).relu()
        scores = self.score(h).squeeze(-1)
        if self.training:
            return scores
        keep = scores > 0
        return {"boxes": self.box(h)[keep], "scores": scores[keep]}


def test_outputs_whose_shapes_depend_on_the_data_end_no_run():
    model, x = Detector(), torch.randn(50, 8)
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    budget = laconic.Budget(params=0.4)
    compressor = laconic.Compressor(model, optimizer, budget=budget, total_steps=20, example_inputs=(x,))
    for _ in range(20):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = compressor.compact()
    assert report.params_after <= 0.4 * report.params_before
    assert any("their shapes, depend on the numbers in them" in note for note in report.notes)


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor):
        class Found:
            value = self.net(x)

        return Found()


@pytest.mark.parametrize(("build", "note"), [(Detector, "could not be compared"), (Opaque, "no tensor was found")])
def test_what_cannot_be_compared_is_said_and_has_no_number(build, note):
    model = build()
    report = laconic.compress(model, laconic.LowRank(), energy=0.3, example_inputs=(inputs_for(model, batch=50),))
    assert report.max_abs_diff is None
    assert any(note in n for n in report.notes)
    assert "changed an output" not in str(report)
    assert "not compared: see the notes" in headline(report)
    assert CompactReport.from_json(json.loads(json.dumps(report.to_json()))).max_abs_diff is None


def test_a_report_survives_json():
    report, _ = compressed(cnn(), energy=0.8, example_inputs=(torch.randn(1, 3, 8, 8),))
    assert CompactReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize("build", [mlp, cnn, Tied, Shared])
def test_the_result_can_be_copied_saved_exported_and_trained(build):
    model = build()
    x = inputs_for(model)
    laconic.compress(model, energy=0.6)
    model.eval()
    wanted = model(x).detach()
    assert torch.equal(copy.deepcopy(model)(x), wanted)

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        nn.init.zeros_(p)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), wanted)

    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), wanted)

    before = snapshot(model)[0]
    optimizer = sgd(model.train())
    backward(model, 0)
    optimizer.step()
    for name, p in model.named_parameters():
        if p.ndim > 1:  # (a bias in front of BatchNorm has no gradient)
            assert p.grad.abs().sum() > 0, name
            assert not torch.equal(p, before[name]), name


def test_a_tied_weight_stays_tied_and_a_shared_module_shared():
    report, tied = compressed(Tied(), energy=0.5)
    assert tied.one[0].weight is tied.two[0].weight
    assert tied.one[1].weight is tied.two[1].weight
    assert tied.one[1].bias is not tied.two[1].bias
    assert report.params_after == sum(p.numel() for p in tied.parameters())
    _, shared = compressed(Shared(), energy=0.5)
    assert type(shared.body) is nn.Sequential
    assert shared.body is shared.again


def test_compacting_twice_changes_nothing_and_returns_the_same_report():
    model = mlp()
    compressor = laconic.Compressor(model, sgd(model), NOTHING)
    report = compressor.compact(energy=0.5)
    before = snapshot(model)
    assert compressor.compact(energy=0.1) is report
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("option", [{"calibration": [torch.zeros(2, 6)]}, {"only_faster": True}])
def test_what_comes_too_late_for_a_settled_run_is_told(option):
    model = mlp()
    optimizer = sgd(model)
    compressor = laconic.Compressor(model, optimizer, laconic.LowRank(), budget=laconic.Budget(params=0.5), total_steps=10)
    for _ in range(10):
        model(torch.ones(2, 6, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (name,) = option
    assert [note for note in compressor.compact(**option).notes if note.startswith(f"{name} had no effect")]


def test_a_compact_model_can_be_compressed_again():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    first, _ = compressed(model, budget=laconic.Budget(params=0.6))
    x = torch.randn(3, 32)
    second, _ = compressed(model, budget=laconic.Budget(params=0.5), example_inputs=(x,))
    assert second.params_before == first.params_after
    assert second.params_after == sum(p.numel() for p in model.parameters()) <= 0.5 * second.params_before
    assert second.surgery_error < 1e-6


def test_frozen_weights_may_be_cut_post_hoc_and_stay_frozen():
    model = mlp().requires_grad_(False)
    laconic.compress(model, energy=0.5)
    assert isinstance(model[0], nn.Sequential)
    assert not any(p.requires_grad for p in model.parameters())


# ---- BatchNorm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("post_hoc", [True, False])
def test_batch_norm_statistics_are_the_average_over_the_calibration_batches(post_hoc):
    model = cnn().train()
    batches = [inputs_for(model, seed=s) for s in range(3)]
    if post_hoc:
        laconic.compress(model, energy=0.5, calibration=iter(batches))
    else:
        report = laconic.Compressor(model, sgd(model), NOTHING).compact(energy=0.5, calibration=batches)
        assert any("re-estimated on 3 batches" in note for note in report.notes)
    with torch.no_grad():
        seen = [model[0](x) for x in batches]
    mean = torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0)
    var = torch.stack([s.var((0, 2, 3)) for s in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert model[1].num_batches_tracked == 3
    assert model[1].momentum == 0.1
    assert all(m.training for m in model.modules())


def test_calibration_batches_may_be_tuples_of_arguments():
    model = cnn()
    laconic.compress(model, energy=0.5, calibration=[(inputs_for(model),)])
    assert model[1].num_batches_tracked == 1


class OneOfTwo(nn.Module):
    """Trained on two domains, each with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        self.norms = nn.ModuleList([nn.BatchNorm1d(12), nn.BatchNorm1d(12)])
        for norm in self.norms:
            norm.running_mean.fill_(5.0)
            norm.num_batches_tracked.fill_(7)

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.head(self.norms[domain](self.fc(x)))


def test_statistics_that_no_batch_of_the_calibration_reaches_stay_and_are_named():
    model = OneOfTwo()
    before = snapshot(model.norms[1])
    report = laconic.compress(model, energy=0.5, calibration=[torch.randn(8, 6)])
    assert_same(snapshot(model.norms[1]), before)
    assert model.norms[0].num_batches_tracked == 1
    assert any("norms.1: no batch of calibration reaches it" in note for note in report.notes)


@pytest.mark.parametrize(
    ("build", "options", "note"),
    [
        (cnn, {}, "statistics are those of the uncut model"),
        (lambda: mlp(torch.float32), {"calibration": [torch.zeros(2, 6)]}, "calibration had no effect"),
    ],
)
def test_a_setting_without_effect_and_statistics_that_are_stale_are_said(build, options, note):
    report, _ = compressed(build(), energy=0.5, **options)
    assert any(note in n for n in report.notes)


# ---- refusal --------------------------------------------------------------------------------------------------------


class Sneaky(nn.Module):
    """Reads a child's weight under a name that no scan of the source can see."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        layer = getattr(self, "f" + "c")
        known = isinstance(layer, (nn.Linear, nn.Sequential))
        return self.head(self.norm(nn.functional.linear(x, layer.weight) if known else layer(x)))


def refuses_a_pair(monkeypatch) -> tuple[nn.Module, dict]:
    """And nothing else, so that no trial before the cut can see it."""
    model = Sneaky()

    def forward(x: Tensor) -> Tensor:
        if isinstance(model.fc, nn.Sequential):
            raise TypeError("no pairs here")
        return model.head(model.norm(model.fc(x)))

    model.forward = forward
    return model, {}


def factors_that_are_wrong(monkeypatch) -> tuple[nn.Module, dict]:
    """Of the second layer only, so that the first was built already."""
    honest = laconic.LowRank.cut

    def dishonest(self, site, rank):
        pairs = honest(self, site, rank)
        if site.name.startswith("head"):
            pairs[0][0].weight.data *= 1.001
        return pairs

    monkeypatch.setattr(laconic.LowRank, "cut", dishonest)
    model = Sneaky()
    model.forward = lambda x: model.head(model.norm(model.fc(x)))
    return model, {}


def calibration_that_fails(monkeypatch) -> tuple[nn.Module, dict]:
    model = Sneaky()
    model.forward = lambda x: model.head(model.norm(model.fc(x)))
    return model, {"calibration": [torch.randn(4, 8), torch.randn(4, 9)]}


def calibration_that_is_empty(monkeypatch) -> tuple[nn.Module, dict]:
    return calibration_that_fails(monkeypatch)[0], {"calibration": []}


REFUSALS = {
    "the model takes no pair": (refuses_a_pair, laconic.SurgeryError, r"no longer runs after the cut .* LowRank\(exclude="),
    "the factors are wrong": (factors_that_are_wrong, laconic.SurgeryError, r"head: the factors differ .* more than rounding"),
    "calibration fails": (calibration_that_fails, laconic.SurgeryError, "no longer runs"),
    "calibration is empty": (calibration_that_is_empty, laconic.InvalidValueError, "calibration holds no batch"),
}


@pytest.mark.parametrize(("prepare", "error", "message"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("post_hoc", [True, False])
def test_a_refusal_leaves_model_and_optimizer_as_they_were(prepare, error, message, post_hoc, monkeypatch):
    model, options = prepare(monkeypatch)
    x = torch.randn(4, 8)
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    compressor = laconic.Compressor(model, optimizer, laconic.LowRank(strength=5.0), example_inputs=(x,), every=3)
    for _ in range(4):  # one more than a proximal step: something is owed when the cut is refused
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = dict(model.named_modules())
    groups = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    before = snapshot(model, optimizer)
    cut = partial(laconic.compress, model, example_inputs=(x,)) if post_hoc else compressor.compact
    with pytest.raises(error, match=message):
        cut(energy=0.5, **options)
    assert_same(snapshot(model, optimizer), before)
    after = dict(model.named_modules())
    assert parts.keys() == after.keys()
    assert all(parts[k] is after[k] for k in parts)
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == groups
    monkeypatch.undo()
    model.forward = lambda x: model.head(model.norm(model.fc(x)))
    assert compressor.compact(energy=0.5).params_after < sum(p.numel() for p in parts[""].parameters()) + 1  # and it can go on


# ---- the optimizer over a cut ---------------------------------------------------------------------------------------

MOMENTUM = {
    "sgd": (lambda p: optim.SGD(p, lr=0.0, momentum=0.9), "momentum_buffer", 1.0),
    "adam": (lambda p: optim.Adam(p, lr=0.0, betas=(0.75, 0.99)), "exp_avg", 0.25),
    "rmsprop": (lambda p: optim.RMSprop(p, lr=0.0, centered=True, alpha=0.75), "grad_avg", 0.25),
}


@pytest.mark.parametrize(("build", "key", "factor"), MOMENTUM.values(), ids=MOMENTUM)
@pytest.mark.parametrize(
    ("name", "which"), [("linear", 0), ("hf-conv1d", 0), ("conv2d-all-uneven", 0), ("conv2d-all-uneven", 1), ("conv2d-groups", 0), ("conv2d-groups", 1), ("transposed2d", 0), ("conv3d", 1)]
)  # fmt: skip
def test_first_moments_follow_the_chain_rule(build, key, factor, name, which):
    """With rate 0 a first moment is the gradient, and over an exact cut autograd must find the same for the factors."""
    layer, x = LAYERS[name].make(), LAYERS[name].input()
    unfolding = unfoldings(layer)[which]
    rank = 2
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(unfolding.unfold(layer.weight), full_matrices=False)
        layer.weight.copy_(unfolding.fold((u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]))
    model = nn.Sequential(layer)
    optimizer = build(model.parameters())
    matricization = ("out,in*kh*kw", "out*kh,in*kw")[which]
    compressor = laconic.Compressor(model, optimizer, laconic.LowRank(strength=0.0, matricization=matricization))
    weigh = torch.randn_like(model(x))
    (model(x) * weigh).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert ranks(compressor.compact(energy=1 - 1e-12)) == {"0": rank}
    (model(x) * weigh).sum().backward()
    for p in model.parameters():
        torch.testing.assert_close(optimizer.state[p][key], factor * p.grad, rtol=1e-8, atol=1e-8 * float(p.grad.abs().max()))
        if "step" in optimizer.state[p]:
            assert float(optimizer.state[p]["step"]) == 1


@pytest.mark.parametrize(
    ("build", "keys"),
    [
        (lambda p: optim.Adam(p, amsgrad=True), ["exp_avg_sq", "max_exp_avg_sq"]),
        (optim.Adagrad, ["sum"]),
        (optim.Adadelta, ["square_avg", "acc_delta"]),
        (optim.RMSprop, ["square_avg"]),
    ],
)
def test_second_moments_follow_the_independent_entries_approximation(build, keys):
    """V_A = V_W (B o B)^T and V_B = (A o A)^T V_W, written out for a linear layer and a convolution; the step count is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 9, 10)).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    optimizer = build(model.parameters())
    compressor = laconic.Compressor(model, optimizer, NOTHING)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    conv, linear = (copy.deepcopy(optimizer.state[model[i].weight]) for i in (0, 2))
    compressor.compact(energy=0.5)
    (b, a), (right, left) = ([f.weight.detach() for f in model[i]] for i in (0, 2))
    for key in keys:
        v, w = conv[key], linear[key]
        wanted = {
            model[0][0].weight: torch.einsum("or,oikl->rikl", a[:, :, 0, 0] ** 2, v),
            model[0][1].weight: torch.einsum("oikl,rikl->or", v, b**2)[:, :, None, None],
            model[2][0].weight: torch.einsum("or,oi->ri", left**2, w),
            model[2][1].weight: torch.einsum("oi,ri->or", w, right**2),
        }
        for p, value in wanted.items():
            torch.testing.assert_close(optimizer.state[p][key], value)
            assert float(optimizer.state[p]["step"]) == 3


def test_the_carried_variance_of_centered_rmsprop_is_not_negative():
    """It takes the root of square_avg - grad_avg^2: the approximation has to be one of the variance."""
    model = mlp()
    optimizer = optim.RMSprop(model.parameters(), lr=1e-3, centered=True, alpha=0.5)
    compressor = laconic.Compressor(model, optimizer, NOTHING)
    for _ in range(20):  # always the same gradient, nearly: the variance is small beside the mean
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
    compressor.compact(energy=0.5)
    for p in model.parameters():
        state = optimizer.state[p]
        assert torch.all(state["square_avg"] >= state["grad_avg"] ** 2)
    backward(model, 0)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "adam amsgrad foreach": lambda p: optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.001, momentum=0.5, centered=True),
    "adamw capturable": lambda p: optim.AdamW(p, lr=0.01, capturable=True),
    "adam amsgrad foreach capturable": lambda p: optim.Adam(p, lr=0.01, amsgrad=True, foreach=True, capturable=True),
    "rmsprop capturable": lambda p: optim.RMSprop(p, lr=0.001, momentum=0.5, capturable=True),
}


@pytest.fixture
def capturable_here(monkeypatch):
    """PyTorch allows `capturable=True` on accelerators alone, but its arithmetic, without a number that leaves the tensors, runs anywhere."""
    for module in ("adam", "rmsprop"):  # names in torch.optim that functions have taken
        monkeypatch.setattr(sys.modules[f"torch.optim.{module}"], "_get_capturable_supported_devices", lambda *args, **options: ["cpu"])


@pytest.fixture
def slow_pairs(monkeypatch, empty_table):
    """Layers so small that a pair of them takes longer: none is cut before it must be."""

    def measured(module, unfolding, shape, break_even, training):
        ranks = timing.grid(break_even)
        return timing.RankTimes(1.0, ranks, (2.0,) * len(ranks))

    monkeypatch.setattr(timing, "_measure", measured)


HALF = laconic.Schedule(settle=0.5)


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_after_a_cut_in_mid_run_the_optimizer_holds_the_live_parameters_and_the_loss_does_not_jump(build, capturable_here, slow_pairs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 12)).double()
    x = torch.randn(64, 12, dtype=torch.float64)
    y = x[:, :2] @ torch.randn(2, 12, dtype=torch.float64) / 2
    optimizer = build([{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 1e-4}])
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.6), total_steps=200, every=2, schedule=HALF)
    losses = []
    for t in range(200):
        assert isinstance(model[0], nn.Linear) == (t < 100)
        loss = nn.functional.mse_loss(model(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for group, part in zip(optimizer.param_groups, (model[0], model[2]), strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in part.parameters()}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
    assert optimizer.param_groups[1]["weight_decay"] == 1e-4
    assert max(losses[100:110]) < 1.2 * losses[99] + 0.02 * losses[0]
    assert losses[-1] < losses[99]
    report = compressor.compact()
    assert report.params_after <= 0.6 * report.params_before
    assert report.history[-1].ranks == {f"{layer.name}.weight": layer.rank for layer in report.layers}


def test_the_state_is_worth_carrying():
    """The step after an exact cut changes the function as the dense step does; with an empty state it would be another one."""

    def change(forget: bool) -> tuple[Tensor, Tensor]:
        model = low_rank(mlp(), {"2.weight": 2})
        optimizer = optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        compressor = laconic.Compressor(model, optimizer, laconic.LowRank(strength=0.0, include="2"))
        for t in range(5):
            backward(model, t)
            optimizer.step()
            optimizer.zero_grad()
        momentum = optimizer.state[model[2].weight]["momentum_buffer"].clone()
        w = model[2].weight.detach().clone()
        compressor.compact(energy=1 - 1e-12)
        if forget:
            optimizer.state.clear()
        optimizer.param_groups[0]["lr"] = 1e-6
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        new = (model[2][1].weight @ model[2][0].weight).detach()
        return (w - new) / 1e-6, 0.9 * momentum

    moved, momentum = change(forget=False)
    assert float((moved * momentum).sum()) > 0  # downhill, along the momentum
    assert float(change(forget=True)[0].norm()) < 1e-3 * float(moved.norm())


@pytest.mark.parametrize(
    ("build", "entry"), [(lambda p: optim.ASGD(p, lr=0.01), "ax"), (lambda p: optim.Adamax(p, lr=0.01), "exp_inf"), (lambda p: optim.Adafactor(p, lr=0.01), "row_var")]
)  # fmt: skip
def test_an_optimizer_state_that_cannot_be_carried_keeps_the_layer_dense_and_is_named(build, entry):
    model = mlp()
    optimizer = build(model.parameters())
    compressor = laconic.Compressor(model, optimizer, NOTHING)
    backward(model, 0)
    optimizer.step()
    before = snapshot(model, optimizer)
    report = compressor.compact(energy=0.5)
    assert set(ranks(report).values()) == {None}
    assert sum(f"state {entry!r}" in note for note in report.notes) == 3
    assert_same(snapshot(model, optimizer), before)


def test_a_run_that_ends_before_its_cut_is_cut_at_the_end_with_a_warning():
    model = mlp()
    compressor = laconic.Compressor(model, sgd(model), budget=laconic.Budget(params=0.6), total_steps=100)
    with pytest.warns(UserWarning, match="ended after 0 of 100 steps"), pytest.warns(UserWarning, match="no step of SGD was seen"):
        report = compressor.compact()
    assert report.params_after <= 0.6 * report.params_before


# ---- resume ---------------------------------------------------------------------------------------------------------


def pointwise(model: nn.Module) -> list[optim.Optimizer]:
    return [optim.Adam(model.parameters(), lr=0.01)]


def muon_and_adamw(model: nn.Module) -> list[optim.Optimizer]:
    hidden = [model[0].weight, model[2].weight]
    return [optim.Muon(hidden, lr=0.01), optim.AdamW([p for p in model.parameters() if not any(p is h for h in hidden)], lr=0.01)]


BUDGET = {"budget": laconic.Budget(params=0.6), "total_steps": 20}
RUNS = {
    "cut early": (mlp, pointwise, {**BUDGET, "every": 3}),
    "cut at the end": (mlp, pointwise, {**BUDGET, "every": 3, "cut": "end"}),
    "strength": (mlp, pointwise, {"structures": laconic.LowRank(strength=0.5), "every": 3}),
    "two optimizers": (mlp, muon_and_adamw, {**BUDGET, "every": 2}),
    "network with BatchNorm": (cnn, pointwise, {**BUDGET, "every": 2, "structures": laconic.LowRank(matricization="auto")}),
    "tied": (lambda seed=0: Tied(), pointwise, {**BUDGET, "every": 1}),
}  # fmt: skip


class Run:
    """A training run with schedulers that can be saved and resumed at any step."""

    def __init__(self, build, optimizers, options, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = build(seed=seed)
        self.optimizers = optimizers(self.model)
        self.compressor = laconic.Compressor(self.model, self.optimizers, example_inputs=(inputs_for(self.model),), **options)
        self.schedulers = [optim.lr_scheduler.CosineAnnealingLR(o, 20) for o in self.optimizers]

    def train(self, start: int, stop: int) -> "Run":
        for t in range(start, stop):
            backward(self.model, t)
            for part in (*self.optimizers, *self.schedulers):
                part.step()
            self.model.zero_grad()
        return self

    def state(self) -> list:
        return snapshot(self.compressor, self.model, *self.optimizers, *self.schedulers)

    def resume(self, state: list) -> "Run":
        for part, saved in zip((self.compressor, self.model, *self.optimizers, *self.schedulers), state, strict=True):
            part.load_state_dict(saved)
        return self


@cache
def uninterrupted(name: str) -> tuple[list[bytes], list, dict, list]:
    """The states before each step, in files; at the end; the report, and model and optimizers after it."""
    whole = Run(*RUNS[name], seed=0)
    files = []
    for t in range(20):
        torch.save(whole.state(), file := io.BytesIO())
        files.append(file.getvalue())
        whole.train(t, t + 1)
    return files, whole.state(), whole.compressor.compact().to_json(), snapshot(whole.model, *whole.optimizers)


@pytest.mark.parametrize("at", [1, 7, 10, 15], ids=["in the warm-up", "under pressure", "just cut", "settling"])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(name, at):
    files, end, report, compact = uninterrupted(name)
    resumed = Run(*RUNS[name], seed=7).resume(torch.load(io.BytesIO(files[at]), weights_only=True)).train(at, 20)
    assert_same(resumed.state(), end)
    assert_same(resumed.compressor.compact().to_json(), report)
    assert_same(snapshot(resumed.model, *resumed.optimizers), compact)


def test_a_resumed_run_keeps_the_unfoldings_that_auto_chose_for_other_weights():
    def run(separable: bool):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))
        if separable:  # rank 1 between rows and columns of the kernel: the spatial unfolding is the cheap one
            model[0].weight.data = torch.einsum("oh,iw->oihw", torch.randn(8, 3), torch.randn(8, 3))
        else:  # rank 1 between outputs and the rest
            model[0].weight.data = torch.einsum("o,ihw->oihw", torch.randn(8), torch.randn(8, 3, 3))
        structure = laconic.LowRank(matricization="auto", strength=0.0)
        return laconic.Compressor(model, sgd(model), structure, example_inputs=(torch.zeros(1, 8, 4, 4),))

    first, fresh = run(separable=True), run(separable=False)
    assert [c.plan.sites[0].unfolding.name for c in (first, fresh)] == ["out*k,in", "out,in*k"]
    fresh.load_state_dict(first.state_dict())
    assert str(fresh.plan) == str(first.plan)
    assert [s.unit_macs for s in fresh.plan.sites] == [s.unit_macs for s in first.plan.sites]


def test_a_cut_uses_no_random_numbers():
    model = mlp()
    compressor = laconic.Compressor(model, sgd(model), NOTHING, example_inputs=(inputs_for(model),))
    before = torch.get_rng_state()
    compressor.compact(energy=0.5)
    assert torch.equal(torch.get_rng_state(), before)


STATES = {
    "another version": (lambda s: s | {"version": 99}, mlp, "format version 99"),
    "another model": (lambda s: s, lambda: nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3)).double(), r"differing weights: 1\.weight, 2\.weight, 4\.weight"),
    "other widths": (lambda s: s, lambda: nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 10), nn.Tanh(), nn.Linear(10, 3)).double(), r"other shapes: 0\.weight is \[12, 6\] there, \[11, 6\] here"),
    "not complete": (lambda s: {"version": s["version"]}, mlp, "not complete: names, settings, unfoldings, inner, measured, run missing"),
    "another number of optimizers": (lambda s: s | {"run": s["run"] | {"steps": [1, 1]}}, mlp, "has 2 optimizers, this one 1"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "build", "message"), STATES.values(), ids=STATES)
def test_a_compressor_refuses_a_state_that_is_not_its_own(edit, build, message):
    first = mlp()
    state = edit(laconic.Compressor(first, sgd(first), NOTHING).state_dict())
    model = build()
    before = snapshot(model)
    with pytest.raises(laconic.CheckpointError, match=message):
        laconic.Compressor(model, sgd(model), NOTHING).load_state_dict(state)
    assert_same(snapshot(model), before)


CHANGES = {
    "total_steps": {"total_steps": 80},
    "budget": {"budget": laconic.Budget(params=0.5)},
    "schedule": {"schedule": laconic.Schedule(settle=0.7)},
    "cut": {"cut": "end"},
    "structures": {"structures": laconic.LowRank(penalty=laconic.L1())},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resume_with_another_setting_is_refused_by_name(name):
    def compressor(**options) -> laconic.Compressor:
        model = mlp()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        return laconic.Compressor(model, optimizer, **{"budget": laconic.Budget(params=0.6), "total_steps": 60, **options})

    with pytest.raises(laconic.CheckpointError, match=rf"other settings.* {name} was "):
        compressor(**CHANGES[name]).load_state_dict(compressor().state_dict())


def test_a_penalty_without_a_repr_resumes():
    class Mine:
        value, prox, cutoff = laconic.L1.value, laconic.L1.prox, laconic.L1.cutoff

    class Other(Mine):
        pass

    def compressor(kind: type) -> laconic.Compressor:
        return laconic.Compressor(model := mlp(), sgd(model), laconic.LowRank(penalty=kind(), strength=0.1))

    first = compressor(Mine)  # alive, so that the next one lies elsewhere
    compressor(Mine).load_state_dict(first.state_dict())
    with pytest.raises(laconic.CheckpointError, match=r"other settings.* structures was .*Mine.* is .*Other"):
        compressor(Other).load_state_dict(first.state_dict())


def test_a_state_of_numbers_from_numpy_is_read_back_without_pickle():
    half = np.float64(0.5)
    budget, schedule = laconic.Budget(params=half, max_macs=np.int64(10**6)), laconic.Schedule(warmup=half / 2, settle=half)
    steered = {"budget": budget, "schedule": schedule, "total_steps": np.int64(8), "every": np.int64(1)}
    pressed = [laconic.Entries(strength=half), laconic.LowRank(strength=half), laconic.Channels(strength=half)]
    for structures, options in [(laconic.LowRank(), steered), (pressed, {"every": 1})]:
        made = laconic.Compressor(model := mlp(), optimizer := sgd(model), structures, example_inputs=(inputs_for(model),), **options)
        for t in range(3):
            backward(model, t)
            optimizer.step()
        torch.save(made.state_dict(), file := io.BytesIO())
        found = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        assert_same(found, made.state_dict())


def test_batches_that_do_not_fit_are_blamed_and_not_the_cut():
    model = cnn().eval()
    before = snapshot(model)
    with pytest.raises(laconic.SurgeryError, match="check that every batch of calibration"):
        laconic.compress(model, energy=0.5, calibration=[torch.zeros(2, 5, 9, 9)])
    assert_same(snapshot(model), before)


def test_what_is_cut_or_loaded_under_inference_mode_can_be_trained(tmp_path):
    dense, x = mlp(torch.float32), torch.randn(4, 6)
    trained = mlp(torch.float32)
    optimizer = sgd(trained)
    compressor = laconic.Compressor(trained, optimizer, budget=laconic.Budget(params=0.5), total_steps=4, cut="end", example_inputs=(x,))
    for _ in range(4):
        backward(trained, 0)
        optimizer.step()
    loaded = mlp(torch.float32)
    with torch.inference_mode():
        laconic.compress(dense, budget=laconic.Budget(params=0.5), example_inputs=(x,))
        compressor.compact()
        laconic.save(dense, tmp_path / "m")
        laconic.load(tmp_path / "m", loaded)
    for model in (dense, trained, loaded):
        assert not any(p.is_inference() for p in model.parameters())
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
