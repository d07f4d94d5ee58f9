"""Parameters, MACs, latency and memory, against numbers worked out by hand."""

import contextlib
import copy
import json
import random
import time
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laconic
from laconic.errors import InvalidTypeError, InvalidValueError
from laconic.measure import OneDtype, check_inputs, count_macs, input_shapes, measure_latency, peak_memory, relative_latency

from .models import Shared, Tied


class Attention(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * self.scale, k, v, **self.options)


@dataclass
class Case:
    """A model, its inputs, and what it costs."""

    model: nn.Module
    inputs: tuple
    params: int
    macs: int


def transformer(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)


# Batch 2, 5 tokens: projections in and out, scores and values, two feed-forward layers.
TRANSFORMER_MACS = 2 * (5 * 16 * 48 + 5 * 16 * 16 + 2 * 5 * 5 * 16 + 2 * 5 * 16 * 32)
TRANSFORMER_PARAMS = 16 * 48 + 48 + 16 * 16 + 16 + 16 * 32 + 32 + 32 * 16 + 16 + 2 * 32

CASES = {
    "linear": Case(nn.Linear(8, 4), (torch.zeros(3, 8),), 36, 3 * 32),
    "linear, one vector": Case(nn.Linear(8, 4), (torch.zeros(8),), 36, 32),
    "linear, tokens": Case(nn.Linear(8, 4), (torch.zeros(3, 5, 8),), 36, 15 * 32),
    "conv1d": Case(nn.Conv1d(4, 6, 3, stride=2, padding=1), (torch.zeros(2, 4, 9),), 78, 2 * 5 * 6 * 4 * 3),
    "conv2d": Case(nn.Conv2d(3, 8, 3, padding=1), (torch.zeros(2, 3, 6, 5),), 224, 2 * 30 * 8 * 27),
    "conv2d, strided and dilated": Case(nn.Conv2d(3, 8, 3, stride=2, dilation=2, bias=False), (torch.zeros(1, 3, 9, 9),), 216, 9 * 216),
    "conv2d, groups": Case(nn.Conv2d(6, 9, 3, groups=3), (torch.zeros(1, 6, 5, 5),), 171, 9 * 9 * 2 * 9),
    "conv3d": Case(nn.Conv3d(2, 4, 2), (torch.zeros(1, 2, 3, 3, 3),), 68, 8 * 4 * 2 * 8),
    "transposed conv2d": Case(nn.ConvTranspose2d(4, 3, 2, stride=2), (torch.zeros(1, 4, 5, 5),), 51, 25 * 4 * 3 * 4),
    "tied weight": Case(Tied(), (torch.zeros(3, 10),), 100 + 20 + 44, 3 * 240),
    "shared module": Case(Shared(), (torch.zeros(3, 10),), 110 + 44, 3 * 240),
    "norms cost nothing": Case(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()), (torch.zeros(2, 4),), 28, 32),
    "attention": Case(Attention(), (torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 6)), 1, 2 * 4 * 5 * 7 * (8 + 6)),
    "causal attention": Case(Attention(is_causal=True), (torch.zeros(2, 4, 5, 8),) * 3, 1, 2 * 4 * 25 * 16),
    "transformer layer": Case(transformer(), (torch.randn(2, 5, 16),), TRANSFORMER_PARAMS, TRANSFORMER_MACS),
    "transformer layer, evaluating": Case(transformer().eval(), (torch.randn(2, 5, 16),), TRANSFORMER_PARAMS, TRANSFORMER_MACS),
    "transformer": Case(
        nn.TransformerEncoder(transformer(), 3, enable_nested_tensor=False), (torch.randn(2, 5, 16),), 3 * TRANSFORMER_PARAMS, 3 * TRANSFORMER_MACS
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_params_and_macs_are_those_worked_out_by_hand(case):
    found = laconic.profile(case.model, case.inputs, latency=False)
    assert (found.params, found.macs) == (case.params, case.macs)
    assert count_macs(case.model, case.inputs) == case.macs


def test_each_layer_has_its_own_share():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4)))
    layers = laconic.profile(model, (torch.zeros(3, 8),), latency=False).layers
    assert [(x.name, x.kind, x.params, x.macs) for x in layers] == [
        ("0", "Linear", 36, 96),
        ("2.0", "Linear", 16, 48),
        ("2.1", "LayerNorm", 8, 0),
    ]


def test_a_lone_tensor_is_accepted_and_anything_else_is_named():
    assert laconic.profile(nn.Linear(8, 4), torch.zeros(3, 8), latency=False).macs == 96
    with pytest.raises(laconic.InvalidTypeError, match=r"must be a tuple .* got set"):
        laconic.profile(nn.Linear(8, 4), {torch.zeros(3, 8)})


MEASURES = {
    "profile": lambda m, x: laconic.profile(m, x, seconds=0.01),
    "macs": count_macs,
    "latency": lambda m, x: measure_latency(m, x, 0.01),
    "memory": peak_memory,
    "input shapes": lambda m, x: input_shapes(m, [m[0]], x),
}


def test_in_one_dtype_whatever_is_made_or_cast_has_it():
    with contextlib.suppress(ZeroDivisionError), OneDtype(torch.float64):
        made = [torch.ones(2), torch.tensor([1.5]), torch.zeros(2, dtype=torch.float32), torch.ones(2).bfloat16(), torch.ones(2).float()]
        assert {x.dtype for x in made} == {torch.float64}
        assert (torch.arange(3).dtype, (torch.ones(2) > 0).dtype) == (torch.int64, torch.bool)
        raise ZeroDivisionError
    assert (torch.ones(2).dtype, torch.ones(2).half().dtype) == (torch.float32, torch.float16)


def test_a_profile_needs_no_finite_numbers_and_no_numbers_at_all():
    mask = nn.Transformer.generate_square_subsequent_mask(5)  # -inf above the diagonal
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert laconic.profile(layer, (torch.randn(2, 5, 16), mask), latency=False).macs > 0
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(64, 60), nn.Linear(60, 4)), torch.empty(1, 64)
    found = laconic.profile(model, (x,), latency=False)
    assert (found.params, found.macs) == (64 * 60 + 60 + 60 * 4 + 4, 64 * 60 + 60 * 4)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_measuring_leaves_modes_hooks_buffers_gradients_and_switches_as_they_were(measure, fails):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    model[1].eval()
    calls = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 5 if fails else 4)

    def state():
        return (
            [m.training for m in model.modules()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            [b.clone().tolist() for b in model.buffers()],
            [p.grad for p in model.parameters()],
            (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads()),
        )

    before = state()
    if fails:
        kind = laconic.InvalidValueError if measure is MEASURES["profile"] else RuntimeError
        with pytest.raises(kind, match="shapes cannot be multiplied"):
            measure(model, (x,))
    else:
        measure(model, (x,))
        assert calls
    assert state() == before


def test_latency_states_median_spread_blocks_threads_and_device():
    threads = torch.get_num_threads()
    latency = measure_latency(nn.Linear(64, 64), (torch.zeros(8, 64),), 0.02)
    assert latency.median_ms > 0
    assert latency.spread_ms >= 0
    assert latency.blocks >= 1
    assert (latency.threads, latency.device) == (threads, "cpu")
    with pytest.raises(laconic.InvalidValueError, match="seconds = 0"):
        measure_latency(nn.Linear(4, 4), (torch.zeros(1, 4),), 0)


class Sleeper(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        return x


def test_latency_is_in_milliseconds_per_call():
    """A lower bound holds on a busy machine too."""
    latency = measure_latency(Sleeper(), (torch.zeros(1),), 0.05)
    assert 5 <= latency.median_ms < 500


class Wandering:
    """In place of `torch.utils.benchmark.Timer`: a model takes its own number of milliseconds, on a machine that gets slower by the call."""

    turns: ClassVar[list[nn.Module]] = []
    pace = staticmethod(lambda turn: 1.05**turn)

    def __init__(self, statement, globals, num_threads):
        self.model = globals["model"]

    def timeit(self, count):
        self.turns.append(self.model)
        return SimpleNamespace(mean=self.model.ms * 1e-3 * self.pace(len(self.turns)))


def test_two_models_are_timed_in_turns(monkeypatch):
    """The machine takes three times as long at the end as at the start, and the share is told to a few percent."""
    monkeypatch.setattr(laconic.measure, "Timer", Wandering)
    monkeypatch.setattr(Wandering, "turns", [])
    model, reference = nn.Identity(), nn.Identity()
    model.ms, reference.ms = 3.0, 10.0
    share, milliseconds = relative_latency(model, reference, (torch.zeros(1),))
    assert share == pytest.approx(0.3, rel=0.06)
    assert 10 < milliseconds < 30
    assert len(Wandering.turns) == 2 + 2 * laconic.measure.TURNS  # it is never in doubt


def test_a_noisy_clock_is_asked_more_often(monkeypatch):
    draw = random.Random(0)
    monkeypatch.setattr(laconic.measure, "Timer", Wandering)
    monkeypatch.setattr(Wandering, "turns", [])
    monkeypatch.setattr(Wandering, "pace", staticmethod(lambda turn: draw.uniform(0.9, 1.1)))
    model, reference = nn.Identity(), nn.Identity()
    model.ms, reference.ms = 3.0, 10.0
    share, _ = relative_latency(model, reference, (torch.zeros(1),))
    assert share == pytest.approx(0.3, rel=0.02)
    assert len(Wandering.turns) > 100
    monkeypatch.setattr(laconic.measure, "PATIENCE", 0.0)
    monkeypatch.setattr(Wandering, "turns", [])
    relative_latency(model, reference, (torch.zeros(1),))
    assert len(Wandering.turns) == 2 + 2 * laconic.measure.TURNS


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs_are_profiled(layout):
    class Neighbours(nn.Linear):
        def forward(self, x, neighbours):
            return neighbours @ super().forward(x)

    found = laconic.profile(Neighbours(8, 4), (torch.randn(6, 8), torch.eye(6).to_sparse(layout=layout)), latency=False)
    assert found.macs == 6 * 8 * 4 + 6 * 6 * 4
    assert found.peak_memory >= 4 * (8 * 4 + 4 + 2 * 6 * 4)


def test_peak_memory_counts_parameters_buffers_and_the_activations_alive_at_once():
    """A chain of layers: input of one and output of the other are alive together, not all of them."""
    wide, narrow = 4 * 64 * 1000, 4 * 64 * 10
    chain = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(10, 1000), nn.Linear(1000, 10))))
    fixed = sum(p.numel() * 4 for p in chain.parameters())
    found = peak_memory(chain, (torch.zeros(64, 10),))
    assert fixed + wide <= found <= fixed + wide + 3 * narrow


class Careless(nn.Module):
    """It writes into its input, and takes an entry out of a dict."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, batch):
        x, labels = batch["x"], batch.pop("labels")
        return F.cross_entropy(self.b(self.a(x.sub_(0.5).mul_(2.0)).relu()), labels)


def test_inputs_are_the_users_whatever_the_model_does_to_them():
    def given():
        return {"x": torch.ones(16, 8), "labels": torch.zeros(16, dtype=torch.long)}

    model, batch = Careless(), given()
    assert laconic.profile(model, (batch,), seconds=0.01).macs == 16 * (8 * 64 + 64 * 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.5), total_steps=10, example_inputs=(batch,))
    for _ in range(10):
        model(given()).backward()
        optimizer.step()
    assert compressor.compact(calibration=[(batch,)]).params_after <= 0.5 * compressor.plan.params
    assert batch.keys() == given().keys()
    assert torch.equal(batch["x"], given()["x"])


class Named(nn.Module):
    """Arguments that a tokenizer would give by name, one of which may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None, *, flag: bool = False) -> Tensor:
        y = self.b(self.a(scale * x).relu())
        return y if mask is None else y * mask


@pytest.mark.parametrize("kind", [dict, UserDict])  # a tokenizer's own is one of the second kind
def test_inputs_by_name_are_those_in_order(kind):
    x, mask = torch.randn(16, 8), torch.rand(16, 4)
    named, in_order = kind(mask=mask, x=x), (x, 2.0, mask)
    assert check_inputs(named, Named()) == in_order
    assert check_inputs({"x": x}, nn.DataParallel(Named())) == (x,)
    torch.manual_seed(0)
    one, other = (copy.deepcopy(m) for m in [Named()] * 2)
    assert laconic.profile(one, named, latency=False) == laconic.profile(one, in_order, latency=False)
    reports = []
    for model, inputs in ((one, named), (other, in_order)):
        laconic.Compressor(
            model, torch.optim.SGD(model.parameters()), budget=laconic.Budget(macs=0.5), total_steps=10, example_inputs=inputs
        )
        reports.append(laconic.compress(model, budget=laconic.Budget(params=0.5), example_inputs=inputs, calibration=[inputs]))
    assert reports[0].macs_after is not None
    assert reports[0].to_json() == reports[1].to_json()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"x": torch.zeros(1, 8), "token_type": 1},
            r"example_inputs: token_type: not among .* Named\.forward takes in order: x, scale, mask",
        ),
        ({"x": torch.zeros(1, 8), "flag": True}, "example_inputs: flag: not among"),
        ({"mask": torch.zeros(1, 4)}, r"example_inputs: x missing, without which Named\.forward does not run"),
        (8, "a tuple of the model's arguments in the order of its forward, .* or a dict of them by name, got int"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_named(inputs, message):
    for use in (laconic.profile, lambda model, inputs: laconic.compress(model, energy=0.9, example_inputs=inputs)):
        with pytest.raises(InvalidTypeError, match=message):
            use(Named(), inputs)


class Counting(nn.Module):
    """Its output depends on how often it was called, counted in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 4)
        self.calls = 0
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.written += 1
        self.replaced = self.replaced + 1
        return self.b(self.a(x).relu()) + self.calls + self.written + self.replaced


def test_what_a_model_counts_in_its_forward_is_not_counted_by_looking_at_it():
    torch.manual_seed(0)
    model, x = Counting(), torch.ones(16, 8)
    laconic.profile(model, (x,), seconds=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    compressor = laconic.Compressor(
        model, optimizer, laconic.Channels(), budget=laconic.Budget(params=0.5), total_steps=20, example_inputs=(x,)
    )
    for _ in range(20):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (group,) = compressor.compact().groups
    assert group.kept < group.units  # which would not have been taken out of a model that differs from call to call
    assert (model.calls, int(model.written), int(model.replaced)) == (20, 20, 20)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_measured_and_left_in_its_mode():
    model, x = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))), torch.randn(3, 4)
    assert laconic.profile(model, (x,), seconds=0.01).macs == 3 * (4 * 4 + 4 * 8)
    assert all(m.training for m in model.modules())
    assert int(model[1][1].num_batches_tracked) == 0


def test_a_profile_is_plain_data():
    found = laconic.profile(nn.Linear(4, 4), (torch.zeros(1, 4),), seconds=0.01)
    data = json.loads(json.dumps(found.to_json()))
    assert data["latency_ms"] == found.latency_ms == data["latency"]["median_ms"]
    assert data["layers"][0]["kind"] == "Linear"
    assert laconic.profile(nn.Linear(4, 4), (torch.zeros(1, 4),), latency=False).latency is None


def test_fixed_chances_are_the_same_every_time_and_no_device_is_told_that_is_not_in_use(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", told.append)  # else seeded with this number when it is first used
    before = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with laconic.measure.seeded(3):
            drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), before)
    assert told == []


class Forces(nn.Module):
    """The gradient of an energy, computed in the forward pass; `own`: where gradients are recorded whatever goes on outside."""

    def __init__(self, own):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        self.own = own

    def forward(self, x):
        with torch.enable_grad() if self.own else contextlib.nullcontext():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=self.training)[0]


def test_a_model_that_differentiates_in_its_forward_is_counted_and_cut():
    model, x = Forces(own=True), torch.randn(4, 6)
    products = 6 * 16 + 16 * 16 + 16
    assert count_macs(model, x) == 4 * 2 * products  # forwards, and back to the inputs
    assert laconic.profile(model, x, latency=False).layers[0].macs == 4 * 6 * 16
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.7), total_steps=20, example_inputs=(x,))
    for _ in range(20):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = compressor.compact()
    assert report.params_after <= 0.7 * report.params_before
    assert count_macs(model, x) < 4 * 2 * products


def test_one_that_needs_gradients_recorded_outside_is_told_what_to_do():
    with pytest.raises(InvalidValueError, match=r"Forces computes gradients in its forward, .*put `with torch.enable_grad\(\):`"):
        laconic.profile(Forces(own=False), torch.randn(4, 6))
