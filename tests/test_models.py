"""The networks of the experiments: as many parameters and MACs as published, and scaled to a budget."""

import dataclasses

import pytest
import torch

from laconic import Budget, Compressor, load, save
from laconic.errors import InvalidValueError, RecipeError
from laconic.measure import count_macs, count_params
from laconic.models import MODELS, Shape, thin_widths
from laconic.recipe import Recipe

IMAGENET = (3, 224, 224)
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
    "ResNet-18": ("resnet-imagenet", IMAGENET, Shape(widths=(64, 128, 256, 512), depth=18), 11_689_512, 1_814_073_344),
    "ResNet-50": ("resnet-imagenet", IMAGENET, Shape(widths=(64, 128, 256, 512), depth=50), 25_557_032, 4_089_184_256),
    "AlexNet": ("alexnet", IMAGENET, Shape(widths=(64, 192, 384, 256, 256, 4096)), 61_100_840, 714_188_480),
    "VGG-B": ("vgg-b", IMAGENET, Shape(widths=(64, 64, 128, 128, 256, 256, 512, 512, 512, 512, 4096)), 133_047_848, 11_308_466_176),
    "ViT-Ti/16": ("vit", IMAGENET, Shape(widths=(192,), depth=12, kernel=16, heads=3), 5_717_416, None),
    "VGG-16": ("convnet", CIFAR, Shape(widths=VGG, pools=(1, 3, 6, 9, 12)), 14_728_266 - 4_224, 313_201_664),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name):
    model, image, shape, params, macs = PUBLISHED[name]
    with torch.device("meta"):
        network = MODELS[model](image, 1000 if image == IMAGENET else 10, shape).eval()
        assert count_params(network) == params
        assert macs is None or count_macs(network, (torch.randn(1, *image),)) == macs


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


@pytest.mark.parametrize("share", [0.5, 0.01])
@pytest.mark.parametrize("name", PUBLISHED)
def test_thin_widths_are_the_widest_that_fit(name, share):
    model, image, shape, params, _ = PUBLISHED[name]
    classes = 1000 if image == IMAGENET else 10

    def build(widths):
        return MODELS[model](image, classes, dataclasses.replace(shape, widths=widths))

    limit = int(share * params)
    thin = thin_widths(build, shape.widths, limit)
    assert count_params(build(thin)) <= limit
    step = next(s for s in range(1001) if tuple(max(1, round(w * s / 1000)) for w in shape.widths) == thin)
    wider = next(w for s in range(step, 1001) if (w := tuple(max(1, round(w * s / 1000)) for w in shape.widths)) != thin)
    assert count_params(build(wider)) > limit


TINY = {
    "convnet": ((1, 16, 16), Shape(widths=(8, 16), pools=(0,))),
    "decomposeme": ((1, 16, 16), Shape(widths=(8, 16), pools=(0,))),
    "lenet-300-100": ((1, 8, 8), Shape(widths=(30, 10))),
    "lenet-5": ((1, 20, 20), Shape(widths=(6, 10, 30))),
    "gpt": ((12,), Shape(widths=(16,), depth=2, heads=2)),
    "vit": ((1, 8, 8), Shape(widths=(16,), depth=2, heads=2, kernel=4)),
    "resnet": ((3, 16, 16), Shape(widths=(8, 12, 16), depth=8)),
    "resnet-imagenet": ((3, 40, 40), Shape(widths=(8, 12, 16, 20), depth=18)),
    "alexnet": ((3, 70, 70), Shape(widths=(8, 12, 12, 12, 8, 40))),
    "vgg-b": ((3, 32, 32), Shape(widths=(4, 4, 8, 8, 8, 8, 8, 8, 8, 8, 24))),
    "charnet": ((1, 24, 24), Shape(widths=(6, 8, 12))),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_network_trains_and_shrinks_to_half_with_both_structures(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))
    torch.manual_seed(0)
    image, shape = TINY[name]
    x = torch.randint(0, 5, (8, *image)) if name == "gpt" else torch.randn(8, *image)
    y = torch.randint(0, 5, tuple(x.shape) if name == "gpt" else (8,))
    model = MODELS[name](image, 5, shape)
    assert model.widths == shape.widths  # what a thin network says of itself
    dense = count_params(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compressor = Compressor(model, optimizer, budget=Budget(params=0.5), total_steps=20, example_inputs=(x[:1],))
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
    report = compressor.compact()
    assert count_params(model) <= dense // 2
    assert any(group.kept < group.units for group in report.groups)
    save(model, tmp_path / "small")
    model.eval()
    torch.testing.assert_close(load(tmp_path / "small", MODELS[name](image, 5, shape)).eval()(x), model(x))
