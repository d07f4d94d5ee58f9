"""The rivals: each ends within its budget, learns, and is what its name says."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from laconic.budget import Budget
from laconic.data import load_dataset
from laconic.measure import count_params
from laconic.methods import METHODS, Trained, build, fixed_rank, ours, spectral_penalties, svd_tuned, trp
from laconic.recipe import Recipe
from laconic.results import make_result
from laconic.surgery.factorize import MARK, pair_matrices
from laconic.surgery.factorize import weights as pair_parameters
from laconic.training import Curve, accuracy

RECIPE = Recipe(name="small", task="digits", widths=(8, 16, 16), pools=(0,), epochs=3, params=0.5, lr=4e-3)
FREE = {"dense"}  # of the budget


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_within_its_budget(name, data):
    if name == "torch-pruning":
        pytest.importorskip("torch_pruning")
    trained = METHODS[name].train(data, RECIPE, 0, None, None)
    whole = count_params(build(data, RECIPE, 0))
    assert count_params(trained.model) <= (1.0 if name in FREE else RECIPE.params) * whole
    assert accuracy(trained.model, data.test_x, data.test_y) > 0.25
    assert len(trained.curve.seconds) == len(trained.curve.loss) >= RECIPE.epochs


def test_fixed_rank_takes_one_share_of_the_full_rank_and_fills_the_budget(data):
    model = build(data, RECIPE, 0)
    limit = int(RECIPE.params * count_params(model))
    pairs = fixed_rank.factorise_all(model, RECIPE)
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
            torch.testing.assert_close(new, old - RECIPE.lr * RECIPE.weight_decay * leaf.grad)


def test_without_pressure_there_is_one_cut(data):
    trained = svd_tuned.train(data, RECIPE, 0)
    assert trained.report is not None
    cuts = [h for h in trained.report.history if any(r is not None for r in h.ranks.values())]
    steps = RECIPE.epochs * (len(data.train_x) // RECIPE.batch_size)
    assert {h.step for h in cuts} == {math.ceil(svd_tuned.CUT * steps)}
    assert trained.curve.params[0] > trained.curve.params[-1]


def test_the_polar_factor_is_near():
    x = torch.randn(12, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for matrix in (x, x.mT):
        values = torch.linalg.svdvals(spectral_penalties.polar(matrix))
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(spectral_penalties.polar(matrix, 5), u @ (u.mT @ spectral_penalties.polar(matrix) @ vh.mT) @ vh)


def test_the_directions_are_the_gradients_of_their_norms():
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    (gradient,) = torch.autograd.grad(s.sum(), x, retain_graph=True)
    torch.testing.assert_close(spectral_penalties.nuclear(x, u @ vh).detach(), gradient)
    (gradient,) = torch.autograd.grad((s.sum() / s.norm()) ** 2, x)
    torch.testing.assert_close(spectral_penalties.hoyer(x.detach(), (u @ vh).detach()), gradient)


@pytest.mark.parametrize("name", ["trp", "lc", "as-published", "spectral-decay"])
def test_pressure_moves_energy_into_the_ranks_that_stay(name, data, monkeypatch):
    """Before the cut, a pressed network has more of its energy within the budget than one that was trained without."""
    shares = {}
    recipe = dataclasses.replace(RECIPE, params=0.3)
    for method in ("svd", name):
        trained = METHODS[method].train(data, recipe, 0, None, None)
        assert trained.report is not None
        shares[method] = min(x.energy for x in trained.report.layers)
    assert shares[name] > shares["svd"]


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


def test_trp_goes_on_from_weights_of_low_rank(data, monkeypatch):
    """At its last truncation, the weights between the first layer and the last lose the tail of their spectra; no subgradient is needed for it."""
    monkeypatch.setattr(trp, "NUCLEAR", 0.0)
    steps = RECIPE.epochs * (len(data.train_x) // RECIPE.batch_size)
    monkeypatch.setattr(trp, "EVERY", steps)  # once, after the last step
    monkeypatch.setattr(trp.svd, "cut", lambda trained, *_: trained)
    model = METHODS["trp"].train(data, RECIPE, 0, None, None).model
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    ranks = [int(torch.linalg.matrix_rank(m.weight.detach().double().flatten(1), rtol=1e-6)) for m in layers]
    full = [min(m.weight.flatten(1).shape) for m in layers]
    assert ranks[0] == full[0]
    assert ranks[-1] == full[-1]
    assert all(r < f for r, f in zip(ranks[1:-1], full[1:-1], strict=True))
