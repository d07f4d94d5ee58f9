"""The networks of the experiments: as many parameters and MACs as published, and scaled to a budget."""

import pytest
import torch

from laconic.errors import InvalidValueError, RecipeError
from laconic.measure import count_macs, count_params
from laconic.models import MODELS, Shape, thin_widths
from laconic.recipe import Recipe

VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
CIFAR, MNIST = (3, 32, 32), (1, 28, 28)
PUBLISHED = {
    # name, image, shape, parameters, MACs: Caffe's LeNets; He et al. 2016, without parameters in the shortcuts; VGG-16 with
    # BatchNorm for CIFAR has 14,728,266, of which 4,224 are biases of convolutions in front of a norm.
    "LeNet-300-100": ("lenet-300-100", MNIST, Shape(widths=(300, 100)), 266_610, 266_200),
    "LeNet-5": ("lenet-5", MNIST, Shape(widths=(20, 50, 500)), 431_080, 2_293_000),
    "ResNet-20": ("resnet", CIFAR, Shape(widths=(16, 32, 64)), 269_722, 40_551_040),
    "ResNet-32": ("resnet", CIFAR, Shape(widths=(16, 32, 64), depth=32), 464_154, 68_862_592),
    "ResNet-56": ("resnet", CIFAR, Shape(widths=(16, 32, 64), depth=56), 853_018, 125_485_696),
    "VGG-16": ("convnet", CIFAR, Shape(widths=VGG, pools=(1, 3, 6, 9, 12)), 14_728_266 - 4_224, 313_201_664),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name):
    model, image, shape, params, macs = PUBLISHED[name]
    network = MODELS[model](image, 10, shape)
    assert count_params(network) == params
    assert count_macs(network, (torch.randn(1, *image),)) == macs


def test_decomposeme_has_a_pair_of_filters_along_one_axis_each_for_each_layer():
    network = MODELS["decomposeme"]((1, 32, 32), 36, Shape(widths=(8, 12, 16), pools=(0, 1), kernel=5))
    kernels = [m.kernel_size for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert kernels == [(5, 1), (1, 5)] * 3
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 36)


@pytest.mark.parametrize("depth", [7, 18, 21])
def test_a_depth_that_no_residual_network_has_is_refused(depth):
    with pytest.raises(InvalidValueError, match=rf"depth = {depth}"):
        MODELS["resnet"](CIFAR, 10, Shape(widths=(16, 32, 64), depth=depth))


def test_an_unknown_model_is_refused():
    with pytest.raises(RecipeError, match=r"model = 'resnett' is unknown.*resnet"):
        Recipe(name="x", task="digits", model="resnett", widths=(8,), epochs=1)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("name", PUBLISHED)
def test_thin_widths_are_the_widest_that_fit(name, share):
    model, image, shape, params, _ = PUBLISHED[name]

    def build(widths):
        return MODELS[model](image, 10, Shape(widths=widths, pools=shape.pools, depth=shape.depth))

    limit = int(share * params)
    thin = thin_widths(build, shape.widths, limit)
    assert count_params(build(thin)) <= limit
    step = next(s for s in range(1001) if tuple(max(1, round(w * s / 1000)) for w in shape.widths) == thin)
    wider = next(w for s in range(step, 1001) if (w := tuple(max(1, round(w * s / 1000)) for w in shape.widths)) != thin)
    assert count_params(build(wider)) > limit
