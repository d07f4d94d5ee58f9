"""Unfoldings: every entry of a weight goes where the table says, and comes back bit for bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from laconic.errors import InvalidValueError
from laconic.matricize import Unfolding, choose_unfolding, unfoldings

from .cases import LAYERS, UNFOLDED


def place(name: str, shape: tuple[int, ...], groups: int, index: tuple[int, ...]) -> tuple[int, int, int]:
    """(group, row, column) of one entry of a weight, counted by hand from the table in `laconic.matricize`."""
    group, a = divmod(index[0], shape[0] // groups)
    b, *k = index[1:]
    kernel = shape[2:]

    def flat(position, sizes) -> int:
        return int(np.ravel_multi_index(position, sizes)) if sizes else 0

    if name == "out*k,in":
        return group, a * kernel[0] + k[0], b * math.prod(kernel[1:]) + flat(k[1:], kernel[1:])
    if name == "out*kernel,in":
        return group, a * math.prod(kernel) + flat(k, kernel), b
    return group, a, b * math.prod(kernel) + flat(k, kernel)


@st.composite
def layers(draw) -> nn.Module:
    """Convolutions of every kind with sizes from 1 up, in 1 to 3 dimensions, grouped or not."""
    small = st.integers(1, 3)
    dims, groups = draw(small), draw(small)
    transposed = draw(st.booleans())
    kind = [[nn.Conv1d, nn.Conv2d, nn.Conv3d], [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]][transposed][dims - 1]
    return kind(groups * draw(small), groups * draw(small), tuple(draw(small) for _ in range(dims)), groups=groups)


@pytest.mark.parametrize(("layer", "which"), UNFOLDED)
def test_fold_undoes_unfold_bit_for_bit(layer, which):
    weight = LAYERS[layer].make().weight
    unfolding = unfoldings(LAYERS[layer].make())[which]
    assert torch.equal(unfolding.fold(unfolding.unfold(weight)), weight)


@given(layers(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_every_entry_is_where_the_table_says(module, dtype):
    weight = torch.arange(module.weight.numel()).reshape(module.weight.shape).to(dtype)
    for unfolding in unfoldings(module):
        stack = unfolding.unfold(weight)
        assert stack.shape == (unfolding.groups, unfolding.m, unfolding.n)
        for index in np.ndindex(*weight.shape):
            assert stack[place(unfolding.name, tuple(weight.shape), module.groups, index)] == weight[index]
        assert torch.equal(unfolding.fold(stack), weight)


@given(st.permutations([1, 2, 3, 4]), st.integers(0, 4), st.sampled_from([1, 2]))
def test_an_unfolding_may_take_its_axes_in_any_order(axes, cut, groups):
    unfolding = Unfolding("any", (6, 2, 5, 4), groups, tuple(axes[:cut]), tuple(axes[cut:]))
    weight = torch.arange(240).reshape(6, 2, 5, 4)
    assert torch.equal(unfolding.fold(unfolding.unfold(weight)), weight)


@given(layers())
def test_the_stack_has_one_matrix_per_group_and_all_entries(module):
    for unfolding in unfoldings(module):
        assert unfolding.groups == module.groups
        assert unfolding.dense_params == module.weight.numel()
        rank = int(torch.linalg.matrix_rank(torch.randn(unfolding.m, unfolding.n, dtype=torch.float64)))
        assert unfolding.full_rank == rank


@pytest.mark.parametrize("layer", ["conv2d", "conv2d-groups", "transposed2d"])
def test_unfolding_does_not_care_for_memory_format(layer):
    weight = LAYERS[layer].make().weight.detach()
    for unfolding in unfoldings(LAYERS[layer].make()):
        assert torch.equal(unfolding.unfold(weight.contiguous(memory_format=torch.channels_last)), unfolding.unfold(weight))


def test_names_of_the_unfoldings():
    names = {name: [u.name for u in unfoldings(layer.make())] for name, layer in LAYERS.items()}
    expected = {"linear": ["out,in"], "hf-conv1d": ["in,out"], "conv2d-pointwise": ["out,in*k"]}
    for name, found in names.items():
        kind = name.split("-")[0]
        usual = ["in,out*k"] if kind.startswith("transposed") else ["out,in*k", "out*k,in", "out*kernel,in"]
        assert found == expected.get(name, expected.get(kind, usual)), name


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Renamed(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (nn.Embedding(3, 4), 0),
        (nn.BatchNorm2d(4), 0),
        (nn.Bilinear(2, 3, 4), 0),
        (nn.ReLU(), 0),
        (Scaled(3, 4), 0),
        (Standardised(3, 4, 3), 0),
        (Renamed(3, 4), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_counts_only_if_it_computes_what_its_kind_computes(module, count):
    assert len(unfoldings(module)) == count


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(InvalidValueError, match=r"weight of shape \(5, 7\): this unfolding is for \(7, 5\)"):
        unfoldings(nn.Linear(5, 7))[0].unfold(torch.zeros(5, 7))


def separable(out: int, inner: int) -> nn.Conv2d:
    """A convolution of rank 1 as out*kh x in*kw, of rank 3 as out x in*kh*kw."""
    module = nn.Conv2d(inner, out, 3)
    module.weight.data = torch.einsum("oh,iw->oihw", torch.randn(out, 3), torch.randn(inner, 3))
    return module


def one_filter(out: int, inner: int) -> nn.Conv2d:
    """Copies of one filter: rank 1 as out x in*kh*kw, not as out*kh x in*kw."""
    module = nn.Conv2d(inner, out, 3)
    module.weight.data = torch.einsum("o,ihw->oihw", torch.randn(out), torch.randn(inner, 3, 3))
    return module


@pytest.mark.parametrize(
    ("build", "asked", "name"),
    [
        (lambda: separable(8, 6), "auto", "out*k,in"),
        (lambda: one_filter(8, 6), "auto", "out,in*k"),
        (lambda: separable(8, 6), "out,in*kh*kw", "out,in*k"),
        (lambda: one_filter(8, 6), "out*kh,in*kw", "out*k,in"),
        (lambda: nn.Linear(3, 4), "out*kh,in*kw", "out,in"),
        (lambda: nn.ConvTranspose2d(3, 4, 3), "auto", "in,out*k"),
    ],
)
def test_the_choice_of_an_unfolding(build, asked, name):
    assert choose_unfolding(build(), asked).name == name


def test_an_unknown_matricization_is_refused_with_the_nearest_name():
    with pytest.raises(InvalidValueError, match=r"'out\*kh,in\*k' is unknown; did you mean 'out\*kh,in\*kw'\?"):
        choose_unfolding(nn.Conv2d(2, 3, 3), "out*kh,in*k")
