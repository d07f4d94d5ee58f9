"""The recipes for ImageNet, on a small generated folder: alone, and as two processes of torchrun."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from laconic import load
from laconic.cli import main
from laconic.data import load_dataset, zoom_and_flip
from laconic.measure import count_params
from laconic.methods import build
from laconic.recipe import load_recipe, shipped_recipes
from laconic.training import accuracy

SMALL = {"size": 48, "epochs": 1, "batch_size": 8, "thin_epochs": 1}
WIDTHS = {"imagenet-resnet50": "[8, 8, 12, 16]", "imagenet-dec8": "[4, 6, 8, 8, 8, 8, 12, 12]"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes that differ in brightness, in images of many sizes, as ImageNet lies on a disk."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 24), ("val", 9)):
        for label, level in (("n01", 60), ("n02", 190)):
            place = root / "imagenet" / part / label
            place.mkdir(parents=True)
            for i in range(count):
                shape = (50 + i, 70 - i, 3)
                noise = torch.randint(-40, 40, shape, generator=generator)
                Image.fromarray((level + noise).to(torch.uint8).numpy()).save(place / f"{i}.png")
    return root


def smaller(name: str, at: Path) -> str:
    """The shipped recipe with other sizes: everything else is what it is."""
    text = shipped_recipes()[name].read_text()
    for key, value in {**SMALL, "widths": WIDTHS[name]}.items():
        text, found = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert found == 1, key
    path = at / f"{name}.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["laconic", "thin-long"])
@pytest.mark.parametrize("name", WIDTHS)
def test_the_recipes_run_on_a_folder(name, method, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))
    recipe = smaller(name, tmp_path)
    main(["train", recipe, "--method", method, "--data", str(folder), "--out", str(tmp_path / "runs"), "--no-times", "--json"])
    result = json.loads((tmp_path / "runs" / name / f"{method}-seed0" / "result.json").read_text())
    dense = build(load_dataset("imagenet", folder, size=48), load_recipe(recipe), 0)
    assert result["metrics"]["params"] <= load_recipe(recipe).params * count_params(dense)
    assert load_recipe(name).tier == "gpu"
    assert load_recipe(name).size == 224


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo")
def test_two_processes_train_one_model(folder, tmp_path):
    recipe = smaller("imagenet-dec8", tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "laconic", "train", recipe]
    options = ["--data", str(folder), "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LACONIC_CACHE": str(tmp_path)}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.strip()]  # of one process
    result = json.loads(line)
    assert any(len(h["ranks"]) or h.get("groups") for h in result["history"])  # there were cuts on the way
    assert "train_seconds" not in result["metrics"]
    assert json.loads((tmp_path / "results" / "imagenet-dec8" / "laconic-seed0.json").read_text()) == result
    data = load_dataset("imagenet", folder, size=48)
    dense = build(data, load_recipe(recipe), 0)
    assert result["metrics"]["params"] <= 0.5 * count_params(dense)
    saved = load(tmp_path / "runs" / "imagenet-dec8" / "laconic-seed0" / "model", dense)
    assert accuracy(saved, data.test_x, data.test_y) == pytest.approx(result["metrics"]["accuracy"])


def test_a_batch_that_cannot_be_divided_is_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("laconic.training.world_size", lambda: 3)
    with pytest.raises(SystemExit):
        main(["train", smaller("imagenet-dec8", tmp_path), "--method", "thin", "--data", str(folder), "--out", str(tmp_path), "--no-times"])
    assert "batch_size = 8: cannot be divided among 3 processes" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_refused(capsys):
    for name, word in (("cuda:99", "cuda"), ("gpu", "device")):
        with pytest.raises(SystemExit):
            main(["train", "digits", "--device", name])
        message = capsys.readouterr().err
        assert f"device = '{name}'" in message
        assert word in message
        assert message.count("\n") == 1


def test_zoomed_images_are_parts_of_the_image_and_half_are_mirrored():
    ramp = torch.linspace(0, 1, 64).expand(400, 1, 64, 64)
    out = zoom_and_flip(ramp, torch.Generator().manual_seed(0))
    assert out.shape == ramp.shape
    slope = out[:, 0, 0, -1] - out[:, 0, 0, 0]
    assert 0.4 < float((slope > 0).float().mean()) < 0.6
    assert float(slope.abs().min()) > (1 / 3 * 3 / 4) ** 0.5 - 0.05  # a third of the area, as narrow as 3:4
    assert float(slope.abs().max()) <= 1.0
    assert float(out.min()) >= 0
    torch.testing.assert_close(zoom_and_flip(ramp, torch.Generator().manual_seed(0)), out)
