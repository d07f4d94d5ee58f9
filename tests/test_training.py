"""Optimizers and schedules of the recipes: what AdamW with a cosine always was, and SGD with steps as it is published."""

import dataclasses
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from laconic.cli import main
from laconic.data import load_dataset
from laconic.errors import RecipeError
from laconic.measure import count_params
from laconic.methods import METHODS, at_own_rate, build
from laconic.recipe import CHOICES, Recipe, load_recipe, shipped_recipes
from laconic.training import OPTIMIZERS, SCHEDULES, accuracy, fit, learning_rate_factor, make_optimizer

RECIPE = Recipe(name="small", task="digits", widths=(8, 16, 16), pools=(0,), epochs=4, params=0.5)
PUBLISHED = dataclasses.replace(RECIPE, optimizer="sgd", schedule="steps", lr=0.1, weight_decay=1e-4, lr_warmup=0.0)


def factors(recipe: Recipe, total: int) -> list[float]:
    return [learning_rate_factor(step, total, recipe) for step in range(total)]


def rates(recipe: Recipe) -> list[float]:
    """Learning rates of all steps of a training run."""
    data = load_dataset("digits", train_limit=4 * recipe.batch_size)
    model, seen = build(data, recipe, 0), []
    optimizer = make_optimizer(model, recipe)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    fit(model, data, recipe, 0, optimizer)
    return seen


def test_a_recipe_that_says_nothing_gets_adamw_and_a_cosine_to_the_bit():
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, RECIPE)
    assert type(optimizer) is torch.optim.AdamW
    decayed, free = optimizer.param_groups
    assert decayed["params"] == [model.weight]
    assert free["params"] == [model.bias]
    assert (decayed["weight_decay"], free["weight_decay"], decayed["lr"]) == (0.01, 0.0, 2e-3)
    rising = [(step + 1) / 4 for step in range(4)]
    falling = [0.5 * (1 + math.cos(math.pi * (step - 4) / 16)) for step in range(4, 20)]
    assert factors(RECIPE, 20) == rising + falling


def test_steps_divide_the_rate_at_the_milestones():
    assert factors(PUBLISHED, 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-12)
    own = dataclasses.replace(PUBLISHED, lr_warmup=0.2, milestones=(0.3, 0.7, 0.9), gamma=0.5)
    assert factors(own, 10) == [0.5, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    uneven = dataclasses.replace(PUBLISHED, milestones=(0.55,), gamma=0.5)  # 0.55 * 100 is above 55 in floats
    assert factors(uneven, 100) == [1] * 55 + [0.5] * 45
    assert factors(dataclasses.replace(PUBLISHED, milestones=()), 3) == [1, 1, 1]


def test_a_training_run_follows_its_schedule():
    expected = [0.1 * 0.1 ** (step >= 8) * 0.1 ** (step >= 12) for step in range(16)]
    assert rates(PUBLISHED) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_that_with_momentum(nesterov):
    """Two steps by hand: v <- 0.8 v + g, and p <- p - lr v, or with Nesterov p - lr (g + 0.8 v)."""
    recipe = dataclasses.replace(PUBLISHED, momentum=0.8, nesterov=nesterov, weight_decay=0.5)
    model = nn.Linear(1, 1).double()
    weight, bias = model.weight.item(), model.bias.item()
    optimizer = make_optimizer(model, recipe)
    v, u = 0.0, 0.0
    for gradient in (2.0, -3.0):
        model.weight.grad, model.bias.grad = (torch.full_like(p, gradient) for p in (model.weight, model.bias))
        optimizer.step()
        g = gradient + 0.5 * weight  # no decay of a bias
        v, u = 0.8 * v + g, 0.8 * u + gradient
        weight -= 0.1 * (g + 0.8 * v if nesterov else v)
        bias -= 0.1 * (gradient + 0.8 * u if nesterov else u)
    assert model.weight.item() == pytest.approx(weight, rel=1e-12)
    assert model.bias.item() == pytest.approx(bias, rel=1e-12)


def test_every_name_that_a_recipe_may_give_has_its_function():
    assert tuple(OPTIMIZERS) == CHOICES["optimizer"]
    assert tuple(SCHEDULES) == CHOICES["schedule"]


BAD = {
    "optimizer": ({"optimizer": "adam"}, "optimizer = 'adam' is unknown; did you mean 'adamw'"),
    "schedule": ({"schedule": "step"}, "schedule = 'step' is unknown; did you mean 'steps'"),
    "gain": ({"gain": -0.5}, "gain = -0.5 must be 0 or above"),
    "momentum": ({"momentum": 1.0}, "momentum = 1.0 must be at least 0 and below 1"),
    "momentum below 0": ({"momentum": -0.1}, "momentum = -0.1 must be"),
    "nesterov": ({"nesterov": True, "momentum": 0}, "nesterov = true needs a momentum above 0"),
    "nesterov a number": ({"nesterov": 1}, "nesterov = 1 should be a bool"),
    "gamma": ({"gamma": 0.0}, "gamma = 0.0 must be above 0 and at most 1"),
    "gamma above 1": ({"gamma": 10}, "gamma = 10 must be above 0 and at most 1"),
    "milestones in epochs": ({"milestones": [100, 150]}, r"milestones = \[100, 150\] must be rising shares of the run"),
    "milestones not rising": ({"milestones": [0.75, 0.5]}, r"milestones = \[0.75, 0.5\] must be rising"),
    "milestones at 0": ({"milestones": [0.0, 0.5]}, r"milestones = \[0.0, 0.5\] must be rising"),
    "milestones in the warm-up": ({"schedule": "steps", "lr_warmup": 0.5}, r"milestones = \[0.5, 0.75\] must be .* after lr_warmup = 0.5"),
    "milestones of words": ({"milestones": ["half"]}, r"milestones = \['half'\] should be a tuple\[float, \.\.\.\]"),
    "milestones no list": ({"milestones": 0.5}, "milestones = 0.5 should be a tuple"),
    "warmup alone": ({"warmup": 0.05}, "warmup = 0.05 without settle"),
    "tier": ({"tier": "tpu"}, "tier = 'tpu' is unknown"),
    "a rate of words": ({"rates": {"thin": "high"}}, r"rates = \{'thin': 'high'\} should be a dict\[str, float\]"),
    "rates no table": ({"rates": 8e-3}, "rates = 0.008 should be a dict"),
    "a rate of zero": ({"rates": {"thin": 0}}, "rates.thin = 0 must be above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_gets_one_clear_line(case):
    changes, message = BAD[case]
    with pytest.raises(RecipeError, match=f"^recipe: {message}") as caught:
        dataclasses.replace(RECIPE, **changes)
    assert "\n" not in str(caught.value)


def test_a_method_trains_at_its_own_rate(tmp_path, monkeypatch, capsys):
    """So that a recipe can compare each at its best."""
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"(?m)^epochs = .*$", "epochs = 1", shipped_recipes()["digits"].read_text())
    texts = {"own": f"{text}\n[rates]\nthin = 8e-3\n", "all": re.sub(r"(?m)^lr = .*$", "lr = 8e-3", text)}
    losses = {}
    for name, content in texts.items():
        Path(f"{name}.toml").write_text(content)
        for method in ("thin", "dense"):
            main(["train", f"{name}.toml", "--method", method, "--no-times", "--json", "--threads", "1"])
            result = json.loads(capsys.readouterr().out)
            losses[name, method], rate = result["curve"]["loss"], result["recipe"]["lr"]
            assert rate == (load_recipe("digits").lr if (name, method) == ("own", "dense") else 8e-3)
    assert losses["own", "thin"] == losses["all", "thin"]
    assert losses["own", "dense"] != losses["all", "dense"]


def test_a_rate_for_what_trains_nothing_is_refused():
    for name, message in {
        "thin-lon": "no such method; did you mean 'thin-long'",
        "svd": "svd cuts the network that dense has trained",
    }.items():
        with pytest.raises(RecipeError, match=rf"^recipe: rates\.{name}: {message}"):
            at_own_rate(dataclasses.replace(RECIPE, rates={name: 8e-3}), "laconic")


def test_svd_has_the_rate_of_the_network_that_it_cuts():
    assert at_own_rate(dataclasses.replace(RECIPE, rates={"dense": 8e-3}), "svd").lr == 8e-3


def test_laconic_meets_its_budget_with_sgd_and_steps():
    data = load_dataset("digits")
    recipe = dataclasses.replace(PUBLISHED, epochs=6, params=0.3, widths=(16, 24, 32))
    trained = METHODS["laconic"].run(data, recipe, 0)
    dense = count_params(build(data, recipe, 0))
    assert 0.8 * 0.3 * dense < count_params(trained.model) <= 0.3 * dense
    assert trained.report is not None
    assert any(layer.rank for layer in trained.report.layers)
    assert accuracy(trained.model, data.test_x, data.test_y) > 0.8


SMALLER = {
    "gpu-resnet20": {"depth": 8, "widths": [6, 8, 12]},
    "gpu-resnet56": {"depth": 14, "widths": [6, 8, 12]},
    "gpu-vgg16": {"widths": [4, 4, 6, 6, 8, 8, 8, 12, 12, 12, 16, 16, 16], "params": 0.3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLER)
def test_the_recipes_with_published_schedules_run(name, tmp_path, monkeypatch, capsys):
    """On images of their classes' brightness, with smaller networks and batches: all else is what they say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    noise = np.random.default_rng(0)
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        y = [i % 10 for i in range(20)]
        x = np.clip(25 * np.array(y)[:, None] + noise.integers(0, 20, (20, 3072)), 0, 255).astype(np.uint8)
        (place / file).write_bytes(pickle.dumps({b"data": x, b"labels": y}))
    text = shipped_recipes()[name].read_text()
    for key, value in {"epochs": 4, "batch_size": 20, **SMALLER[name]}.items():
        text, found = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert found == 1, key
    Path("own.toml").write_text(text)
    main(["train", "own.toml", "--data", ".", "--no-times", "--json", "--threads", "1"])
    result = json.loads(capsys.readouterr().out)
    assert (result["recipe"]["optimizer"], result["recipe"]["schedule"], result["recipe"]["milestones"]) == ("sgd", "steps", [0.5, 0.75])
    dense = count_params(build(load_dataset("cifar10-original", tmp_path), load_recipe("own.toml"), 0))
    assert result["metrics"]["params"] <= load_recipe("own.toml").params * dense
    assert all(math.isfinite(loss) for loss in result["curve"]["loss"])


@pytest.mark.parametrize(("name", "lr", "decay"), [("gpu-resnet20", 0.1, 1e-4), ("gpu-resnet56", 0.1, 1e-4), ("gpu-vgg16", 0.05, 5e-4)])
def test_published_schedules(name, lr, decay):
    recipe = load_recipe(name)
    assert (recipe.lr, recipe.weight_decay, recipe.momentum, recipe.batch_size, recipe.epochs) == (lr, decay, 0.9, 128, 200)
    assert factors(recipe, 200) == pytest.approx([1.0] * 100 + [0.1] * 50 + [0.01] * 50, rel=1e-12)
