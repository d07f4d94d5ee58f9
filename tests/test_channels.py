"""Units go exactly: every architecture, optimizers, constants, both orders with low rank, saved and loaded."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import laconic
from laconic.graph import Group, find_groups, leaves
from laconic.matricize import Unfolding, unfoldings
from laconic.surgery.channels import End, channels_kept, slim, units_kept
from laconic.surgery.constants import dead_constants, fold
from laconic.surgery.factorize import MARK, factorize, narrow
from laconic.surgery.record import find_slims, put

from .architectures import CASES, Basic, Dense, Net, conv, groups_of
from .models import assert_same, snapshot

SLIMMABLE = {name: case for name, case in CASES.items() if case.groups}
architectures = pytest.mark.parametrize("name", SLIMMABLE)


def settled(name: str) -> tuple[nn.Module, tuple]:
    """A model of the zoo with parameters and statistics that are nowhere zero or one, and its inputs."""
    torch.manual_seed(0)
    model, inputs = CASES[name].build(), CASES[name].inputs()
    return shaken(model), inputs


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def outputs(model: nn.Module, inputs: tuple) -> list[Tensor]:
    with torch.no_grad():
        return [y for y in leaves(copy.deepcopy(model).eval()(*inputs)) if y.is_floating_point()]


def assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert [y.shape for y in got] == [y.shape for y in wanted]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def chosen(groups: list[Group], seed: int = 0) -> dict[str, list[int]]:
    """Units to keep of every group: a random part."""
    rng = np.random.default_rng(seed)
    return {g.name: sorted(rng.permutation(g.units)[: int(rng.integers(1, g.units))].tolist()) for g in groups}


def rows(module: nn.Module, side: str) -> int:
    """The axis of the weight that a side is."""
    turned = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Embedding)) or type(module).__name__ == "Conv1D"
    return {"out": 0, "in": 1}[side] ^ turned if module.weight.ndim > 1 else 0


def of_channels(tensor: Tensor) -> Tensor:
    """A view of a parameter of the model's own, channels first: a single axis is longer than one, or the channels are the last."""
    return tensor.view(-1) if tensor.numel() == max(tensor.shape) else tensor.movedim(-1, 0)


@torch.no_grad()
def silence(model: nn.Module, groups: list[Group], kept: dict[str, list[int]], norms: bool = True) -> None:
    """Zero the rows and biases of the units that go; with `norms` also their entries in the layers that pass them on."""
    for group in groups:
        if group.name in kept:
            for end in (*group.producers, *(group.carriers if norms else ())):
                module = model.get_submodule(end.path)
                gone = torch.from_numpy(np.delete(end.index, kept[group.name], axis=0).ravel())
                if end.own:  # a parameter of the model's own
                    of_channels(getattr(module, end.side))[gone] = 0
                    continue
                module.weight.movedim(rows(module, "out"), 0)[gone] = 0
                if module.bias is not None if hasattr(module, "bias") else False:
                    module.bias[gone] = 0


def expected_params(model: nn.Module, groups: list[Group], kept: dict[str, list[int]]) -> int:
    """Parameters that are left, counted by marking every entry that goes."""
    masks = {id(p): torch.ones(p.shape, dtype=torch.bool) for p in model.parameters()}
    for group in groups:
        for end in group.ends:
            module = model.get_submodule(end.path)
            gone = torch.from_numpy(np.delete(end.index, kept[group.name], axis=0).ravel())
            if end.own:
                if isinstance(getattr(module, end.side), nn.Parameter):
                    of_channels(masks[id(getattr(module, end.side))])[gone] = False
                continue
            masks[id(module.weight)].movedim(rows(module, end.side), 0)[gone] = False
            if end.side == "out" and getattr(module, "bias", None) is not None:
                masks[id(module.bias)][gone] = False
    return sum(int(m.sum()) for m in masks.values())


def norms_over_units(model: nn.Module, group: Group) -> dict[str, End]:
    """LayerNorm and RMSNorm that take statistics over the units of a group."""
    found = {end.path: end for end in group.carriers if not end.own}
    return {p: e for p, e in found.items() if type(model.get_submodule(p)).__name__ in ("LayerNorm", "RMSNorm", "LlamaRMSNorm")}


def over_the_rest(norm: nn.Module, stay: Tensor, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm by hand, with statistics over some channels; the others are zero."""
    y, part = torch.zeros_like(x), x[..., stay]
    centred = part if "RMS" in type(norm).__name__ else part - part.mean(-1, keepdim=True)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    y[..., stay] = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight[stay]
    if getattr(norm, "bias", None) is not None:
        y[..., stay] += norm.bias[stay]
    return y


def normalise_over_the_rest(model: nn.Module, groups: list[Group], kept: dict[str, list[int]]) -> None:
    for group in groups:
        for path, end in norms_over_units(model, group).items() if group.name in kept else ():
            norm = model.get_submodule(path)
            stay = np.flatnonzero(np.isin(channels_kept(norm, "out"), end.index[kept[group.name]]))
            norm.forward = partial(over_the_rest, norm, torch.from_numpy(stay))


STREAMS = [name for name in SLIMMABLE if any(norms_over_units(CASES[name].build(), g) for g in groups_of(name))]


@pytest.mark.parametrize("name", STREAMS)
def test_a_residual_stream_without_some_channels_is_normalised_over_the_others(name):
    model, inputs = settled(name)
    groups = groups_of(name)
    kept = chosen(groups)
    left = expected_params(model, groups, kept)
    reference = copy.deepcopy(model)
    silence(reference, groups, kept)
    normalise_over_the_rest(reference, groups, kept)
    wanted = outputs(reference, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sum(y.square().mean() for y in leaves(model.train()(*inputs)) if y.is_floating_point()).backward()
    optimizer.step()
    model.load_state_dict(settled(name)[0].state_dict())
    slim(model, groups, kept, [optimizer])
    assert_close(outputs(model, inputs), wanted)
    assert sum(p.numel() for p in model.parameters()) == left
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    for p, state in optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape


def test_streams_are_found_where_there_are_some():
    assert {"laconic GPT", "gpt-2", "llama", "vit", "bert", "convnext", "norms"} <= set(STREAMS)


@architectures
def test_dead_units_go_and_nothing_changes_but_the_size(name):
    model, inputs = settled(name)
    groups = [g for g in groups_of(name) if not norms_over_units(model, g)]  # of which nothing goes without a change
    kept = chosen(groups)
    silence(model, groups, kept)
    wanted = outputs(model, inputs)
    left = expected_params(model, groups, kept)

    dead = dead_constants(model, groups, inputs)
    assert {n: set(d.units) for n, d in dead.items()} == {g.name: set(range(g.units)) - set(kept[g.name]) for g in groups}
    assert not any(d.stays for d in dead.values())
    fold(model, groups, dead)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    slim(model, groups, kept, [optimizer])

    assert_close(outputs(model, inputs), wanted)
    assert sum(p.numel() for p in model.parameters()) == left
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}

    before = snapshot(model)
    sum(y.square().mean() for y in leaves(model.train()(*inputs)) if y.is_floating_point()).backward()
    for group in groups:
        for end in group.ends:
            tensor = getattr(model.get_submodule(end.path), end.side if end.own else "weight")
            grad = tensor.grad if isinstance(tensor, nn.Parameter) else tensor
            assert grad is not None, end.path
            assert bool(torch.isfinite(grad).all()), end.path
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert all(bool(torch.isfinite(y).all()) for y in outputs(model, inputs))


@architectures
def test_a_slim_model_saves_and_loads_bit_for_bit(name, tmp_path):
    model, inputs = settled(name)
    groups = groups_of(name)
    slim(model, groups, chosen(groups, 1))
    slim(model, groups, {g.name: units_kept(model, g)[:1] for g in groups[:1]})  # once more
    fresh = laconic.load(laconic.save(model, tmp_path / "slim"), CASES[name].build())
    assert_same(snapshot(fresh), snapshot(model))
    assert_same(outputs(fresh, inputs), outputs(model, inputs))
    assert [units_kept(fresh, g) for g in groups] == [units_kept(model, g) for g in groups]
    assert find_slims(fresh) == find_slims(model)


@pytest.mark.parametrize("value", [None, 1.0, torch.rand(2, 4)], ids=["none", "a number", "another shape"])
def test_a_model_without_the_numbers_that_were_saved_is_refused_by_name(value, tmp_path):
    model, _ = settled("scaled")
    groups = groups_of("scaled")
    slim(model, groups, chosen(groups))
    laconic.save(model, tmp_path / "slim")
    fresh = CASES["scaled"].build()
    del fresh[0].scale
    fresh[0].scale = value if value is None or isinstance(value, float) else nn.Parameter(value)
    before = snapshot(fresh)
    with pytest.raises(laconic.ArchitectureMismatchError, match="layer '0': saved with a number for each channel in 'scale'"):
        laconic.load(tmp_path / "slim", fresh)
    assert_same(snapshot(fresh), before)


# ---- constants ------------------------------------------------------------------------------------------------------


FOLDS = {
    "unpadded conv": lambda: nn.Conv2d(8, 6, 3),
    "conv padded by reflection": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
    "1x1 conv": lambda: nn.Conv2d(8, 6, 1),
    "conv without bias before BatchNorm": lambda: nn.Sequential(nn.Conv2d(8, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)),
    "flattened": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 5)),
    "pooled": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
}
REFUSALS = {
    "zero padding": (lambda: nn.Conv2d(8, 6, 3, padding=1), "pads with zeros"),
    "padding='same'": (lambda: nn.Conv2d(8, 6, 3, padding="same"), "pads with zeros"),
    "padding before the layer": (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(8, 6, 3)), "does not see a constant"),
    "no bias": (lambda: nn.Conv2d(8, 6, 3, bias=False), "has no bias"),
    "no bias, and BatchNorm is not alone": (lambda: Skipped(), "has no bias"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, 2), "transposed"),
    "a depthwise layer that pads": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1)), "goes through 1.0, which pads with zeros",
    ),
}  # fmt: skip


class Skipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def half_dead(second) -> tuple[nn.Module, tuple, list[Group], dict[str, list[int]]]:
    """Half of the first layer's filters put out sigmoid(BatchNorm's constant), which is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Sigmoid()), second())
    inputs = (torch.randn(2, 3, 8, 8),)
    groups, _ = find_groups(shaken(model), inputs)
    assert groups[0].name == "0.0"
    kept = {"0.0": [0, 3, 4, 6]}
    silence(model, groups, kept, norms=False)
    return model, inputs, groups, kept


@pytest.mark.parametrize("second", FOLDS.values(), ids=FOLDS)
def test_a_constant_that_is_not_zero_is_folded_exactly(second):
    model, inputs, groups, kept = half_dead(second)
    wanted = outputs(model, inputs)
    dead = dead_constants(model, groups, inputs)
    assert dead["0.0"].units == (1, 2, 5, 7)
    assert all((v > 0.01).all() for v in dead["0.0"].values.values())
    fold(model, groups, dead)
    assert_close(outputs(model, inputs), wanted)
    slim(model, groups, kept)
    assert_close(outputs(model, inputs), wanted)
    other = (torch.randn(5, 3, 8, 8),)  # exact for whatever input
    again, _, _, _ = half_dead(second)
    assert_close(outputs(model, other), outputs(again, other))


@pytest.mark.parametrize(("second", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_a_unit_whose_constant_cannot_be_folded_stays(second, reason):
    model, inputs, groups, _ = half_dead(second)
    before = snapshot(model)
    dead = dead_constants(model, groups, inputs)
    assert dead["0.0"].units == ()
    assert dead["0.0"].stays.keys() == {1, 2, 5, 7}
    assert all(reason in why for why in dead["0.0"].stays.values()), dead["0.0"].stays
    fold(model, groups, dead)
    assert_same(snapshot(model), before)


class Gated(nn.Module):
    """What a unit puts out is multiplied by a number that depends on the example, and is the same for all units."""

    def __init__(self, gate) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(20, 16), nn.Linear(16, 3), gate

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() * self.gate(x))


class Depthwise(nn.Module):
    def __init__(self, multiplier: int, groups: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16 * multiplier, 3, padding=1, groups=groups)
        self.c = nn.Conv2d(16 * multiplier, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def sigmoid_gate() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 1), nn.Sigmoid())


LOOKS_CONSTANT = {
    "one example": (lambda: Gated(sigmoid_gate()), torch.ones(1, 20), (64, 20)),
    "examples that are all alike": (lambda: Gated(sigmoid_gate()), torch.zeros(16, 20), (64, 20)),
    "the norm of the one example": (lambda: Gated(lambda x: x.norm(dim=1, keepdim=True)), torch.randn(1, 20), (64, 20)),
    "a map of one pixel": (lambda: Depthwise(1, 16), torch.randn(4, 3, 1, 1), (4, 3, 8, 8)),
    "of one pixel, two channels a unit": (lambda: Depthwise(2, 16), torch.randn(4, 3, 1, 1), (4, 3, 8, 8)),
}


@pytest.mark.parametrize(("build", "examples", "shape"), LOOKS_CONSTANT.values(), ids=LOOKS_CONSTANT)
def test_what_is_constant_on_the_examples_alone_is_no_constant(build, examples, shape):
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        model.a.weight[:4] = 0
        model.a.bias[:4] = 1
    other = torch.randn(shape)
    wanted = outputs(model, (other,))
    compressor = laconic.Compressor(
        model, torch.optim.SGD(model.parameters(), lr=0.0), [laconic.Channels(strength=1e-9)], example_inputs=(examples,)
    )
    report = compressor.compact()
    assert_close(outputs(model, (other,)), wanted)
    assert any(note.startswith("a: dead, but kept: 0, 1, 2, 3; ") for note in report.notes), report.notes


def test_zero_goes_through_zero_padding():
    model, inputs, groups, kept = half_dead(lambda: nn.Conv2d(8, 6, 3, padding=1))
    model[0][2] = nn.ReLU()
    with torch.no_grad():
        model[0][1].running_mean.fill_(0)
        model[0][1].bias[[1, 2, 5, 7]] = -0.3
    wanted = outputs(model, inputs)
    dead = dead_constants(model, groups, inputs)
    assert dead["0.0"].units == (1, 2, 5, 7)
    slim(model, groups, kept)
    assert_close(outputs(model, inputs), wanted)


def test_the_last_unit_of_a_dead_layer_stays():
    model, inputs, groups, _ = half_dead(lambda: nn.Conv2d(8, 6, 1))
    silence(model, groups, {"0.0": []})
    assert dead_constants(model, groups, inputs)["0.0"].units == tuple(range(1, 8))


def test_a_live_unit_is_not_dead_however_it_looks():
    model, inputs, groups, _ = half_dead(lambda: nn.Conv2d(8, 6, 1))
    model[0][2] = nn.ReLU()
    with torch.no_grad():
        model[0][1].bias[0] = -1e6  # silent on these inputs, and on all that are not enormous
    assert 0 not in dead_constants(model, groups, inputs)["0.0"].units


# ---- optimizers -----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(*inputs).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", ["residual", "separable", "u-net", "attention, chunks"])
def test_optimizer_states_are_slices_of_what_they_were(make, name):
    model, inputs = settled(name)
    groups = groups_of(name)
    optimizer = make(model.parameters())
    train(model, optimizer, inputs, 3)
    parameters = dict(model.named_parameters())
    names = {id(p): n for n, p in parameters.items()}
    before = {n: copy.deepcopy(optimizer.state[p]) for n, p in parameters.items()}
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    order = [names[id(p)] for p in optimizer.param_groups[0]["params"]]
    gradients = {n: p.grad.clone() for n, p in parameters.items()}
    numbered = copy.deepcopy(model)  # every entry its own number: says which entries are left
    with torch.no_grad():
        for i, p in enumerate(numbered.parameters()):
            p.copy_((torch.arange(p.numel()) + 2**16 * i).reshape(p.shape))
    kept = chosen(groups)
    slim(numbered, groups, kept)
    slim(model, groups, kept, [optimizer])

    slimmed = 0
    for i, (n, p) in enumerate(model.named_parameters()):
        places = (numbered.get_parameter(n).detach().long() - 2**16 * i).flatten()
        for key, old in before[n].items():
            now = optimizer.state[p][key]
            wanted = old.flatten()[places].reshape(p.shape) if old.shape == parameters[n].shape else old
            assert torch.equal(now, wanted), (n, key)
            slimmed += old.numel() > now.numel()
        assert len(optimizer.state[p]) == len(before[n])
        assert torch.equal(p.grad, gradients[n].flatten()[places].reshape(p.shape))
    assert slimmed
    assert len(optimizer.state) == len(before)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == settings
    assert [n for p in optimizer.param_groups[0]["params"] for n, q in model.named_parameters() if p is q] == order
    train(model, optimizer, inputs, 2)


def test_training_goes_on_as_if_the_dead_units_were_still_there():
    """Adam on the slim model does what Adam on the whole model does in which nothing reads or moves the dead units."""
    model, inputs = settled("mlp")
    groups = groups_of("mlp")
    model, inputs = model.double(), (inputs[0].double(),)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, inputs, 3)
    kept = chosen(groups)
    small, whole = model, copy.deepcopy(model)
    twin = torch.optim.Adam(whole.parameters(), lr=1e-2)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    slim(small, groups, kept, [optimizer])

    def unread() -> None:
        with torch.no_grad():
            for group in groups:
                for end in group.consumers:
                    weight = whole.get_submodule(end.path).weight
                    weight[:, torch.from_numpy(np.delete(end.index, kept[group.name], axis=0).ravel())] = 0

    for _ in range(5):
        unread()
        train(whole, twin, inputs)
        train(small, optimizer, inputs)
    unread()
    assert_close(outputs(small, inputs), outputs(whole, inputs))


def test_a_state_that_nobody_can_slice_is_dropped_and_the_rest_is_not():
    model, inputs = settled("mlp")
    groups = groups_of("mlp")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, inputs)
    optimizer.state[model[0].weight]["factored"] = torch.zeros(model[0].weight.shape[0] + 1)
    slim(model, groups, chosen(groups), [optimizer])
    assert model[0].weight not in optimizer.state
    assert optimizer.state[model[2].weight]["exp_avg"].shape == model[2].weight.shape
    train(model, optimizer, inputs)


# ---- with low rank --------------------------------------------------------------------------------------------------


def low_rank(model: nn.Module, ranks: dict[str, int], unfolding: int = 0) -> None:
    """Factorise layers by hand, twice where a pair is already there."""
    for path, rank in ranks.items():
        module = model.get_submodule(path)
        u = unfoldings(module)[unfolding]
        put(model, path, factorize(module, u, min(rank, u.full_rank)))


PAIRS = {
    "plain": ({"stem.0": 3, "body.0": 4}, 1),
    "residual": ({"body.0.conv1": 3, "body.1.conv2": 4, "body.2.conv2": 5}, 1),
    "separable": ({"body.0.0": 1, "body.1.0": 4, "body.2.0": 1}, 0),
    "grouped": ({"body.b.0": 2, "body.c": 4}, 0),
    "grouped, by space": ({"body.b.0": 2, "body.c": 4}, -1),
    "u-net": ({"up2": 5, "up1": 6, "join1.0": 4}, 0),
    "1-d": ({"4": 3, "6": 4}, 0),
    "vgg": ({"2.0": 5, "5": 9}, 0),
    "attention, chunks": ({"qkv": 7, "out": 9}, 0),
    "gpt-2": ({"transformer.h.0.attn.c_attn": 7, "transformer.h.0.attn.c_proj": 5, "transformer.h.1.mlp.c_fc": 9}, 0),
    "llama": ({"model.layers.0.self_attn.q_proj": 7, "model.layers.1.mlp.down_proj": 9}, 0),
}


@pytest.mark.parametrize("order", ["slim, cut", "cut, slim", "slim, cut, slim", "cut, slim, cut", "cut, slim, cut the factors"])
@pytest.mark.parametrize("name", PAIRS)
def test_slim_and_low_rank_in_any_order(name, order, tmp_path):
    ranks, unfolding = PAIRS[name]
    zoo = name.split(", by")[0]
    model, inputs = settled(zoo)
    groups = groups_of(zoo)
    slims = iter([chosen(groups, 3), {g.name: None for g in groups}])
    ranks = dict(ranks)
    for part in order.split(", "):
        if part == "slim":
            kept = next(slims)
            kept = {n: k if k is not None else units_kept(model, g)[::2] for g in groups for n, k in kept.items() if n == g.name}
            reference = copy.deepcopy(model)
            silence_readers(reference, groups, kept)
            normalise_over_the_rest(reference, groups, kept)
            slim(model, groups, kept)
            assert_close(outputs(model, inputs), outputs(reference, inputs))
        elif part == "cut":
            some = (
                dict(list(ranks.items())[:1]) if order == "cut, slim, cut" and not any(hasattr(m, MARK) for m in model.modules()) else ranks
            )
            for path in some:
                ranks = {n: r for n, r in ranks.items() if n != path}
                if (module := model.get_submodule(path)) and not hasattr(module, MARK):
                    low_rank(model, {path: PAIRS[name][0][path]}, unfolding if module.weight.ndim > 3 and module.weight.shape[2] > 1 else 0)
        else:
            low_rank(model, {f"{path}.1": 1 for path in PAIRS[name][0]})
    fresh = laconic.load(laconic.save(model, tmp_path / "both"), CASES[zoo].build())
    assert_same(snapshot(fresh), snapshot(model))
    assert_same(outputs(fresh, inputs), outputs(model, inputs))
    assert_same(outputs(copy.deepcopy(model), inputs), outputs(model, inputs))
    assert [units_kept(fresh, g) for g in groups] == [units_kept(model, g) for g in groups]
    slim(fresh, groups, {groups[-1].name: units_kept(fresh, groups[-1])[:1]})  # marks are alive
    assert all(bool(torch.isfinite(y).all()) for y in outputs(fresh, inputs))


@torch.no_grad()
def silence_readers(model: nn.Module, groups: list[Group], kept: dict[str, list[int]]) -> None:
    """Zero what reads the units that go, wherever the columns are now."""
    for group in groups:
        if group.name in kept:
            for end in group.consumers:
                module = model.get_submodule(end.path)
                gone = np.flatnonzero(np.isin(channels_kept(module, "in"), np.delete(end.index, kept[group.name], axis=0)))
                while hasattr(module, MARK):
                    module = module[0]
                module.weight.movedim(rows(module, "in"), 0)[torch.from_numpy(gone)] = 0


def test_a_slim_layer_that_is_cut_and_cut_again_stays_slim(tmp_path):
    model, inputs = settled("residual")
    groups = groups_of("residual")
    slim(model, groups, {"body.1.conv1": [1, 2, 7, 11]})
    slims = find_slims(model)
    low_rank(model, {"body.1.conv1": 3})
    pair = model.get_submodule("body.1.conv1")
    shape = tuple(getattr(pair, MARK)["shape"])
    put(model, "body.1.conv1", narrow(pair, Unfolding("out,in*k", shape, 1, (1,), (2, 3, 4)), 2))
    assert find_slims(model) == slims
    fresh = laconic.load(laconic.save(model, tmp_path / "narrow"), CASES["residual"].build())
    assert_same(outputs(fresh, inputs), outputs(model, inputs))


def test_the_same_ranks_and_units_give_the_same_shapes_in_either_order():
    def shapes(first: str) -> dict[str, torch.Size]:
        model, _ = settled("residual")
        groups = groups_of("residual")
        for what in (first, "slim" if first == "cut" else "cut"):
            slim(model, groups, chosen(groups, 5)) if what == "slim" else low_rank(model, {"body.0.conv1": 2, "body.2.conv2": 3}, 1)
        return {n: p.shape for n, p in model.named_parameters()}

    assert shapes("cut") == shapes("slim")


# ---- slim itself ----------------------------------------------------------------------------------------------------


def test_two_slims_are_one():
    def slimmed(*rounds: dict[str, list[int]]) -> nn.Module:
        model, _ = settled("dense")
        groups = groups_of("dense")
        for kept in rounds:
            slim(model, groups, kept)
        return model

    once = slimmed({"stem": [1, 4], "body.0.layers.1.2": [3], "body.2.0": [0, 2, 8]})
    twice = slimmed({"stem": [0, 1, 4, 5], "body.2.0": [0, 2, 7, 8]}, {"stem": [4, 1], "body.0.layers.1.2": [3], "body.2.0": [8, 0, 2]})
    assert_same(snapshot(once), snapshot(twice))
    assert find_slims(once) == find_slims(twice)


def test_two_slimmed_groups_in_one_concatenation():
    model, _ = settled("dense")
    groups = groups_of("dense")
    consumer = "body.2.0"  # reads 6 + 4 + 4 + 4
    slim(model, groups, {"stem": [0, 5], "body.0.layers.2.2": [1, 2]})
    assert channels_kept(model.get_submodule(consumer), "in").tolist() == [0, 5, *range(6, 14), 15, 16]
    assert channels_kept(model.get_submodule("body.1"), "out").tolist() == [0, 5, *range(6, 14), 15, 16]


def test_groups_found_on_a_slim_and_cut_model_are_in_dense_numbers(tmp_path):
    model, inputs = settled("residual")
    groups = groups_of("residual")
    slim(model, groups, {"body.1.conv1": [1, 2, 7, 11]})
    low_rank(model, {"body.1.conv1": 2, "body.2.conv1": 4}, 1)
    later, reasons = find_groups(model, inputs)
    assert {g.name: g.units for g in later} == {g.name: 4 if g.name == "body.1.conv1" else g.units for g in groups}
    (group,) = [g for g in later if g.name == "body.1.conv1"]
    assert [end.index.ravel().tolist() for end in group.ends] == [[1, 2, 7, 11]] * 3
    assert not any(".conv1." in path for path in reasons)


def test_memory_format_modes_frozen_parameters_and_copies_survive():
    torch.manual_seed(0)
    model = Net(conv(3, 8), nn.Sequential(Basic(8, 8), Basic(8, 12, 2)), 12).to(memory_format=torch.channels_last)
    groups, _ = find_groups(model, (torch.randn(2, 3, 8, 8),))
    model.stem.eval()
    model.body[0].conv1.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    slim(model, groups, chosen(groups))
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
    assert [m.training for m in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["body.0.conv1.weight"]
    twin = copy.deepcopy(model)
    slim(twin, groups, {groups[0].name: units_kept(twin, groups[0])[:1]})
    assert len(units_kept(model, groups[0])) > 1
    assert find_slims(model) != find_slims(twin)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_trial_keeps_away_from_a_kernel_that_crashes(channels_last):
    """Trained on without some units, this shortcut may have fewer than eight inputs."""
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            if torch.is_grad_enabled():
                seen.append(torch.backends.mkldnn.enabled)
            return x

    model = Net(conv(3, 8), nn.Sequential(Basic(8, 12, 2), Probe()), 12)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    groups, _ = find_groups(model, (torch.randn(2, 3, 8, 8),))
    assert len(groups) == 3
    assert seen[0]  # the whole model: eight inputs are enough
    assert seen[-1] == (not channels_last)
    assert torch.backends.mkldnn.enabled


def test_attributes_say_the_new_widths():
    model, _ = settled("separable")
    groups = groups_of("separable")
    slim(model, groups, {"stem.0": [0, 2, 5], "body.1.0": [1, 2]})
    depthwise, pointwise, multiplied = model.body[0][0], model.body[1][0], model.body[2][0]
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (3, 3, 3)
    assert (pointwise.in_channels, pointwise.out_channels, pointwise.groups) == (3, 2, 1)
    assert (multiplied.in_channels, multiplied.out_channels, multiplied.groups) == (2, 4, 2)
    assert model.stem[1].num_features == 3
    counted, _ = settled("attention, counted")
    groups = groups_of("attention, counted")
    slim(counted, groups, {"qkv": [0, 3, 1]})
    assert (counted.heads, counted.head_dim, counted.qkv.out_features) == (3, 4, 36)


BAD = {
    "unknown group": ({"nowhere": [0]}, "kept names 'nowhere'"),
    "no unit": ({"stem.0": [1], "body.1.conv1": []}, r"kept\['body.1.conv1'\] is empty"),
    "unknown unit": ({"stem.0": [1], "body.1.conv1": [12]}, "holds 12"),
    "a unit that is gone": ({"stem.0": [1], "body.2.conv1": [0]}, "holds 0"),
}


@pytest.mark.parametrize(("kept", "message"), BAD.values(), ids=BAD)
def test_wrong_units_are_one_line_and_nothing_changes(kept, message):
    model, inputs = settled("residual")
    groups = groups_of("residual")
    slim(model, groups, {"body.2.conv1": [1, 2, 3]})
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, inputs)
    before, parameters = snapshot(model, optimizer), list(model.parameters())
    with pytest.raises(laconic.LaconicError, match=message) as caught:
        slim(model, groups, kept, [optimizer])
    assert "\n" not in str(caught.value)
    assert_same(snapshot(model, optimizer), before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_an_optimizer_that_fails_leaves_everything_as_it_was():
    class Broken(torch.optim.SGD):
        @property
        def state(self):
            raise RuntimeError("no state today")

        @state.setter
        def state(self, value):
            pass

    model, inputs = settled("plain")
    groups = groups_of("plain")
    good = torch.optim.Adam(model.parameters())
    train(model, good, inputs)
    before, parameters = snapshot(model, good), list(model.parameters())
    with pytest.raises(RuntimeError, match="no state today"):
        slim(model, groups, chosen(groups), [good, Broken(model.parameters(), lr=1e-2)])
    assert_same(snapshot(model, good), before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert find_slims(model) == []


def test_a_layer_that_was_replaced_is_an_error():
    model, _ = settled("plain")
    groups = groups_of("plain")
    del model.body[1]
    with pytest.raises(laconic.SurgeryError, match=r"body\.1 is no longer in the model|a ReLU is not a layer"):
        slim(model, groups, {"body.0": [1]})


# ---- saved models ---------------------------------------------------------------------------------------------------


def test_loading_into_another_model_is_a_clear_error_and_changes_nothing(tmp_path):
    model, _ = settled("residual")
    groups = groups_of("residual")
    slim(model, groups, chosen(groups))
    low_rank(model, {"body.0.conv1": 2})
    saved = laconic.save(model, tmp_path / "slim")
    wider = Net(conv(3, 8), nn.Sequential(Basic(8, 9), Basic(9, 12, 2), Basic(12, 12)), 12)
    another = Net(conv(3, 8), nn.Sequential(Basic(8, 8), Dense(8, 4, 1), Basic(12, 12)), 12)
    longer = nn.Sequential(*CASES["residual"].build().children())
    more = CASES["residual"].build()  # found out only when all is slim and cut
    more.extra = nn.Linear(2, 2)
    for wrong in (wider, another, longer, more):
        before, shapes = snapshot(wrong), dict(wrong.named_parameters())
        with pytest.raises(laconic.ArchitectureMismatchError) as caught:
            laconic.load(saved, wrong)
        assert "\n" not in str(caught.value)
        assert_same(snapshot(wrong), before)
        assert all(shapes[n] is p for n, p in wrong.named_parameters())
        assert find_slims(wrong) == []


def test_a_change_of_the_kept_channels_is_noticed(tmp_path):
    import json

    model, _ = settled("plain")
    groups = groups_of("plain")
    slim(model, groups, {"stem.0": [0, 1, 2]})
    record = laconic.save(model, tmp_path / "slim") / "laconic.json"
    manifest = json.loads(record.read_text())
    assert manifest["format"] == 2
    assert manifest["slims"][0] == {
        "names": ["stem.0"], "kind": "Conv2d", "dense": {"out": 8}, "kept": {"out": [0, 1, 2]}, "sizes": {"out_channels": 3}
    }  # fmt: skip
    manifest["slims"][0]["kept"]["out"] = [0, 1, 3]
    record.write_text(json.dumps(manifest))
    with pytest.raises(laconic.CheckpointError, match="cut short or altered"):
        laconic.load(tmp_path / "slim", CASES["plain"].build())


def test_a_model_that_lost_no_channel_is_written_as_before(tmp_path):
    import json

    model, _ = settled("plain")
    manifest = json.loads((laconic.save(model, tmp_path / "dense") / "laconic.json").read_text())
    assert manifest["format"] == 1
    assert "slims" not in manifest
