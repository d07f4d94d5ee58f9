"""Factored weights: spectra, proximal steps and further cuts of a pair, against NumPy on the product."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim

import laconic
from laconic import reference
from laconic.errors import NonFiniteError
from laconic.matricize import unfoldings
from laconic.penalties import L1, LogSum
from laconic.solvers import factored_prox, factored_svd
from laconic.surgery.factorize import factorize, narrow, pair_matrices, product, weights
from laconic.surgery.optimizer import carry

from .cases import LAYERS, UNFOLDED


@st.composite
def factors(draw):
    g, m, n = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    r = draw(st.integers(1, min(m, n)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scale = 10.0 ** draw(st.integers(-6, 6))
    left = torch.randn(g, m, r, generator=generator, dtype=torch.float64) * scale
    return left, torch.randn(g, r, n, generator=generator, dtype=torch.float64)


@given(factors())
def test_the_spectrum_is_that_of_the_product(pair):
    left, right = pair
    u, s, vh = factored_svd(left, right)
    wanted = np.linalg.svd((left @ right).numpy(), compute_uv=False)[:, : s.shape[-1]]
    np.testing.assert_allclose(s.numpy(), wanted, rtol=1e-9, atol=1e-12 * float(wanted.max()))
    torch.testing.assert_close((u * s[..., None, :]) @ vh, left @ right, rtol=1e-9, atol=1e-11 * float(wanted.max()))


@given(factors(), st.sampled_from([L1(), LogSum(0.1)]), st.floats(0, 2))
def test_the_proximal_step_is_that_of_the_product(pair, penalty, share):
    left, right = pair
    tau = share * float(np.linalg.svd((left @ right).numpy(), compute_uv=False).max())
    new_left, new_right, values = factored_prox(left, right, penalty, tau)
    for g in range(len(left)):
        u, s, vh = np.linalg.svd((left[g] @ right[g]).numpy(), full_matrices=False)
        shrunk = penalty.prox(torch.from_numpy(s.copy()), tau).numpy()
        np.testing.assert_allclose((new_left[g] @ new_right[g]).numpy(), (u * shrunk) @ vh, atol=1e-7 * max(s[0], 1e-300))
        np.testing.assert_allclose(values[g].numpy(), shrunk[: values.shape[-1]], atol=1e-7 * max(s[0], 1e-300))


def test_what_is_not_shrunk_does_not_move():
    """A penalty without effect on a direction leaves both factors alone in it, whatever their inner coordinates."""
    left, right = torch.randn(1, 8, 3, dtype=torch.float64), torch.randn(1, 3, 6, dtype=torch.float64)
    new_left, new_right, _ = factored_prox(left, right, L1(), 0.0)
    assert torch.equal(new_left, left)
    assert torch.equal(new_right, right)
    u, s, vh = factored_svd(left, right)
    new_left, new_right, values = factored_prox(left, right, laconic.KeepLargest(2), 1.0)
    torch.testing.assert_close(u[..., :2].mT @ new_left, u[..., :2].mT @ left)
    torch.testing.assert_close(new_right @ vh[..., :2, :].mT, right @ vh[..., :2, :].mT)
    assert values[0, 2] == 0
    np.testing.assert_allclose(values[0, :2], s[0, :2])


def test_the_nuclear_norm_agrees_with_the_oracle():
    left, right = torch.randn(1, 20, 5, dtype=torch.float64), torch.randn(1, 5, 30, dtype=torch.float64)
    new_left, new_right, _ = factored_prox(left, right, L1(), 2.0)
    np.testing.assert_allclose((new_left @ new_right)[0].numpy(), reference.svt((left @ right)[0].numpy(), 2.0), atol=1e-10)


def test_zero_factors_stay_zero_and_nan_names_the_weight():
    zero, some = torch.zeros(1, 4, 2), torch.randn(1, 2, 3)
    new_left, new_right, values = factored_prox(zero, some, L1(), 0.1)
    assert float(values.abs().max()) == 0
    assert bool(torch.isfinite(new_left).all() & torch.isfinite(new_right).all())
    with pytest.raises(NonFiniteError, match=r"fc\.weight holds NaN or Inf"):
        factored_prox(torch.full((1, 4, 2), torch.nan), some, L1(), 0.1, "fc.weight")


# ---- a pair cut again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "which"), UNFOLDED)
def test_a_pair_cut_again_is_the_layer_cut_once(layer, which):
    module, x = LAYERS[layer].make(), LAYERS[layer].input()
    unfolding = unfoldings(module)[which]
    wide_rank = max(unfolding.full_rank - 1, 1)
    rank = max(wide_rank // 2, 1)
    wide = factorize(module, unfolding, wide_rank)
    before = copy.deepcopy(wide.state_dict())
    pair, wanted = narrow(wide, unfolding, rank), factorize(module, unfolding, rank)
    torch.testing.assert_close(pair(x), wanted(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(product(pair, unfolding), product(wanted, unfolding), rtol=1e-9, atol=1e-9)
    assert [str(part) for part in pair] == [str(part) for part in wanted]
    assert pair[1].bias is module.bias
    assert all(torch.equal(v, before[k]) for k, v in wide.state_dict().items())
    assert pair.laconic_cut == wanted.laconic_cut


def test_a_narrower_pair_keeps_mode_memory_format_and_what_is_frozen():
    module = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last).eval()
    unfolding = unfoldings(module)[0]
    wide = factorize(module, unfolding, 6)
    wide[0].weight.requires_grad_(False)
    pair = narrow(wide, unfolding, 3)
    assert pair[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not pair.training
    assert not pair[0].training
    assert [p.requires_grad for p in weights(pair)] == [False, True]


# ---- the optimizer over a second cut --------------------------------------------------------------------------------


def recut(build, layer: str = "conv2d", which: int = 0):
    """A layer of exact rank 2 as a pair of rank 4, then of rank 2: the function does not change, the gradients follow."""
    module, x = LAYERS[layer].make(), LAYERS[layer].input()
    unfolding = unfoldings(module)[which]
    pair = factorize(module, unfolding, 4)
    with torch.no_grad():  # the product has rank 2, but the four columns of the factors are all in use
        low = narrow(pair, unfolding, 2)
        left, right = pair_matrices(unfolding, *(w.detach() for w in weights(low)))
        mix = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
        stretched = left @ mix[:2], mix[:2].mT @ right
        from laconic.surgery.factorize import pair_weights

        for w, value in zip(weights(pair), pair_weights(unfolding, *stretched), strict=True):
            w.copy_(value)
    model = nn.Sequential(pair)
    optimizer = build(model.parameters())
    weigh = torch.randn_like(model(x))
    (model(x) * weigh).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, unfolding, x, weigh


@pytest.mark.parametrize(("layer", "which"), [("conv2d", 0), ("linear", 0), ("hf-conv1d", 0), ("transposed2d", 0)])
@pytest.mark.parametrize(
    ("build", "key", "factor"),
    [(lambda p: optim.SGD(p, lr=0.0, momentum=0.9), "momentum_buffer", 1.0), (lambda p: optim.Adam(p, lr=0.0, betas=(0.75, 0.99)), "exp_avg", 0.25)],
)  # fmt: skip
def test_first_moments_follow_the_chain_rule_over_a_second_cut(build, key, factor, layer, which):
    """With rate 0 the first moment is the gradient; over an exact second cut autograd must find the same for the new factors."""
    model, optimizer, unfolding, x, weigh = recut(build, layer, which)
    old = weights(model[0])
    pair = narrow(model[0], unfolding, 2)
    carry(optimizer, old, pair, unfolding)
    model[0] = pair
    (model(x) * weigh).sum().backward()
    for p in weights(pair):
        torch.testing.assert_close(optimizer.state[p][key], factor * p.grad, rtol=1e-6, atol=1e-7 * float(p.grad.abs().max()))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}


def test_second_moments_follow_the_independent_entries_approximation_over_a_second_cut():
    model, optimizer, unfolding, _, _ = recut(lambda p: optim.Adam(p, lr=0.0), "linear")
    first, second = weights(model[0])
    v_right, v_left = (optimizer.state[p]["exp_avg_sq"].clone() for p in (first, second))
    pair = narrow(model[0], unfolding, 2)
    # new left = left E, new right = C right, by least squares in NumPy
    e = np.linalg.lstsq(second.detach().numpy(), pair[1].weight.detach().numpy(), rcond=None)[0]
    c = np.linalg.lstsq(first.detach().numpy().T, pair[0].weight.detach().numpy().T, rcond=None)[0].T
    carry(optimizer, (first, second), pair, unfolding)
    np.testing.assert_allclose(optimizer.state[pair[1].weight]["exp_avg_sq"], v_left.numpy() @ (c**2).T, rtol=1e-6)
    np.testing.assert_allclose(optimizer.state[pair[0].weight]["exp_avg_sq"], (e**2).T @ v_right.numpy(), rtol=1e-6)
    assert float(optimizer.state[pair[0].weight]["step"]) == 1
