"""One layer into two: the pair computes what the layer with the truncated weight computes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from laconic.matricize import Unfolding, unfoldings
from laconic.surgery.factorize import (
    MARK,
    balanced_factors,
    empty_pair,
    factorize,
    memory_format,
    narrow,
    pair_matrices,
    pair_weights,
    product,
)

from .cases import LAYERS, UNFOLDED, with_spectrum


def best_of_rank(stack: torch.Tensor, rank: int) -> torch.Tensor:
    """NumPy's best approximation of every matrix."""
    u, s, vh = np.linalg.svd(stack.detach().numpy(), full_matrices=False)
    return torch.from_numpy((u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :])


def truncated(module: nn.Module, unfolding: Unfolding, rank: int) -> nn.Module:
    module = copy.deepcopy(module)
    module.weight.data = unfolding.fold(best_of_rank(unfolding.unfold(module.weight), rank))
    return module


@pytest.mark.parametrize(("layer", "which"), UNFOLDED)
def test_at_full_rank_the_pair_computes_what_the_layer_computes(layer, which):
    module, x = LAYERS[layer].make(), LAYERS[layer].input()
    unfolding = unfoldings(module)[which]
    torch.testing.assert_close(factorize(module, unfolding, unfolding.full_rank)(x), module(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("layer", "which"), UNFOLDED)
def test_below_full_rank_the_pair_computes_what_the_truncated_layer_computes(layer, which):
    module, x = LAYERS[layer].make(), LAYERS[layer].input()
    unfolding = unfoldings(module)[which]
    rank = max(unfolding.full_rank // 2, 1)
    pair, expected = factorize(module, unfolding, rank), truncated(module, unfolding, rank)
    torch.testing.assert_close(pair(x), expected(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(product(pair, unfolding), expected.weight.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("which", [0, 1])
def test_same_padding_of_even_kernels_is_kept(which):
    module, x = nn.Conv2d(3, 5, (2, 4), padding="same").double(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    unfolding = unfoldings(module)[which]
    torch.testing.assert_close(factorize(module, unfolding, unfolding.full_rank)(x), module(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("layer", "which"), UNFOLDED)
def test_a_unit_of_rank_costs_what_the_unfolding_says(layer, which):
    module = LAYERS[layer].make()
    unfolding = unfoldings(module)[which]
    for rank in (1, 2):
        first, second = empty_pair(module, unfolding, rank)
        assert first.weight.numel() + second.weight.numel() == rank * unfolding.unit_params


@pytest.mark.parametrize(("layer", "which"), UNFOLDED)
def test_weights_and_matrices_of_a_pair_are_inverse(layer, which):
    module = LAYERS[layer].make()
    unfolding = unfoldings(module)[which]
    left, right = torch.randn(unfolding.groups, unfolding.m, 2), torch.randn(unfolding.groups, 2, unfolding.n)
    first, second = pair_weights(unfolding, left, right)
    assert [first.shape, second.shape] == [layer.weight.shape for layer in empty_pair(module, unfolding, 2)]
    for found, expected in zip(pair_matrices(unfolding, first, second), (left, right), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("layer", "which"), UNFOLDED)
def test_an_empty_pair_on_meta_takes_no_memory_and_no_random_numbers(layer, which):
    module = LAYERS[layer].make()
    before = torch.get_rng_state()
    pair = empty_pair(module, unfoldings(module)[which], 1, device="meta")
    assert all(p.is_meta for p in pair.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layer", ["linear", "linear-no-bias", "hf-conv1d", "conv2d", "conv2d-no-bias", "transposed2d"])
def test_the_bias_stays_the_same_object(layer):
    module = LAYERS[layer].make()
    pair = factorize(module, unfoldings(module)[0], 1)
    assert pair[0].bias is None
    assert pair[1].bias is module.bias


@pytest.mark.parametrize("layer", ["linear", "conv2d", "transposed2d", "hf-conv1d"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_pair_takes_over_mode_gradients_and_dtype(layer, training, trainable, dtype):
    module = LAYERS[layer].make().to(dtype).train(training)
    module.weight.requires_grad_(trainable)
    pair = factorize(module, unfoldings(module)[0], 1)
    assert {m.training for m in pair.modules()} == {training}
    assert {(p.dtype, p.requires_grad) for p in (pair[0].weight, pair[1].weight)} == {(dtype, trainable)}


@pytest.mark.parametrize("which", [0, 1])
def test_channels_last_is_kept(which):
    module = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
    pair = factorize(module, unfoldings(module)[which], 4)
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in pair)
    plain = nn.Conv2d(6, 8, 3)
    assert all(layer.weight.is_contiguous() for layer in factorize(plain, unfoldings(plain)[which], 4))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("last", [True, False])
def test_gradients_have_the_strides_of_their_weights(kernel, last):
    """Or every step of DistributedDataParallel copies them, and says so: a 1 x 1 kernel is contiguous either way, by other strides."""
    order = torch.channels_last if last else torch.contiguous_format
    module = nn.Conv2d(6, 8, kernel).to(memory_format=order)
    pair = narrow(factorize(module, unfoldings(module)[0], 4), unfoldings(module)[0], 3)
    assert {memory_format(layer.weight) for layer in (module, *pair)} == {order}
    pair(torch.randn(2, 6, 5, 5).contiguous(memory_format=order)).sum().backward()
    assert all(layer.weight.grad.stride() == layer.weight.stride() for layer in pair)


def test_the_pair_carries_a_mark_of_what_was_cut():
    module = nn.Conv2d(3, 8, (3, 5))
    pair = factorize(module, unfoldings(module)[1], 2)
    assert getattr(pair, MARK) == {"kind": "Conv2d", "unfolding": "out*k,in", "shape": [8, 3, 3, 5], "rank": 2}


def test_factors_carry_the_root_of_the_singular_values_on_each_side():
    values = [4.0, 2.0, 1.0]
    left, right = balanced_factors(torch.from_numpy(with_spectrum(6, 5, values))[None], 3)
    expected = torch.tensor(values, dtype=torch.float64).diag()[None]
    torch.testing.assert_close(left.mT @ left, expected)
    torch.testing.assert_close(right @ right.mT, expected)


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("values", [[3.0, 1.0], [2.0], [0.0]], ids=["rank 2", "rank 1", "zero"])
def test_directions_without_energy_can_still_be_trained(values, dtype, exact):
    module = nn.Linear(5, 6).to(dtype)
    weight = torch.from_numpy(with_spectrum(6, 5, values)).to(dtype)
    module.weight.data = weight.clone()
    unfolding = unfoldings(module)[0]
    pair = factorize(module, unfolding, 4)
    torch.testing.assert_close(product(pair, unfolding), weight.double(), rtol=0, atol=exact)
    pair(torch.randn(20, 5, dtype=dtype)).square().sum().backward()
    reach = pair[1].weight.grad.norm(dim=0)  # one per direction; with two zeros, or two roots of rounding, nothing would arrive
    assert float(reach.min()) > 0.1


def test_a_group_without_energy_does_not_disturb_the_others():
    stack = torch.stack([torch.zeros(4, 3, dtype=torch.float64), torch.from_numpy(with_spectrum(4, 3, [2.0, 1.0, 0.5]))])
    left, right = balanced_factors(stack, 2)
    torch.testing.assert_close(left @ right, best_of_rank(stack, 2))
    assert float(torch.linalg.vector_norm(right, dim=-1).min()) > 0.1
