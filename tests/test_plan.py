"""Which weights are taken, which are left dense, and what the plan says of each."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

import laconic
from laconic.measure import count_macs, profile
from laconic.plan import make_plan

from .cases import LAYERS
from .models import Shared, Tied, assert_same, cnn, mlp, snapshot


class TiedToEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))


class Reader(nn.Module):
    """Reads the weights of its children in its own code, in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.free = nn.Linear(8, 8), nn.Linear(8, 8)
        self.many = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.fc.weight) * self.many[1].out_features
        return self.free(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(20, 8), nn.LSTM(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0])


class Own(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Bare(nn.Module):
    """A weight that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.fc = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x @ self.matrix)


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form, self.fc = nn.Bilinear(8, 8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.form(x, x))


def attention() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attention(x, x, x)[0])

    return Block()


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def with_one(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The layer in front of a plain linear one."""
    return lambda: nn.Sequential(layer(), nn.Linear(8, 8))


def hooked(register: str, of: Callable[[nn.Linear], nn.Module | Tensor] = lambda layer: layer) -> nn.Module:
    layer = nn.Linear(8, 8)
    getattr(of(layer), register)(lambda *_: None)
    return layer


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))


@dataclass
class Case:
    """A model, the weights that are taken, and for each other one the reason (a pattern)."""

    build: Callable[[], nn.Module]
    taken: set[str]
    left: dict[str, str] = field(default_factory=dict)
    inputs: Callable[[], Tensor] = lambda: torch.randn(2, 8)


def scripted() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # deprecated, and still about
        return torch.jit.script(nn.Linear(8, 8))


tokens = lambda: torch.arange(12).reshape(2, 6)  # noqa: E731
sequence = lambda: torch.randn(2, 5, 8)  # noqa: E731
PARAMETRIZED = r"parametrized \(weight_norm"

CASES = {
    "mlp": Case(mlp, {"0.weight", "2.weight", "4.weight"}, {}, lambda: torch.randn(2, 6).double()),
    "cnn": Case(cnn, {"0.weight", "3.weight", "7.weight"}, {}, lambda: torch.randn(2, 3, 8, 8)),
    "two tied linears": Case(Tied, {"one.weight", "head.weight"}, {}, lambda: torch.randn(2, 10)),
    "shared module": Case(Shared, {"body.weight", "head.weight"}, {}, lambda: torch.randn(2, 10)),
    "tied to an embedding": Case(TiedToEmbedding, {"body.weight"}, {"embed.weight": "tied between an embedding and a layer"}, tokens),
    "embedding and LSTM": Case(
        Recurrent,
        {"head.weight"},
        {"embed.weight": "Embedding", "lstm.weight_ih_l0": "LSTM is not supported", "lstm.weight_hh_l0": "LSTM"},
        tokens,
    ),
    "weight_norm, old": Case(
        with_one(lambda: old_weight_norm(nn.Linear(8, 8))), {"1.weight"}, {"0.weight_g": PARAMETRIZED, "0.weight_v": PARAMETRIZED}
    ),
    "weight_norm": Case(
        with_one(lambda: parametrizations.weight_norm(nn.Linear(8, 8))),
        {"1.weight"},
        {"0.parametrizations.weight.original0": PARAMETRIZED, "0.parametrizations.weight.original1": PARAMETRIZED},
    ),
    "spectral_norm, old": Case(with_one(lambda: old_spectral_norm(nn.Linear(8, 8))), {"1.weight"}, {"0.weight_orig": PARAMETRIZED}),
    "spectral_norm": Case(
        with_one(lambda: parametrizations.spectral_norm(nn.Linear(8, 8))),
        {"1.weight"},
        {"0.parametrizations.weight.original": PARAMETRIZED},
    ),
    "multi-head attention": Case(
        attention,
        {"fc.weight"},
        {"attention.in_proj_weight": "MultiheadAttention reads", "attention.out_proj.weight": "MultiheadAttention reads out_proj.weight"},
        sequence,
    ),
    "transformer layer": Case(
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8)),
        {"1.weight"},
        {
            "0.self_attn.in_proj_weight": "MultiheadAttention",
            "0.self_attn.out_proj.weight": "reads self_attn.out_proj.weight",
            "0.linear1.weight": "TransformerEncoderLayer reads linear1.weight",
            "0.linear2.weight": "TransformerEncoderLayer reads linear2.weight",
        },
        sequence,
    ),
    "a parent that reads": Case(
        Reader,
        {"free.weight"},
        {"fc.weight": "Reader reads fc.weight", "many.0.weight": "Reader reads many", "many.1.weight": "Reader reads many"},
    ),
    "T5": Case(
        t5,
        {f"encoder.block.0.layer.0.SelfAttention.{x}.weight" for x in "qkvo"} | {"encoder.block.0.layer.1.DenseReluDense.wi.weight"},
        {
            "shared.weight": "Embedding",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "Embedding",
            "encoder.block.0.layer.1.DenseReluDense.wo.weight": "T5DenseActDense reads wo.weight",
        },
        tokens,
    ),
    "GPT-2": Case(
        gpt2,
        {f"transformer.h.0.{x}.weight" for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
        {"transformer.wte.weight": "tied between an embedding", "transformer.wpe.weight": "Embedding"},
        tokens,
    ),
    "forward hook": Case(with_one(lambda: hooked("register_forward_hook")), {"1.weight"}, {"0.weight": "hooks"}),
    "forward pre-hook": Case(with_one(lambda: hooked("register_forward_pre_hook")), {"1.weight"}, {"0.weight": "hooks"}),
    "hook on a gradient": Case(with_one(lambda: hooked("register_hook", lambda x: x.weight)), {"1.weight"}, {"0.weight": "hooks"}),
    "hook behind a gradient": Case(
        with_one(lambda: hooked("register_post_accumulate_grad_hook", lambda x: x.weight)), {"1.weight"}, {"0.weight": "hooks"}
    ),
    "backward hook": Case(with_one(lambda: hooked("register_full_backward_hook")), {"1.weight"}, {"0.weight": "hooks"}),
    "subclass": Case(with_one(lambda: Own(8, 8)), {"1.weight"}, {"0.weight": "Own is not supported"}),
    "scripted": Case(with_one(scripted), {"1.weight"}, {"0.weight": "is not supported"}),
    "bare parameter": Case(Bare, {"fc.weight"}, {"matrix": "it is Bare's own, beside its layers"}),
    "one row": Case(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), {"0.weight"}, {"1.weight": "one row or column"}),
    "too small": Case(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), {"0.weight", "1.weight"}),
    "even smaller": Case(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 2)), {"0.weight", "1.weight"}, {"2.weight": "too small"}
    ),
    "bilinear": Case(Squared, {"fc.weight"}, {"form.weight": "Bilinear is not supported"}),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cases
def test_every_weight_is_taken_or_left_with_a_reason(case):
    model = case.build()
    plan = make_plan(model, [laconic.LowRank()])
    assert {s.name for s in plan.sites} == case.taken
    left = {x.name: x.reason for x in plan.left_alone}
    assert left.keys() == case.left.keys()
    for name, reason in case.left.items():
        assert re.search(reason, left[name]), left[name]
    printed = str(plan)
    assert all(name in printed for name in case.taken | case.left.keys())
    assert plan.params == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


@cases
def test_what_is_taken_can_be_cut_and_the_model_still_runs(case):
    model, x = case.build().eval(), case.inputs()
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = laconic.compress(model, energy=0.3, example_inputs=(x,))
    assert any(layer.rank is not None for layer in report.layers)
    after = dict(model.named_parameters())
    for name in case.left:  # left dense is left alone
        assert torch.equal(before[name], after[name])


class Held(nn.Module):
    """The weight of a layer is used in another way than by a call of it."""

    def __init__(self, how: str):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        bound = {
            "its forward": self.b.forward,
            "partial": partial(F.linear, weight=self.b.weight, bias=self.b.bias),
            "a call": self.b.__call__,
        }
        self.held, self.weights = bound.get(how), [self.b.weight]

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(self.held(x) if self.held else self.b(x) + F.linear(x, self.weights[0].t()))


@pytest.mark.parametrize("how", ["its forward", "partial", "a list"])
def test_a_layer_whose_weight_is_used_beside_its_calls_stays_dense(how):
    model, x = Held(how), torch.randn(4, 8)
    before = snapshot(model)
    plan = make_plan(model, [laconic.LowRank()], (x,))
    assert_same(snapshot(model), before)
    assert {site.name for site in plan.sites} == {"a.weight", "c.weight"}
    assert {w.name: w.reason for w in plan.left_alone}["b.weight"].startswith(
        "its weight is used in another way than by a call of the layer"
    )
    wanted = model(x)
    laconic.compress(model, laconic.LowRank(), energy=1.0, example_inputs=(x,))
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_an_uninitialised_lazy_layer_is_an_error_that_says_what_to_do():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(laconic.LaconicError, match=r"1\.weight is not initialised yet .* run the model once"):
        make_plan(model, [laconic.LowRank()])
    model(torch.zeros(1, 8))
    assert len(make_plan(model, [laconic.LowRank()]).sites) == 2


def test_weights_outside_the_optimizer_are_left_alone():
    model = mlp()
    compressor = laconic.Compressor(model, torch.optim.SGD([model[0].weight], lr=0.1), laconic.LowRank(strength=1.0))
    assert [s.name for s in compressor.plan.sites] == ["0.weight"]
    assert [x.reason for x in compressor.plan.left_alone] == ["not in the optimizer"] * 2


PATTERNS = {
    "module": ({"include": "0"}, {"0.weight"}),
    "parameter": ({"include": "2.weight"}, {"2.weight"}),
    "wildcard": ({"include": ("0*", "4*")}, {"0.weight", "4.weight"}),
    "exclude": ({"exclude": "[02]"}, {"4.weight"}),
    "exclude wins": ({"include": "*.weight", "exclude": ("4",)}, {"0.weight", "2.weight"}),
}


@pytest.mark.parametrize(("options", "taken"), PATTERNS.values(), ids=PATTERNS)
def test_patterns_select_modules_or_parameters(options, taken):
    plan = make_plan(mlp(), [laconic.LowRank(**options)])
    assert {s.name for s in plan.sites} == taken
    assert {x.name for x in plan.left_alone} == {"0.weight", "2.weight", "4.weight"} - taken


def test_a_pattern_on_either_name_of_a_tied_weight_selects_it():
    for name in ("one", "two", "two.weight"):
        assert [s.name for s in make_plan(Tied(), [laconic.LowRank(include=name)]).sites] == ["one.weight"]


def test_structures_divide_the_weights_between_them():
    a, b = laconic.LowRank(include="0"), laconic.LowRank(exclude="0", matricization="auto")
    assert [s.structure for s in make_plan(mlp(), [a, b]).sites] == [a, b, b]


# Layers whose matrix has at least rank 2 and is worth a cut.
COUNTED = [name for name in LAYERS if name not in ("linear-one-output", "conv2d-depthwise")]


@pytest.mark.parametrize("matricization", ["out,in*kh*kw", "out*kh,in*kw"])
@pytest.mark.parametrize("name", COUNTED)
def test_the_planned_costs_are_those_of_the_model_after_the_cut(name, matricization):
    """Dense and unit costs of the plan against a count of the real models, for every kind of layer."""
    layer, x = LAYERS[name].make(), LAYERS[name].input()
    model = nn.Sequential(layer)
    plan = make_plan(model, [laconic.LowRank(matricization=matricization)], (x,))
    (site,) = plan.sites
    dense = profile(model, (x,), latency=False)
    assert (plan.params, plan.macs, site.dense_macs) == (dense.params, dense.macs, dense.macs)
    bias = dense.params - layer.weight.numel()
    for rank in (1, 2):
        cut = profile(nn.Sequential(site.structure.cut(site, rank)[0]), (x,), latency=False)
        assert cut.params == rank * site.unfolding.unit_params + bias
        assert cut.macs == rank * site.unit_macs


@pytest.mark.parametrize("build", [Tied, Shared])
def test_macs_count_every_call_of_a_weight(build):
    plan = make_plan(build(), [laconic.LowRank()], (torch.zeros(3, 10),))
    assert [s.dense_macs for s in plan.sites] == [3 * 2 * 100, 3 * 40]
    assert [s.unit_macs for s in plan.sites] == [3 * 2 * 20, 3 * 14]
    assert plan.macs == 3 * 240
    assert plan.fixed_macs == 0


class ReadsThroughOtherNames(nn.Module):
    """What the source of the class does not show."""

    def __init__(self, how: str):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(20, 64), nn.Linear(64, 64)])
        self.last = nn.Linear(64, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        x = second(first(x).relu()) if self.how == "as it should be" else READ[self.how](second, first(x).relu())
        return self.last(x.relu())


class LoRA(nn.Module):
    """Beside a layer, whose forward it takes over."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)
        self.before = [layer.forward]  # not a module of its own

    def forward(self, x: Tensor) -> Tensor:
        return self.before[0](x) + self.up(self.down(x))


def beside(model: nn.Sequential) -> None:
    lora = LoRA(model[2])
    model.append(nn.Module())
    model[-1].lora, model[-1].forward = lora, MethodType(lambda self, x: x, model[-1])
    model[2].forward = lora.forward


FORWARDS = {
    "bound to the layer": lambda m: setattr(
        m[2], "forward", MethodType(lambda self, x: nn.functional.linear(x, 0.1 * self.weight, self.bias), m[2])
    ),
    "a function": lambda m: setattr(m[2], "forward", lambda x: nn.functional.linear(x, 0.1 * m[2].weight, m[2].bias)),
    "another module's": beside,
}


@pytest.mark.parametrize("change", FORWARDS.values(), ids=FORWARDS)
@pytest.mark.parametrize("structures", [[laconic.LowRank()], [laconic.LowRank(), laconic.Channels()]], ids=["ranks", "both"])
def test_a_layer_with_a_forward_set_on_the_object_stays_as_it_is(change, structures):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(32, 32), nn.ReLU())), nn.Linear(32, 32)), torch.randn(50, 32)
    change(model)
    layer, weight = model[2], model[2].weight.detach().clone()
    report = laconic.compress(model, structures, laconic.Budget(params=0.8), example_inputs=(x,))
    assert model[2] is layer
    assert torch.equal(layer.weight, weight)
    (note,) = (of.note for of in report.layers if of.name == "2")
    assert "forward of its own" in note
    assert report.params_after <= 0.8 * report.params_before  # others were cut
    if len(structures) == 2:
        assert any(re.search(r"neurons of .*\b2\b.* all stay: .*forward of its own", n) for n in report.notes)


class CallsForward(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer.forward(x)
        return x


def test_a_layer_that_runs_by_a_call_of_its_forward_is_counted():
    model, x = CallsForward(*mlp(torch.float32)), torch.randn(5, 6)
    plan, usual = (make_plan(m, [laconic.LowRank()], (x,)) for m in (model, nn.Sequential(*model)))
    assert [s.positions for s in plan.sites] == [s.positions for s in usual.sites]
    assert not any("forward" in vars(m) for m in model.modules())
    report = laconic.compress(model, budget=laconic.Budget(macs=0.6), example_inputs=(x,))
    assert count_macs(model, (x,)) == report.macs_after <= 0.6 * report.macs_before


READ = {
    "weight": lambda layer, x: nn.functional.linear(x, layer.weight, layer.bias),
    "bias": lambda layer, x: layer(x) + layer.bias,
    "size": lambda layer, x: layer(x) * layer.in_features**-0.5,
}


@pytest.mark.parametrize("how", [*READ, "as it should be"])
def test_a_layer_whose_attributes_are_read_in_a_run_stays_dense_and_is_named(how):
    torch.manual_seed(0)
    model, x = ReadsThroughOtherNames(how), torch.randn(8, 20)
    before = model(x)
    plan = make_plan(model, [laconic.LowRank()], (x,))
    reasons = {left.name: left.reason for left in plan.left_alone}
    names = [s.name for s in plan.sites]
    assert ("layers.1.weight" in names) == (how == "as it should be")
    assert "layers.0.weight" in names
    if how in READ:
        assert "the model's own code reads its ." in reasons["layers.1.weight"]
    assert torch.equal(model(x), before)
    assert all(isinstance(layer, nn.Linear) for layer in model.layers)  # and nothing stands in their places


class HeldElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(20, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.order = [self.first, self.second]  # a plain list: what is put at `second` never gets into it

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x).relu()
        return self.last(x)


class LooksAtTheClass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(20, 64), nn.Linear(64, 64), nn.LayerNorm(64)])
        self.last = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                x = x.relu()
        return self.last(x)


class FailsByTheClass(LooksAtTheClass):
    def forward(self, x: Tensor) -> Tensor:
        assert type(self.layers[0]) is nn.Linear
        for layer in self.layers:
            x = layer(x).relu()
        return self.last(x)


class ToASize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.last = nn.Conv2d(3, 32, 3, 2, 1), nn.ConvTranspose2d(32, 32, 3, 2, 1), nn.Conv2d(32, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.down(x).relu(), output_size=x.shape[-2:]).relu())


class ToASizeByAnotherName(nn.Module):
    """As the source does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.last = nn.Conv2d(3, 32, 3, 2, 1), nn.ConvTranspose2d(32, 32, 3, 2, 1), nn.Conv2d(32, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        down, up, last = self.children()
        return last(up(down(x).relu(), output_size=x.shape[-2:]).relu())


FLAT, IMAGE = torch.randn(8, 20), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("build", "inputs", "dense", "cut", "reason"),
    [
        (HeldElsewhere, (FLAT,), {"first.weight", "second.weight"}, {"last.weight"}, "held somewhere else"),
        (LooksAtTheClass, (FLAT,), {"layers.0.weight", "layers.1.weight"}, {"last.weight"}, "looks at its class"),
        (FailsByTheClass, (FLAT,), {"layers.0.weight"}, {"layers.1.weight", "last.weight"}, "looks at its class"),
        (ToASize, (IMAGE,), {"up.weight"}, {"down.weight", "last.weight"}, "output_size"),
        (ToASizeByAnotherName, (IMAGE,), {"up.weight"}, {"down.weight", "last.weight"}, "calls it with output_size"),
        (ToASize, None, {"up.weight"}, {"down.weight", "last.weight"}, "output_size"),
    ],
)
def test_layers_that_no_pair_can_stand_for_stay_dense_and_are_named(build, inputs, dense, cut, reason):
    torch.manual_seed(0)
    model = build()
    plan = make_plan(model, [laconic.LowRank()], inputs)
    reasons = {left.name: left.reason for left in plan.left_alone if reason in left.reason}
    assert reasons.keys() == dense
    assert {s.name for s in plan.sites} == cut
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_outputs_of_chance_say_nothing_of_the_layers():
    class Chance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(20, 64), nn.Linear(64, 3)
            self.generator = torch.Generator().manual_seed(0)  # its own, that nobody seeds anew

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) + torch.randn((), generator=self.generator)

    assert {s.name for s in make_plan(Chance(), [laconic.LowRank()], (FLAT,)).sites} == {"a.weight", "b.weight"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_a_forward_compiled_on_the_object_does_not_hide_the_layers():
    model = mlp()
    model.forward = torch.compile(model.forward, backend="eager")
    plan = make_plan(model, [laconic.LowRank(strength=0.1)], (torch.randn(4, 6, dtype=torch.float64),))
    assert {s.name for s in plan.sites} == {"0.weight", "2.weight", "4.weight"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_a_compiled_model_is_taken_out_of_its_wrapper():
    model = mlp()
    plan = laconic.Compressor(
        torch.compile(model), torch.optim.SGD(model.parameters(), lr=0.1), laconic.LowRank(strength=0.1, include="2")
    ).plan
    assert [s.name for s in plan.sites] == ["2.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_parts_that_are_compiled_are_planned_as_they_are():
    x = torch.randn(4, 6, dtype=torch.float64)

    def plan(wrap) -> str:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6)) for _ in range(2))).double()
        for i in range(2):
            model[i] = wrap(model[i])
        return str(make_plan(model, [laconic.LowRank(), laconic.Channels()], (x,))).replace("._orig_mod", "")

    plain, compiled = plan(lambda block: block), plan(lambda block: torch.compile(block, backend="eager"))
    assert "read by 1.2" in plain
    assert compiled.split() == plain.split()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_layers_that_are_compiled_one_by_one_are_counted():
    plain, compiled = mlp(), mlp()
    for layer in compiled:
        layer.compile(backend="eager")
    structures, x = [laconic.LowRank(), laconic.Channels()], torch.randn(4, 6, dtype=torch.float64)
    assert str(make_plan(compiled, structures, (x,))) == str(make_plan(plain, structures, (x,)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_a_layer_that_is_compiled_by_itself_stays():
    model = mlp()
    model[2] = torch.compile(model[2], backend="eager")
    plan = make_plan(model, [laconic.LowRank()])
    assert {s.name for s in plan.sites} == {"0.weight", "4.weight"}
    assert [x.reason for x in plan.left_alone] == [
        "torch.compile wraps this very layer, and would go on with it: layer.compile() is the way out"
    ]


@pytest.mark.parametrize("strength", [None, 0.1])
def test_a_steered_strength_in_absolute_units_is_told_before_training(strength):
    model = mlp()
    structure = laconic.LowRank(scale="absolute", strength=strength)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = laconic.Compressor(model, optimizer, structure, budget=laconic.Budget(params=0.5), total_steps=10).plan
    assert any("a steered strength" in note for note in plan.notes) == (strength is None)
