"""The rivals: each ends within its budget, learns, and is what its name says."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

import laconic
from laconic.budget import LANES, Budget
from laconic.data import load_dataset
from laconic.errors import RecipeError
from laconic.matricize import choose_unfolding
from laconic.measure import count_macs, count_params
from laconic.methods import (
    METHODS,
    Trained,
    activation_aware,
    base,
    build,
    cuttlefish,
    dense,
    fixed_rank,
    learning_compression,
    magnitude,
    ours,
    pat,
    spectral_penalties,
    svd,
    svd_training,
    svd_tuned,
    tensor_decompositions,
    trp,
)
from laconic.recipe import Recipe
from laconic.results import make_result
from laconic.surgery.factorize import MARK, pair_matrices
from laconic.surgery.factorize import weights as pair_parameters
from laconic.training import Curve, accuracy

from .models import slow_but_for

RECIPE = Recipe(name="small", task="digits", widths=(8, 16, 16), pools=(0,), epochs=4, params=0.5, lr=4e-3)
FREE = {"dense"}  # of the budget


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", slow_but_for(("dense", "thin-long", "svd-tuned", "tucker", "laconic"), METHODS))
def test_every_method_learns_within_its_budget(name, data):
    trained = METHODS[name].run(data, RECIPE, 0)
    whole = count_params(build(data, RECIPE, 0))
    size = sum(int(p.count_nonzero()) for p in trained.model.parameters()) if name == "magnitude" else count_params(trained.model)
    assert size <= (1.0 if name in FREE else RECIPE.params) * whole
    assert accuracy(trained.model, data.test_x, data.test_y) > 0.25
    assert len(trained.curve.seconds) == len(trained.curve.loss) >= RECIPE.epochs


def test_fixed_rank_takes_one_share_of_the_full_rank_and_fills_the_budget(data):
    model = build(data, RECIPE, 0)
    limit = int(RECIPE.params * count_params(model))
    pairs = fixed_rank.factorise_all(model, fixed_rank.shares_of_rank(model, RECIPE))
    assert isinstance(model.features[0], nn.Conv2d)  # the first layer and the last stay dense
    assert isinstance(model.head, nn.Linear)
    shares = [getattr(pair, MARK)["rank"] / u.full_rank for pair, u in pairs]
    assert max(shares) - min(shares) <= 1 / min(u.full_rank for _, u in pairs)
    assert limit - sum(u.unit_params for _, u in pairs) < count_params(model) <= limit


def test_frobenius_decay_is_the_gradient_of_the_norm_of_the_product(data, monkeypatch):
    """One step with a loss that does not depend on the weights: all that moves the factors is the decay."""
    seen = {}

    def fit(model, data, recipe, seed, optimizer, **_):
        pairs = [m for m in model.modules() if hasattr(m, MARK)]
        seen["before"] = [[p.detach().clone() for p in pair_parameters(m)] for m in pairs]
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        seen["after"] = [[p.detach().clone() for p in pair_parameters(m)] for m in pairs]

    monkeypatch.setattr(fixed_rank, "fit", fit)
    trained = fixed_rank.spectral_init(data, RECIPE, 0)
    from laconic.matricize import unfolding_named

    for module, before, after in zip([m for m in trained.model.modules() if hasattr(m, MARK)], seen["before"], seen["after"], strict=True):
        mark = getattr(module, MARK)
        unfolding = unfolding_named(mark["unfolding"], tuple(mark["shape"]))
        leaves = [p.clone().requires_grad_() for p in before]
        a, b = pair_matrices(unfolding, *leaves)
        (0.5 * (a @ b).square().sum()).backward()
        for old, new, leaf in zip(before, after, leaves, strict=True):
            torch.testing.assert_close(new, old - RECIPE.lr * fixed_rank.FROBENIUS_DECAY * leaf.grad)


CUT_ONCE = [
    "svd-tuned",
    "cut-once",
    "svd-energy-tuned",
    "svd-activation-tuned",
    "tucker",
    "cp",
    "pufferfish",
    "torch-pruning",
    "torch-pruning-taylor",
]


def first_cut(name, data, recipe):
    """The step after which the network is smaller, as a share of the run."""
    sizes = []
    METHODS[name].run(data, recipe, 0, lambda progress: sizes.append(progress.params))
    whole = count_params(build(data, recipe, 0))
    return next(step for step, size in enumerate(sizes, 1) if size < whole) / len(sizes)


@pytest.mark.parametrize("name", CUT_ONCE)
def test_the_share_that_is_set_is_the_one_after_which_it_cuts(name, data):
    recipe = dataclasses.replace(RECIPE, epochs=1, setting=0.2)
    assert first_cut(name, data, recipe) == pytest.approx(0.2, abs=0.05)


@pytest.fixture(scope="module")
def trained_weights(data, tmp_path_factory):
    """Dense networks of two seeds, and a recipe that starts from them."""
    folder = tmp_path_factory.mktemp("dense")
    for seed in (0, 1):
        trained = METHODS["dense"].run(data, RECIPE, seed)
        torch.save(trained.model.state_dict(), folder / f"dense-seed{seed}.pt")
    return dataclasses.replace(RECIPE, epochs=1, init=str(folder / "dense-seed{seed}.pt"))


@pytest.mark.parametrize("name", [n for n in CUT_ONCE if n != "torch-pruning"])  # its regularizer needs its time
def test_trained_weights_are_cut_at_once(name, data, trained_weights):
    assert first_cut(name, data, trained_weights) <= 0.1


def test_each_seed_starts_from_its_own_weights(data, trained_weights):
    for seed in (0, 1):
        found = build(data, trained_weights, seed).state_dict()
        for name, x in torch.load(trained_weights.init.replace("{seed}", str(seed)), weights_only=True).items():
            torch.testing.assert_close(found[name], x, rtol=0, atol=0)


def test_trained_weights_are_the_teacher_as_they_are(data, trained_weights, monkeypatch):
    def never(*_):
        raise AssertionError("a teacher was trained")

    monkeypatch.setattr(dense, "train", never)
    trained = METHODS["distilled"].run(data, trained_weights, 0)
    assert trained.curve.seconds[0] > 0
    assert count_params(trained.model) <= RECIPE.params * count_params(build(data, RECIPE, 0))


def test_without_pressure_there_is_one_cut(data):
    trained = svd_tuned.train(data, RECIPE, 0)
    assert trained.report is not None
    cuts = [h for h in trained.report.history if any(r is not None for r in h.ranks.values())]
    steps = RECIPE.epochs * (len(data.train_x) // RECIPE.batch_size)
    assert {h.step for h in cuts} == {math.ceil(svd_tuned.CUT * steps)}
    assert len(set(trained.curve.params)) == 1  # cut within the first epoch, and never again
    assert trained.curve.params[0] < count_params(build(data, RECIPE, 0))


def test_the_polar_factor_is_near():
    x = torch.randn(12, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for matrix in (x, x.mT):
        values = torch.linalg.svdvals(spectral_penalties.polar(matrix))
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(spectral_penalties.polar(matrix), u @ (u.mT @ spectral_penalties.polar(matrix) @ vh.mT) @ vh)


def test_polar_express_is_nearer_over_three_decades():
    u, _, vh = torch.linalg.svd(torch.randn(12, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrix = (u * torch.logspace(0, -2.5, 12, dtype=torch.float64)) @ vh
    torch.testing.assert_close(spectral_penalties.polar(matrix, spectral_penalties.POLAR_EXPRESS), u @ vh, atol=0.05, rtol=0)


def test_the_directions_are_the_gradients_of_their_norms():
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    (gradient,) = torch.autograd.grad(s.sum(), x, retain_graph=True)
    torch.testing.assert_close(spectral_penalties.nuclear(x, u @ vh).detach(), gradient)
    (gradient,) = torch.autograd.grad((s.sum() / s.norm()) ** 2, x)
    torch.testing.assert_close(spectral_penalties.hoyer(x.detach(), (u @ vh).detach()), gradient)


@pytest.mark.parametrize("name", ["trp", "as-published", "spectral-decay"])
def test_pressure_moves_energy_into_the_ranks_that_stay(name, data, monkeypatch):
    """Before the cut, a pressed network has more of its energy within the budget than one that was trained without."""
    shares = {}
    recipe = dataclasses.replace(RECIPE, params=0.3)
    for method in ("svd", name):
        trained = METHODS[method].run(data, recipe, 0)
        assert trained.report is not None
        shares[method] = min(x.energy for x in trained.report.layers)
    assert shares[name] > shares["svd"]


def test_lc_pulls_the_weights_to_the_network_that_takes_their_place(data, monkeypatch):
    """What the cut takes away, as a share of the weights, is a small part of what it takes without a pull."""
    lost = []

    def cut(model, ranks):
        for name, (unfolding, rank) in ranks.items():
            s = torch.linalg.svdvals(unfolding.unfold(model.get_submodule(name).weight.detach()))[0]
            lost.append(float(s[rank:].norm() / s.norm()))
        return fixed_rank.factorise_all(model, ranks)

    monkeypatch.setattr(learning_compression, "factorise_all", cut)
    most = {}
    for mu in (1.0, 1e-9):
        lost.clear()
        recipe = dataclasses.replace(RECIPE, params=0.3, setting=mu)
        model = METHODS["lc"].run(data, recipe, 0).model
        assert sum(p.numel() for p in model.parameters()) <= 0.3 * sum(p.numel() for p in build(data, recipe, 0).parameters())
        most[mu] = max(lost)
    assert most[1.0] < 0.2 * most[1e-9]


@pytest.mark.parametrize("limit", [200, 500, 1000, 1700])
def test_the_c_step_is_the_best_of_all_ranks_at_its_price(limit):
    torch.manual_seed(0)
    layers = {"a": nn.Linear(20, 30), "b": nn.Conv2d(8, 6, 3)}
    unfolded = {n: choose_unfolding(m, "out,in*kh*kw") for n, m in layers.items()}
    values = {n: torch.linalg.svdvals(u.unfold(layers[n].weight.detach()).double())[0].numpy() for n, u in unfolded.items()}
    ranks = learning_compression.ranks_within(limit, unfolded, values)
    used = learning_compression.size(ranks, unfolded)
    lost = lambda r: sum(float((values[n][r[n] :] ** 2).sum()) for n in layers)  # noqa: E731
    assert used <= limit
    others = [dict(zip("ab", r, strict=True)) for r in itertools.product(range(1, 21), range(1, 7))]
    assert all(lost(r) >= lost(ranks) - 1e-9 for r in others if learning_compression.size(r, unfolded) <= used)


def test_a_recipe_can_ask_for_milliseconds(data, monkeypatch):
    seen = {}
    monkeypatch.setattr(ours, "Compressor", lambda *args, **options: seen.update(options))
    recipe = dataclasses.replace(RECIPE, params=1.0, latency=0.5)
    model = build(data, recipe, 0)
    ours.compressor_for(model, torch.optim.SGD(model.parameters(), 0.1), data, recipe)
    assert seen["budget"] == Budget(params=1.0, latency=0.5)
    assert len(seen["example_inputs"][0]) == 64  # milliseconds of a batch
    trained = Trained(model, Curve())
    assert make_result(recipe, "laconic", 0, {}, trained)["budget"] == {"params": 1.0, "latency": 0.5}


def test_a_recipe_that_names_no_structures_gets_what_laconic_chooses(data, monkeypatch):
    """Ranks, and neurons if they help, of a network of convolutions; even widths of a transformer; without pressure the same ones."""
    vit = dataclasses.replace(RECIPE, model="vit", kernel=4, depth=2, widths=(16,), heads=2, epochs=1)
    for recipe, structures in [
        (RECIPE, [laconic.LowRank(), laconic.Channels(optional=True)]),
        (vit, [laconic.Channels(even=True)]),
        (dataclasses.replace(vit, structures=("low-rank",)), [laconic.LowRank()]),
    ]:
        model = build(data, recipe, 0)
        compressor = ours.compressor_for(model, torch.optim.SGD(model.parameters(), 0.1), data, recipe)
        assert [dataclasses.replace(s, strength=None) for s in compressor.structures] == structures
    made = []
    real = ours.Compressor
    monkeypatch.setattr(ours, "Compressor", lambda *args, **options: made.append(real(*args, **options)) or made[-1])
    METHODS["unpressed"].run(data, vit, 0)
    assert made[-1].structures == [laconic.Channels(strength=0.0, even=True)]


def test_a_gain_sets_the_weights_of_dense_and_thin_networks(data):
    recipe = dataclasses.replace(RECIPE, model="vit", kernel=4, depth=2, widths=(64, 256), heads=4, params=0.25, gain=0.8)
    for model in (build(data, recipe, 0), base.thin_network(data, recipe, 0)):
        assert model.blocks[0].up.weight.std().item() == pytest.approx(0.8 / model.widths[0] ** 0.5, rel=0.1)


def test_a_thin_transformer_keeps_multiples(data):
    recipe = dataclasses.replace(RECIPE, model="vit", kernel=4, depth=2, widths=(96, 384), heads=4, params=0.25)
    model = base.thin_network(data, recipe, 0)
    dense = count_params(build(data, recipe, 0))
    assert [width % 8 for width in model.widths] == [0, 0]
    assert model.widths[0] // 4 % 4 == 0  # places of a head
    assert 0.97 * 0.25 * dense <= count_params(model) <= 0.25 * dense


@pytest.mark.parametrize(("name", "value"), [("strength", 0.5), ("penalty_epsilon", 0.2), ("matricization", "auto")])
def test_an_option_of_structures_that_no_recipe_names_is_refused(data, name, value):
    recipe = dataclasses.replace(RECIPE, **{name: value})
    with pytest.raises(RecipeError, match=f"^recipe: {name} = {value!r} has no effect where laconic chooses"):
        METHODS["laconic"].run(data, recipe, 0)


@pytest.mark.parametrize("name", slow_but_for(["torch-pruning-taylor"], ["torch-pruning", "torch-pruning-taylor"]))
def test_torch_pruning_takes_the_same_channels_from_each_head(data, name):
    recipe = dataclasses.replace(RECIPE, model="vit", kernel=4, depth=2, widths=(32,), heads=4, epochs=1)
    model = METHODS[name].run(data, recipe, 0).model
    assert count_params(model) <= recipe.params * count_params(build(data, recipe, 0))
    widths = {layer.out_features for block in model.blocks for layer in (block.query, block.key, block.value)}
    assert max(widths) < 32
    assert all(width % 4 == 0 for width in widths)


def test_trp_goes_on_from_weights_of_low_rank(data, monkeypatch):
    """At its last truncation, the weights between the first layer and the last lose the tail of their spectra; no subgradient is needed for it."""
    monkeypatch.setattr(trp, "NUCLEAR", 0.0)
    steps = RECIPE.epochs * (len(data.train_x) // RECIPE.batch_size)
    monkeypatch.setattr(trp, "EVERY", steps)  # once, after the last step
    monkeypatch.setattr(trp.svd, "cut", lambda trained, *_: trained)
    model = METHODS["trp"].run(data, RECIPE, 0).model
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    ranks = [int(torch.linalg.matrix_rank(m.weight.detach().double().flatten(1), rtol=1e-6)) for m in layers]
    full = [min(m.weight.flatten(1).shape) for m in layers]
    assert ranks[0] == full[0]
    assert ranks[-1] == full[-1]
    assert all(r < f for r, f in zip(ranks[1:-1], full[1:-1], strict=True))


def strided_convolution(weight):
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), stride=(2, 1), padding=(1, 2))
    with torch.no_grad():
        conv.weight.copy_(weight)
    return conv


def test_tucker_at_full_rank_and_cp_of_a_sum_of_products_are_the_convolution():
    import tensorly

    tensorly.set_backend("pytorch")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 9, 9, generator=generator)
    conv = strided_convolution(torch.randn(5, 6, 3, 3, generator=generator))
    small = tensor_decompositions.tucker(conv)
    whole = small.make(1.0)
    torch.testing.assert_close(whole(x), conv(x), atol=1e-4, rtol=1e-4)
    assert count_params(whole) == small.cost(1.0) + 5
    a, b, c, d = (torch.randn(n, 2, generator=generator) for n in (5, 6, 3, 3))
    conv = strided_convolution(torch.einsum("or,ir,kr,lr->oikl", a, b, c, d))
    small = tensor_decompositions.cp(conv)
    share = 2 * (5 + 6 + 3 + 3) / conv.weight.numel()
    two = small.make(share)
    torch.testing.assert_close(two(x), conv(x), atol=1e-2, rtol=1e-2)
    assert count_params(two) == small.cost(share) + 5 == 2 * (5 + 6 + 3 + 3) + 5


def test_activation_aware_truncation_loses_the_tail_of_the_spectrum_of_what_the_layer_puts_out(data, monkeypatch):
    monkeypatch.setattr(activation_aware, "RIDGE", 0.0)
    model = build(data, RECIPE, 0)
    layer = model.features[4]
    images = torch.cat(activation_aware.calibration(data))
    inputs = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    x = activation_aware.patches(layer, inputs[0]).double()
    before = layer.weight.detach().flatten(1).double()
    root = activation_aware.roots({"a": layer}, model, data)["a"]
    torch.testing.assert_close(root @ root.mT, x.mT @ x / len(x), rtol=1e-4, atol=1e-6)
    activation_aware.by_outputs(model, data, dataclasses.replace(RECIPE, params=0.3))
    pair = model.features[4]
    rank = getattr(pair, MARK)["rank"]
    with torch.no_grad():
        after = (pair[1].weight.flatten(1) @ pair[0].weight.flatten(1)).double()
    lost = (x @ (before - after).mT).square().sum() / len(x)
    tail = torch.linalg.svdvals(before @ root)[rank:].square().sum()
    torch.testing.assert_close(lost, tail, rtol=1e-3, atol=1e-8)
    u, s, vh = torch.linalg.svd(before, full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert lost < (x @ (before - plain).mT).square().sum() / len(x)


def test_every_layer_keeps_the_largest_share_of_its_energy_that_fits(data):
    recipe = dataclasses.replace(RECIPE, params=0.6)
    model = build(data, recipe, 0)
    whole = count_params(model)
    report, share = svd.by_energy(model, data, recipe)
    assert all(layer.energy >= share for layer in report.layers)
    more = build(data, recipe, 0)
    svd.compress(more, svd.LowRank(matricization=recipe.matricization), energy=share + 0.001, example_inputs=svd.example(data))
    assert count_params(model) <= 0.6 * whole < count_params(more)


def test_stable_rank():
    flat = torch.eye(6)[None]
    assert cuttlefish.stable_rank(flat) == pytest.approx(6)
    assert cuttlefish.stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))[None]) == pytest.approx(1.5)
    assert not cuttlefish.stands_still([8.0] * cuttlefish.SMOOTH, 0.1)  # too few looks
    assert cuttlefish.stands_still([8.0] * (cuttlefish.SMOOTH + 1), 0.1)
    assert cuttlefish.stands_still([8.0 - 0.4 * k for k in range(cuttlefish.SMOOTH + 1)], 0.1)  # 0.4 each look: 0.08
    assert not cuttlefish.stands_still([8.0 - k for k in range(cuttlefish.SMOOTH + 1)], 0.1)  # 1 each look: 0.2 each of the paper's epochs


def test_three_factors_are_the_weight_and_their_penalty_that_of_the_paper():
    layer = nn.Conv2d(3, 8, 3)
    unfolding = choose_unfolding(layer, "out,in*kh*kw")
    three = svd_training.ThreeFactors(unfolding)
    u, s, vh = three.right_inverse(layer.weight.detach())
    torch.testing.assert_close(three(u, s, vh), layer.weight.detach())
    value = float(svd_training.penalty(u, s, vh, hoyer=0.5))
    assert value == pytest.approx(0.5 * float(s.sum() / s.norm()), rel=1e-4)  # orthogonal: only Hoyer's
    skew = 2 * (8 * (4 - 1) ** 2) / 64  # of twice U and twice V: 2^2 instead of 1 on both diagonals
    assert float(svd_training.penalty(2 * u, s, 2 * vh, hoyer=0.0)) == pytest.approx(skew, rel=1e-4)


def test_magnitude_pruning_leaves_as_many_weights_as_the_budget_has(data):
    trained = magnitude.train(data, RECIPE, 0)
    left = sum(int(p.count_nonzero()) for p in trained.model.parameters())
    whole = count_params(trained.model)
    assert abs(left - int(RECIPE.params * whole)) <= 2  # but for what is zero by itself


def test_pat_holds_the_ranks_that_fit_while_training_goes_on(data, monkeypatch):
    monkeypatch.setattr(pat, "EVERY", 1)
    monkeypatch.setattr(pat, "factorise_all", lambda *_: None)
    model = pat.train(data, RECIPE, 0).model
    for name, (unfolding, rank) in fixed_rank.shares_of_rank(build(data, RECIPE, 0), RECIPE).items():
        matrix = unfolding.unfold(model.get_submodule(name).weight.detach()).double()
        assert int(torch.linalg.matrix_rank(matrix, rtol=1e-5)) == rank


@pytest.mark.parametrize("bound", [{"macs": 0.2}, {"latency": 0.5}])
def test_thin_networks_keep_the_other_bounds_too(bound, data, monkeypatch):
    """Milliseconds here are MACs: a test does not time."""
    monkeypatch.setattr(base, "relative_latency", lambda model, dense, inputs: (count_macs(model, inputs) / count_macs(dense, inputs), 1.0))
    recipe = dataclasses.replace(RECIPE, widths=(16, 32, 32), params=0.9, **bound)
    dense, thin = build(data, recipe, 0), base.thin_network(data, recipe, 0)
    share = next(iter(bound.values()))
    inputs = base.example(data)
    assert count_macs(thin, inputs) <= share * count_macs(dense, inputs)
    m = LANES if "latency" in bound else 1  # what a vector unit likes
    wider = next(w for s in range(1001) if (w := tuple(m * max(1, round(k * s / 1000 / m)) for k in recipe.widths)) > thin.widths)
    assert count_macs(base.network(data, recipe, wider), inputs) > share * count_macs(dense, inputs)


def test_calibration_sees_every_class_of_a_set_that_is_sorted_by_class(data):
    order = torch.argsort(data.train_y)
    labels = data.train_y[order].repeat_interleave(5)
    assert 2 * 2048 < len(labels) < 3.6 * 2048, "every third of them ends before the last class"
    data = dataclasses.replace(
        data, train_x=torch.arange(len(labels), dtype=torch.float32)[:, None], train_y=labels
    )  # each image is its number
    seen = torch.cat(base.calibration(data))[:, 0].long()
    assert len(seen) <= 2048
    assert set(data.train_y[seen].tolist()) == set(data.train_y.tolist())
