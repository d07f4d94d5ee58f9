"""What is tied to what: found on every architecture as it is known to be, against another program's answer, and softly."""

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from laconic.errors import InvalidTypeError
from laconic.graph import Group, find_groups, gap
from laconic.graph.trial import Trial
from laconic.matricize import unfoldings
from laconic.models import GPT

from .architectures import CASES, Net, Scaled, conv, groups_of
from .models import Shared, Tied, assert_same, snapshot


def found(model: nn.Module, *inputs) -> tuple[dict[str, int], dict[str, str]]:
    groups, reasons = find_groups(model, inputs)
    return {g.name: g.units for g in groups}, reasons


@pytest.mark.parametrize("name", CASES)
def test_groups_and_reasons_are_as_they_are_known_to_be(name):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    model.train()
    next(model.modules()).eval()  # an odd mode of its own
    before, modes = snapshot(model), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    groups, reasons = find_groups(model, inputs)

    assert {g.name: g.units for g in groups} == case.groups
    for path, word in case.alone.items():
        assert word in reasons[path], (path, reasons[path])
        assert "\n" not in reasons[path]
    assert_same(snapshot(model), before)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    # Each layer with an output of its own is in one group, or there is a reason.
    producers = [end.path for g in groups for end in g.producers]
    assert len(set(producers)) == len(producers)
    layers = {n for n, m in model.named_modules() if unfoldings(m)}
    carriers = {end.path for g in groups for end in g.carriers}
    assert layers <= {*producers, *carriers, *reasons}
    assert not {*producers, *carriers} & reasons.keys()
    for group in groups:
        assert group.name == group.producers[0].path
        assert group.consumers
        for end in group.ends:
            assert end.index.shape[0] == group.units
            assert len(np.unique(end.index)) == end.index.size
            assert end in group.carriers if end.own else end.side == ("in" if end in group.consumers else "out")


def ends(name: str) -> dict[str, Group]:
    return {g.name: g for g in groups_of(name)}


def test_the_channels_of_a_unit_by_hand():
    """Flattened maps, heads, grouped key-value heads, packed gates, concatenations: which numbers go together."""
    (flat,) = ends("vgg")["2.0"].consumers
    assert flat.index.tolist() == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(8)]
    head = {e.path: e.index for e in ends("attention, chunks")["qkv"].ends}
    assert head["qkv"][1].tolist() == [4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39]
    assert head["out"][1].tolist() == [4, 5, 6, 7]
    llama = {e.path.rpartition(".")[2]: e.index for e in ends("llama")["model.layers.0.self_attn.q_proj"].ends}
    assert llama["q_proj"][1].tolist() == list(range(8, 16))
    assert llama["k_proj"][1].tolist() == llama["v_proj"][1].tolist() == [4, 5, 6, 7]
    assert llama["o_proj"][1].tolist() == list(range(8, 16))
    assert ends("gated, packed")["gate"].producers[0].index.tolist() == [[i, 16 + i] for i in range(16)]
    shuffled = {e.path: e.index for e in ends("pixel shuffle")["up"].ends}
    assert shuffled["up"][2].tolist() == [8, 9, 10, 11]
    assert shuffled["out"].tolist() == [[i] for i in range(6)]
    late = {(e.path, e.side): e.index.ravel().tolist() for e in ends("dense")["body.0.layers.1.2"].ends}
    assert late == {
        ("body.0.layers.1.2", "out"): [0, 1, 2, 3],
        ("body.0.layers.2.0", "out"): [10, 11, 12, 13],
        ("body.1", "out"): [10, 11, 12, 13],
        ("body.0.layers.2.2", "in"): [10, 11, 12, 13],
        ("body.2.0", "in"): [10, 11, 12, 13],
    }
    grouped = {e.path: e.index for e in ends("grouped")["body.a.0"].ends}
    assert grouped["body.b.0"][2].tolist() == grouped["body.c"][2].tolist() == [6, 7, 8]
    assert ends("separable")["body.1.0"].carriers[1].index[3].tolist() == [6, 7]


def test_numbers_in_a_parents_code_that_shrink_with_its_heads():
    def counts(name: str) -> dict[str, tuple]:
        return {n: tuple((c.path, c.name, c.dense) for c in g.counts) for n, g in ends(name).items() if g.counts}

    assert counts("laconic GPT") == {f"blocks.{i}.query": ((f"blocks.{i}", "heads", 4),) for i in (0, 1)}
    assert counts("gpt-2") == {f"transformer.h.{i}.attn.c_attn": ((f"transformer.h.{i}.attn", "split_size", 16),) for i in (0, 1)}
    assert counts("attention, counted") == {"qkv": (("", "heads", 4),)}
    assert counts("llama") == counts("vit") == counts("bert") == counts("residual") == {}


@pytest.mark.parametrize(
    "name", ["plain", "no norm", "residual", "bottleneck", "pre-activation", "inverted", "dense", "u-net", "inception", "vgg", "3-d",
             "mlp", "squeeze-excite", "gated"],
)  # fmt: skip
def test_torch_pruning_ties_the_same_channels(name):
    """An independent program on the same networks: for the first and the last unit of each group, what it would remove."""
    tp = pytest.importorskip("torch_pruning")
    case = CASES[name]
    model, inputs = case.build().eval(), case.inputs()
    groups, _ = find_groups(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(
            model, inputs, unwrapped_parameters={}, customized_pruners={}, ignored_layers=[], ignored_params=[], verbose=False
        )
        names = {m: n for n, m in model.named_modules()}
        for group in groups:
            root = model.get_submodule(group.name)
            prune = graph.get_pruner_of_module(root).prune_out_channels
            for unit in (0, group.units - 1):
                theirs: dict[tuple[str, str], set[int]] = {}
                for item in graph.get_pruning_group(root, prune, group.producers[0].index[unit].tolist()):
                    path = names.get(item.dep.target.module)
                    if path is not None and next(model.get_submodule(path).parameters(), None) is not None:
                        side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
                        theirs.setdefault((path, side), set()).update(item.idxs)
                carried = {end.path for end in group.carriers}
                theirs = {(p, s): i for (p, s), i in theirs.items() if not (p in carried and s == "in")}
                assert {(end.path, end.side): set(end.index[unit].tolist()) for end in group.ends} == theirs


# ---- what is left alone ---------------------------------------------------------------------------------------------


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def frozen() -> nn.Module:
    model = plain()
    model[2].weight.requires_grad_(False)
    return model


def hooked() -> nn.Module:
    model = plain()
    model[2].register_forward_hook(lambda module, args, y: y * torch.arange(7))
    return model


def hooked_gradient() -> nn.Module:
    model = plain()
    model[2].bias.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return model


def normed() -> nn.Module:
    model = plain()
    parametrizations.weight_norm(model[2])
    return model


def old_weight_norm() -> nn.Module:
    model = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[2])
    return model


class Waves(nn.Module):
    """Its middle is complex."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(7, 3)
        self.a, self.b = nn.Linear(8, 9, dtype=torch.cfloat), nn.Linear(9, 7, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.b(self.a(self.up(x).relu().cfloat())).abs())


def test_complex_numbers_stay_with_a_reason():
    """A norm of their real parts alone would take live units for dead."""
    groups, reasons = found(Waves(), torch.randn(4, 6))
    assert groups == {}
    assert reasons["a"] == reasons["b"] == "its numbers are complex"


LEFT = {
    "frozen": (frozen, "frozen"),
    "hooks": (hooked, "hooks"),
    "hooks on a gradient": (hooked_gradient, "hooks"),
    "weight norm": (normed, "parametrized"),
    "old weight norm": (old_weight_norm, "parametrized"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("build", "reason"), LEFT.values(), ids=LEFT)
def test_a_layer_that_must_not_change_keeps_both_its_sides(build, reason):
    groups, reasons = found(build(), torch.randn(4, 6))
    assert groups == {}
    assert reason in reasons["2"]
    if build is not old_weight_norm:  # which cannot be copied, so that nothing can be tried
        assert "2 reads it" in reasons["0"]
        assert reason in reasons["0"]


def watched_gradient(model: Scaled) -> None:
    model.scale.register_hook(lambda gradient: gradient.clamp(-1, 1))


def not_in_the_state(model: Scaled) -> None:
    scale = model.scale.detach().clone()
    del model.scale
    model.register_buffer("scale", scale, persistent=False)


OWN_LEFT = {
    "frozen": lambda model: model.scale.requires_grad_(False),
    "hook on its gradient": watched_gradient,
    "held twice": lambda model: setattr(model, "keeper", nn.ParameterList([model.scale])),
    "not in the state": not_in_the_state,
    "for each channel and place": lambda model: setattr(model, "scale", nn.Parameter(torch.randn(8, 8, 8))),
}


@pytest.mark.parametrize("change", OWN_LEFT.values(), ids=OWN_LEFT)
def test_a_parameter_of_the_models_own_that_must_not_change_holds_its_neurons(change):
    model = Scaled()
    assert found(model, torch.randn(2, 3, 8, 8))[0] == {"conv.0": 8, "next.0": 8}
    change(model)
    groups, reasons = found(model, torch.randn(2, 3, 8, 8))
    assert groups == {"next.0": 8}
    assert "a parameter" in reasons["conv.0"]


class Tracked(nn.Module):
    """A buffer that training writes to, and that evaluation may read."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.read = read
        self.register_buffer("seen", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.lerp_(x.detach().square().mean((0, 2, 3)), 0.1)
        return x / self.seen[:, None, None] if self.read else x


@pytest.mark.parametrize("read", [True, False])
def test_a_buffer_that_training_alone_uses_holds_its_neurons(read):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Tracked(read), nn.ReLU(), nn.Conv2d(8, 4, 3))
    groups, reasons = found(model, torch.randn(2, 3, 8, 8))
    assert groups == ({"0": 8} if read else {})
    assert read or "does not train without some of its units" in reasons["0"]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_what_a_hook_on_a_block_sees_stays(register):
    """As for the distillation of features: the widths there are another code's business. What is inside the block can go."""
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(6, 8), block, nn.ReLU(), nn.Linear(8, 3))
    assert set(found(model, torch.randn(4, 6))[0]) == {"0", "1.0", "1.2"}
    getattr(block, register)(lambda *_: None)
    groups, reasons = found(model, torch.randn(4, 6))
    assert set(groups) == {"1.0"}
    assert reasons["0"] == reasons["1.2"] == "hooks on 1 see it"


class Functional(nn.Module):
    """Between two layers something that must hold their units."""

    def __init__(self, between, width: int = 8):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, 8), nn.Linear(width, 3), between
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))


HELD = {
    "softmax over the units": (lambda m, y: y.softmax(-1), "mixes the units"),
    "their mean": (lambda m, y: y - y.mean(-1, keepdim=True), "fewer terms"),
    "layer norm": (lambda m, y: F.layer_norm(y, (8,)), "LayerNorm"),
    "rms norm": (lambda m, y: F.rms_norm(y, (8,)), "RMSNorm"),
    "group norm": (lambda m, y: F.group_norm(y, 2), "GroupNorm"),
    "a parameter of their own": (lambda m, y: y * m.weight[0], "parameter"),
    "a product with a parameter": (lambda m, y: y @ m.weight, "not a layer"),
    "a functional layer": (lambda m, y: F.linear(y, m.weight), "not a supported layer's own"),
    "chosen by number": (lambda m, y: y[:, [0, 2, 1, 3, 4, 5, 6, 7]], "by number"),
    "rolled": (lambda m, y: y.roll(1, -1), "roll moves the last units to the front"),
    "rolled, all in one": (lambda m, y: y.roll(1), "roll moves"),
    "the largest unit": (lambda m, y: y.max(-1, keepdim=True)[0] + y, "max over the units"),
    "a cumulative sum": (lambda m, y: y.cumsum(-1), "mixes the units"),
    "a pooling over them": (lambda m, y: F.avg_pool1d(y[:, None], 3, 1, 1)[:, 0], "works along it"),
    "an unknown operation": (lambda m, y: torch.fft.fft(y).real, "does not follow"),
    "an outer product": (lambda m, y: (y[:, :, None] * y[:, None, :]).flatten(1)[:, :8], "crosses"),
    "a write in place": (lambda m, y: y.new_zeros(y.shape).copy_(y), "copy_"),
    "another shape in place": (lambda m, y: y.clone().unsqueeze_(0).squeeze(0), "unsqueeze_"),
    "numbers beside them": (lambda m, y: torch.cat([y[:, :4], m.weight[: len(y), :4]], 1) * y, "does not run"),
}


@pytest.mark.parametrize(("between", "reason"), HELD.values(), ids=HELD)
def test_what_mixes_the_units_holds_them_and_says_so(between, reason):
    groups, reasons = found(Functional(between), torch.randn(4, 6))
    assert groups == {}
    assert reason in reasons["a"], reasons["a"]


FREE = {
    "activation": lambda m, y: F.gelu(y),
    "in place": lambda m, y: F.relu_(y).mul_(2),
    "in place, not tagged": lambda m, y: F.leaky_relu_(F.hardswish(y, inplace=True), 0.1).masked_fill_(y > 1, 1),
    "rarer activations": lambda m, y: F.prelu(F.logsigmoid(F.softsign(F.tanhshrink(y))), m.weight[0, :1]),
    "elu and kin": lambda m, y: F.mish(F.selu(F.celu(F.elu_(y)))) + F.hardsigmoid(y) + F.rrelu(y) + F.softplus(y),
    "made by shape": lambda m, y: y + y.new_ones(4, 1) + torch.zeros_like(y),
    "a complex rotation": lambda m, y: torch.view_as_real(torch.polar(torch.ones_like(y), y))[..., 0] * y,
    "repeated and pooled": lambda m, y: y.repeat_interleave(3, 0).unflatten(0, (4, 3)).mean(1),
    "sampled on a grid": lambda m, y: F.grid_sample(
        y[..., None, None].expand(-1, -1, 4, 4), torch.zeros(4, 2, 2, 2), align_corners=False
    ).sum((2, 3)),
    "split unsafely": lambda m, y: torch.cat(torch.unsafe_chunk(y, 2, 0)),
    "softmax over something else": lambda m, y: y.softmax(0),
    "sum over the batch": lambda m, y: y - y.sum(0, keepdim=True),
    "transposed and back": lambda m, y: y.T.contiguous().T,
    "flipped": lambda m, y: y.flip(-1),
    "a scalar parameter": lambda m, y: y * m.weight[0, 0],
    "clamped and rounded": lambda m, y: y.clamp(-1, 1).round().float(),
    "einsum over the batch": lambda m, y: torch.einsum("bc,bd->cd", y, m.weight[:4, :1]).T.expand(4, -1),
    "stacked and unbound": lambda m, y: torch.stack([y, y.abs()]).unbind(0)[1],
    "where": lambda m, y: torch.where(y > 0, y, y * 0.1),
    "dropped out": lambda m, y: F.dropout(y, 0.5, m.training),
    "interpolated": lambda m, y: F.interpolate(y[:, :, None], scale_factor=2, mode="linear").mean(-1),
    "padded elsewhere": lambda m, y: F.pad(y[:, :, None], (1, 1)).amax(-1),
    "the largest elsewhere": lambda m, y: torch.stack([y, -y], -1).max(-1)[0] + torch.stack([y, y + 1]).min(dim=0).values,
    "the largest two elsewhere": lambda m, y: y.topk(2, 0).values,
    "rolled elsewhere": lambda m, y: y.roll(1, 0),
    "sorted elsewhere": lambda m, y: y.sort(0).values,
    "repeated": lambda m, y: y.repeat(2, 1)[:4],
}


@pytest.mark.parametrize("between", FREE.values(), ids=FREE)
def test_what_treats_each_unit_alone_leaves_it_free(between):
    groups, reasons = found(Functional(between), torch.randn(4, 6))
    assert groups == {"a": 8}, reasons


class HalfScale(nn.Module):
    """Right for every count but the dense one's scale: only numbers can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.relu() / y.shape[-1])


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(F.pad(y, (0, 12 - y.shape[-1])))


class OnlyInTraining(nn.Module):
    """A second head that the example run in eval mode does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.extra, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor):
        y = self.a(x).relu()
        out = self.c(self.b(y).relu())
        return (out, self.extra(y)) if self.training else out


class SlicedInTraining(OnlyInTraining):
    """It runs with fewer units, too, on other ones."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)

    def forward(self, x: Tensor):
        y = self.a(x).relu()
        out = self.c(self.b(y).relu())
        return (out, self.extra(y[:, :2])) if self.training else out


class ViewedInTraining(OnlyInTraining):
    """It runs with half of the units, too, where the batch is even."""

    def forward(self, x: Tensor):
        y = self.a(x).relu()
        out = self.c(F.dropout(self.b(y).relu(), 0.1, self.training))
        return (out, self.extra(y.view(-1, 8))) if self.training else out


class CentredInTraining(nn.Module):
    """Dropout, which draws other numbers for fewer units, must not hide it."""

    def __init__(self, dropout: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.dropout = nn.Linear(6, 8), nn.Linear(8, 3), dropout

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(self.dropout(y - y.mean(1, keepdim=True) if self.training else y, self.training))


DROPOUTS = {
    "functional": lambda x, training: F.dropout(x, 0.5, training),
    "in place": lambda x, training: torch.dropout_(x.clone(), 0.5, training),
    "a module": lambda x, training: nn.Dropout(0.5).train(training)(x),
    "of channels": lambda x, training: F.dropout1d(x[:, :, None], 0.5, training)[:, :, 0],
    "alpha": lambda x, training: F.alpha_dropout(x, 0.5, training),
    "in attention": lambda x, training: F.scaled_dot_product_attention(*2 * [torch.ones(4, 1, 2)], x[:, None], None, 0.5 * training)[:, 0],
}


@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
def test_dropout_does_not_hide_what_training_does(dropout):
    groups, reasons = found(CentredInTraining(dropout), torch.randn(4, 6))
    assert groups == {}
    assert "off by" in reasons["a"]


class NormedAndSliced(SlicedInTraining):
    """BatchNorm does not train on one example."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor):
        y = self.a(x).relu()
        out = self.c(self.norm(self.b(y)).relu())
        return (out, self.extra(y[:, :2])) if self.training else out


@pytest.mark.parametrize(
    ("build", "batch", "reason"),
    [
        (HalfScale, 4, "off by"),
        (Padded, 4, "does not run"),
        (OnlyInTraining, 4, "does not train"),
        (SlicedInTraining, 4, "the outputs in training are off by"),
        (ViewedInTraining, 8, "in training"),
        (NormedAndSliced, 1, "the outputs in training are off by"),
    ],
    ids=["scale", "pad", "training", "a slice in training", "a view in training", "BatchNorm, one example"],
)
def test_the_trial_finds_what_following_cannot(build, batch, reason):
    groups, reasons = found(build(), torch.randn(batch, 6))
    assert "a" not in groups
    assert reason in reasons["a"]
    assert groups == ({"b": 5} if issubclass(build, OnlyInTraining) else {})


def test_a_zero_that_the_initialisation_put_does_not_hide_a_mistake():
    model = HalfScale()
    nn.init.zeros_(model.b.weight)
    assert found(model, torch.randn(4, 6))[0] == {}


def test_one_bad_group_does_not_take_the_others_with_it():
    model = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(6, 6), nn.ReLU())), HalfScale())
    groups, reasons = found(model, torch.randn(4, 6))
    assert groups == {str(2 * i): 6 for i in range(5)}
    assert "off by" in reasons["10.a"]


def test_shared_modules_and_tied_weights():
    groups, reasons = found(Tied(), torch.randn(4, 10))
    assert groups == {}
    assert reasons["one"] == "its weight is shared with two"
    groups, reasons = found(Shared(), torch.randn(4, 10))
    assert groups == {}
    assert "also reads something else" in reasons["body"]


def test_outputs_stay_where_the_bias_is_another_modules_and_inputs_go():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
            self.bias = self.second.bias

        def forward(self, x):
            return self.third(F.relu(self.second(F.relu(self.first(x))) + self.bias))

    groups, reasons = find_groups(Net(), (torch.randn(4, 8),))
    assert {g.name: g.units for g in groups} == {"first": 16}
    assert reasons["second"] == "its bias is shared with the model itself"


# ---- failing softly -------------------------------------------------------------------------------------------------


class Fails(nn.Module):
    def __init__(self, error: str = "no"):
        super().__init__()
        self.a, self.b, self.error = nn.Linear(6, 8), nn.Linear(8, 3), error

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError(f"{self.error}\nsecond line")


class NoCopy(Fails):
    def __deepcopy__(self, memo):
        raise TypeError("not to be copied")


class NoTensor(Fails):
    def forward(self, x: Tensor):
        class Opaque:
            value = self.b(self.a(x))

        return Opaque()


class NotFinite(Fails):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) / 0


class NeedsGrad(Fails):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            return torch.autograd.grad(self.b(self.a(x)).sum(), x)[0]


def test_one_number_does_not_follow_two_groups():
    """Two attentions that share a count of heads: neither can lose heads without the other."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 4
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
            self.q2, self.k2, self.v2, self.o2 = (nn.Linear(16, 16) for _ in range(4))

        def attend(self, x: Tensor, *layers: nn.Module) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.o(self.attend(x, self.q, self.k, self.v))
            return x + self.o2(self.attend(x, self.q2, self.k2, self.v2))

    assert found(nn.Sequential(CASES["laconic GPT"].build().blocks[0], Two()), torch.randn(2, 5, 16))[0] == {"0.query": 4, "0.up": 64}


@pytest.mark.parametrize("kind", [Fails, NoCopy, NoTensor, NotFinite, NeedsGrad])
def test_an_exotic_model_has_no_groups_and_a_reason_for_each_layer(kind):
    model = kind()
    groups, reasons = found(model, torch.randn(4, 6))
    assert groups == {}
    assert reasons.keys() == {"a", "b"}
    assert all(why and "\n" not in why for why in reasons.values())


class Masked(Fails):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).masked_fill(torch.tensor([True, False, False]), -torch.inf)


def test_numbers_that_are_not_finite_are_compared_by_what_they_are():
    assert found(Masked(), torch.randn(4, 6))[0] == {"a": 8}


def test_the_gap_of_what_is_not_finite():
    inf, nan = torch.inf, torch.nan
    assert gap(torch.tensor([inf, -inf, nan, 1.0]), torch.tensor([inf, -inf, nan, 3.0])) == 2
    for a, b in ((inf, -inf), (inf, nan), (nan, 1.0), (1.0, -inf)):
        assert gap(torch.tensor([a, 1.0]), torch.tensor([b, 1.0])) == inf
    assert gap(torch.tensor([1 + 1j]), torch.tensor([1 - 2j])) == 3
    assert gap(torch.tensor([True, False]), torch.tensor([True, True])) == 1
    assert gap(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


def test_random_outputs_are_compared_with_the_same_chances():
    class Noisy(Fails):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) + torch.rand(3)

    assert found(Noisy(), torch.randn(4, 6))[0] == {"a": 8}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    model = Net(conv(3, 8), conv(8, 12), 12).to(dtype)
    assert found(model, torch.randn(2, 3, 8, 8, dtype=dtype))[0] == {"stem.0": 8, "body.0": 12}


class HalfTrunk(nn.Module):
    """Its code says in which precision what runs; the outputs are float32."""

    def __init__(self, dtype: torch.dtype, autocast: bool = False):
        super().__init__()
        self.dtype, self.autocast = dtype, autocast
        trunk = torch.float32 if autocast else dtype
        self.stem, self.a, self.b, self.head = (
            nn.Linear(6, 8),
            nn.Linear(8, 12, dtype=trunk),
            nn.Linear(12, 10, dtype=trunk),
            nn.Linear(10, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        with torch.autocast("cpu", self.dtype, enabled=self.autocast):
            x = self.b(self.a(x if self.autocast else x.to(self.dtype)).relu()).relu()
        return self.head(x.float())


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_casts_between_precisions_is_tried_in_one(dtype, autocast):
    assert found(HalfTrunk(dtype, autocast), torch.randn(4, 6))[0] == {"stem": 8, "a": 12, "b": 10}


def test_a_lone_layer_a_lone_unit_and_an_empty_model():
    assert found(nn.Linear(6, 3), torch.randn(4, 6)) == ({}, {"": "the model itself is this layer"})
    assert found(nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 3)), torch.randn(4, 6))[0] == {}
    assert found(nn.ReLU(), torch.randn(4, 6)) == ({}, {})


def test_inputs_of_the_wrong_type_are_an_error():
    with pytest.raises(InvalidTypeError, match="tuple"):
        find_groups(plain(), "text")


def test_the_copy_is_what_is_tried():
    """Buffers that a forward pass writes, and modules that count their calls, do not notice."""

    class Counting(Fails):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen += 1
            return self.b(self.a(x).relu())

    model = Counting()
    twin = copy.deepcopy(model)
    assert found(model, torch.randn(4, 6))[0] == {"a": 8}
    assert model.calls == 0
    assert_same(snapshot(model), snapshot(twin))


def test_trials_do_not_grow_with_the_number_of_like_blocks(monkeypatch):
    """Whose heads are counted by a number on each: what makes one of them pass is tried on all, before they are halved down to each."""
    compared, counts = Trial._compared, []
    monkeypatch.setattr(Trial, "_compared", lambda self, *arguments: counts.append(1) or compared(self, *arguments))
    made = []
    for layers in (2, 5):
        counts.clear()
        groups, _ = found(GPT(20, 8, layers, 16, 4), torch.randint(20, (2, 8)))
        assert len(groups) == 2 * layers + 1
        made.append(len(counts))
    assert made[0] == made[1]
