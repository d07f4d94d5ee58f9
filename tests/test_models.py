"""The networks of the experiments: as many parameters and MACs as published, and scaled to a budget."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from laconic import Budget, Channels, Compressor, LowRank, load, save
from laconic.errors import InvalidValueError, RecipeError
from laconic.measure import count_macs, count_params
from laconic.models import MODELS, CharNet, Shape, decomposeme, multiples, thin_widths
from laconic.plan import make_plan
from laconic.recipe import Recipe, load_recipe
from laconic.widths import choose_shapes

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
    "ViT-Ti/16": ("vit", IMAGENET, Shape(widths=(192,), depth=12, kernel=16, heads=3), 5_717_416, 1_253_683_200),
    "VGG-16": ("convnet", CIFAR, Shape(widths=VGG, pools=(1, 3, 6, 9, 12)), 14_728_266 - 4_224, 313_201_664),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name):
    model, image, shape, params, macs = PUBLISHED[name]
    with torch.device("meta"):
        network = MODELS[model](image, 1000 if image == IMAGENET else 10, shape).eval()
        assert count_params(network) == params
        assert count_macs(network, (torch.randn(1, *image),)) == macs


def shape_of(recipe: Recipe) -> Shape:
    return Shape(widths=recipe.widths, pools=recipe.pools, depth=recipe.depth, kernel=recipe.kernel, heads=recipe.heads)


def chain(image: tuple[int, int, int], classes: int, shape: Shape, layer: Callable[[int, int, int], tuple[int, int]]) -> tuple[int, int]:
    """Parameters and MACs of convolutions that keep the size, pooled, and of a linear layer; `layer` says its filters' entries, and its biases."""
    channels, side, _ = image
    params = macs = 0
    for i, width in enumerate(shape.widths):
        entries, biases = layer(channels, width, shape.kernel)
        params, macs = params + entries + biases + 2 * width, macs + side * side * entries  # two of a norm
        channels, side = width, side // 2 if i in shape.pools else side
    return params + (channels + 1) * classes, macs + channels * classes


def pair(channels: int, width: int, k: int) -> tuple[int, int]:
    return k * channels * width + k * width * width, width


def whole(channels: int, width: int, k: int) -> tuple[int, int]:
    return k * k * channels * width, 0


def transformer(tokens: int, shape: Shape) -> tuple[int, int]:
    """Blocks of four maps in attention and two of a perceptron (four times as wide where the shape has one width), with biases, two norms; then a norm."""
    w, hidden = shape.widths if len(shape.widths) == 2 else (shape.widths[0], 4 * shape.widths[0])
    params = shape.depth * (4 * w * w + 2 * w * hidden + 4 * w + hidden + w + 4 * w) + 2 * w
    return params, shape.depth * (tokens * (4 * w * w + 2 * w * hidden) + 2 * tokens * tokens * w)


def dec3() -> tuple[int, int]:
    return chain((1, 32, 32), 36, shape_of(load_recipe("dec3")), pair)


def dec3_twin() -> tuple[int, int]:
    return chain((1, 32, 32), 36, shape_of(load_recipe("dec3-twin")), whole)


def dec8() -> tuple[int, int]:
    return chain(IMAGENET, 1000, shape_of(load_recipe("imagenet-dec8")), pair)


def dec8_640() -> tuple[int, int]:
    return chain(IMAGENET, 1000, wide_dec8(), pair)


def wide_dec8() -> Shape:
    """As the recipe says: 640 instead of 512."""
    shape = shape_of(load_recipe("imagenet-dec8"))
    return dataclasses.replace(shape, widths=tuple(640 if w == 512 else w for w in shape.widths))


def gpt() -> tuple[int, int]:
    shape, letters, window = shape_of(load_recipe("shakespeare")), 65, load_recipe("shakespeare").size
    w = shape.widths[0]
    params, macs = transformer(window, shape)
    return params + 2 * letters * w + window * w, macs + window * w * letters


def vit() -> tuple[int, int]:
    shape = PUBLISHED["ViT-Ti/16"][2]
    (w,), pixels, patches = shape.widths, 3 * shape.kernel**2, (224 // shape.kernel) ** 2
    params, macs = transformer(patches + 1, shape)
    params += (pixels + 1) * w + w + (patches + 1) * w + (w + 1) * 1000
    return params, macs + patches * pixels * w + 1000 * w


def charnet() -> tuple[int, int]:
    """Of 24 x 24: 16 x 16, 8 x 8, then a single position; a maxout makes no parameters, but divides the channels behind it."""
    layers = [(1, 2 * 48, 9, 16), (48, 2 * 64, 9, 8), (64, 4 * 128, 8, 1), (128, 4 * 36, 1, 1)]
    params = sum(k * k * before * out + out for before, out, k, _ in layers)
    return params, sum(side * side * k * k * before * out for before, out, k, side in layers)


COUNTED = {
    # name, input, classes, shape, parameters and MACs by a formula of their own, and the parameters that are written somewhere
    "Dec_3": ("decomposeme", (1, 32, 32), 36, lambda: shape_of(load_recipe("dec3")), dec3, 365_316),
    "twin of Dec_3": ("convnet", (1, 32, 32), 36, lambda: shape_of(load_recipe("dec3-twin")), dec3_twin, 584_820),
    "Dec_8": ("decomposeme", IMAGENET, 1000, lambda: shape_of(load_recipe("imagenet-dec8")), dec8, 6_576_104),
    "Dec_8, 640": ("decomposeme", IMAGENET, 1000, wide_dec8, dec8_640, 9_080_552),
    "GPT": ("gpt", (64,), 65, lambda: shape_of(load_recipe("shakespeare")), gpt, 818_176),
    "ViT-Ti/16": ("vit", IMAGENET, 1000, lambda: PUBLISHED["ViT-Ti/16"][2], vit, 5_717_416),
    "CharNet": ("charnet", (1, 24, 24), 36, lambda: Shape(widths=(48, 64, 128)), charnet, 2_621_904),
}


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_and_macs_are_those_of_a_closed_formula(name):
    model, inputs, classes, shape, counted, written = COUNTED[name]
    with torch.device("meta"):
        network = MODELS[model](inputs, classes, shape()).eval()
        x = torch.zeros(1, *inputs, dtype=torch.int64) if model == "gpt" else torch.randn(1, *inputs)
        assert (count_params(network), count_macs(network, (x,))) == counted()
    assert count_params(network) == written


def test_what_is_written_of_a_network_is_its_size():
    assert "6.58 million" in (decomposeme.__doc__ or "")
    assert "9.08 with 640" in (decomposeme.__doc__ or "")
    assert "2,621,904 parameters for 36" in (CharNet.__doc__ or "")


def test_the_twin_of_dec3_differs_in_its_convolutions_alone():
    own = {"name", "model", "thin_epochs"}
    dec3, twin = (dataclasses.asdict(load_recipe(name)) for name in ("dec3", "dec3-twin"))
    assert {key for key in dec3 if dec3[key] != twin[key]} == own
    assert (twin["model"], twin["kernel"], twin["params"]) == ("convnet", 5, 0.1)


def test_a_convnet_starts_from_the_weights_it_always_had_and_takes_larger_kernels():
    shape = Shape(widths=(4, 6), pools=(0,))
    torch.manual_seed(0)
    network = MODELS["convnet"]((1, 12, 12), 5, shape)
    torch.manual_seed(0)
    first, second, head = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.Linear(6, 5)
    drawn = [p for p in network.parameters() if p.ndim > 1]
    assert all(torch.equal(a, b) for a, b in zip(drawn, (first.weight, second.weight, head.weight), strict=True))
    wide = MODELS["convnet"]((1, 12, 12), 5, dataclasses.replace(shape, kernel=5))
    assert [m.kernel_size for m in wide.modules() if isinstance(m, nn.Conv2d)] == [(5, 5)] * 2
    assert wide.features(torch.randn(1, 1, 12, 12)).shape == (1, 6, 6, 6)


@pytest.mark.parametrize("model", ["convnet", "decomposeme"])
def test_a_kernel_that_would_change_the_size_is_refused(model):
    with pytest.raises(InvalidValueError, match=r"kernel = 4: must be odd"):
        MODELS[model]((1, 12, 12), 5, Shape(widths=(4,), kernel=4))


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
        with torch.device("meta"):  # counting takes no numbers
            return MODELS[model](image, classes, dataclasses.replace(shape, widths=widths))

    limit = int(share * params)
    thin = thin_widths(build, shape.widths, limit)
    assert count_params(build(thin)) <= limit
    scaled = dict.fromkeys(tuple(max(1, round(w * s / 1000)) for w in shape.widths) for s in range(1001))
    even = next(a for a, b in itertools.pairwise(scaled) if count_params(build(b)) > limit)
    if count_params(build(even)) >= 0.95 * limit:
        assert thin == even
    else:
        assert thin[:-1] == even[:-1]
        assert count_params(build((*thin[:-1], thin[-1] + 1))) > limit


@pytest.mark.parametrize(
    ("name", "share"), [*((name, share) for name in ("gpt", "vit") for share in (0.75, 0.5, 0.25, 0.2, 0.125, 0.1)), ("gpt", 0.0625)]
)
def test_a_thin_transformer_has_the_widths_that_laconic_chooses(name, share):
    """So that both have the same size, and a step of both takes the same time."""
    inputs, shape = {
        "gpt": (torch.randint(0, 10, (2, 32)), Shape(widths=(128, 512), depth=2, heads=4)),
        "vit": (torch.randn(2, 3, 16, 16), Shape(widths=(96, 384), depth=2, heads=4, kernel=4)),
    }[name]

    def build(widths):
        return MODELS[name](inputs.shape[1:], 10, dataclasses.replace(shape, widths=widths))

    model = build(shape.widths)
    limit = int(share * count_params(model))
    thin = build(thin_widths(build, shape.widths, limit, multiples(name, shape)))
    plan = make_plan(model, [Channels(even=True)], (inputs,))
    budget, importances = Budget(params=share), {g.name: np.full(g.group.units, 1 / g.group.units) for g in plan.neurons}
    walk = choose_shapes(plan, {}, importances, budget.currencies, budget.limits(plan))
    kept = {group.group.units: walk.units[group.name] for group in plan.neurons}
    assert thin.widths == tuple(kept[width] for width in shape.widths)
    assert 0.97 * limit <= count_params(thin) <= limit


@pytest.mark.parametrize(("gain", "width", "std"), [(0.0, 32, 0.02), (0.0, 128, 0.02), (0.9, 36, 0.15), (0.9, 144, 0.075)])
@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_weights_of_a_transformer_start_by_its_width_where_a_recipe_says_so(name, gain, width, std):
    torch.manual_seed(0)
    image = (64,) if name == "gpt" else (3, 16, 16)
    model = MODELS[name](image, 65, Shape(widths=(width, 4 * width), depth=2, heads=4, kernel=4, gain=gain))
    for layer in (model.blocks[0].query, model.blocks[1].up, model.head):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)


TINY = {
    "convnet": ((1, 16, 16), Shape(widths=(8, 16), pools=(0,))),
    "decomposeme": ((1, 16, 16), Shape(widths=(8, 16), pools=(0,))),
    "lenet-300-100": ((1, 8, 8), Shape(widths=(30, 10))),
    "lenet-5": ((1, 20, 20), Shape(widths=(6, 10, 30))),
    "gpt": ((12,), Shape(widths=(16, 40), depth=2, heads=2)),
    "vit": ((1, 8, 8), Shape(widths=(16,), depth=2, heads=2, kernel=4)),
    "resnet": ((3, 16, 16), Shape(widths=(8, 12, 16), depth=8)),
    "resnet-imagenet": ((3, 40, 40), Shape(widths=(8, 12, 16, 20), depth=18)),
    "alexnet": ((3, 70, 70), Shape(widths=(8, 12, 12, 12, 8, 40))),
    "vgg-b": ((3, 32, 32), Shape(widths=(4, 4, 8, 8, 8, 8, 8, 8, 8, 8, 24))),
    "charnet": ((1, 24, 24), Shape(widths=(6, 8, 12))),
}


@pytest.mark.slow
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
    both = [LowRank(), Channels()]
    compressor = Compressor(model, optimizer, both, budget=Budget(params=0.5), total_steps=20, example_inputs=(x[:1],))
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
