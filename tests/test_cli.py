"""The command line as a user meets it."""

import importlib
import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import laconic.cli.shared
from laconic.cli import COMMANDS, main
from laconic.data import load_dataset
from laconic.methods import build
from laconic.recipe import Recipe, load_recipe, shipped_recipes
from laconic.training import accuracy

RECIPE = """
task = "digits"
widths = [8, 16]
pools = [0]
epochs = {epochs}
params = 0.5
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(RECIPE.format(epochs=2))
    return path


def run(*arguments: str) -> None:
    main([str(a) for a in arguments])


def test_train_writes_a_model_that_loads_and_a_result_with_the_agreed_keys(recipe, capsys):
    run("train", recipe, "--json", "--results", "results")
    result = json.loads(capsys.readouterr().out)
    assert {"task", "method", "budget", "seed", "metrics", "recipe", "versions", "commit", "dirty", "machine"} <= result.keys()
    assert result == json.loads(Path("results/small/laconic-seed0.json").read_text())
    data = load_dataset("digits")
    model = laconic.load("runs/small/laconic-seed0/model", build(data, load_recipe(recipe), seed=9))
    assert laconic.profile(model, (data.test_x[:1],), latency=False).params == result["metrics"]["params"]
    assert result["metrics"]["params"] <= 0.5 * sum(p.numel() for p in build(data, load_recipe(recipe), 0).parameters())
    page = Path("runs/small/laconic-seed0/report.html").read_text()
    assert "features.4" in page


@pytest.mark.parametrize("method", ["dense", "svd", "thin"])
def test_every_method_trains(recipe, capsys, method):
    run("train", recipe, "--method", method, "--no-times", "--json")
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["accuracy"] > 0.15
    assert "train_seconds" not in metrics


def test_the_same_seed_gives_the_same_result(recipe, capsys):
    results = []
    for _ in range(2):
        run("train", recipe, "--no-times", "--json")
        results.append(json.loads(capsys.readouterr().out)["metrics"])
    assert results[0] == results[1]


def test_report_shows_and_renders_what_was_saved(recipe, capsys):
    run("train", recipe, "--json")
    capsys.readouterr()
    run("report", "runs/small/laconic-seed0/model", "--html", "page.html")
    assert "features.4" in capsys.readouterr().out
    assert Path("page.html").read_text().startswith("<!DOCTYPE html>")
    run("report", "runs/small/laconic-seed0/model", "--json")
    assert json.loads(capsys.readouterr().out)["params_after"] > 0


def test_compress_cuts_a_trained_model_from_a_factory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_nets.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))\n"
    )
    torch.save(torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)).state_dict(), "weights.pt")
    run("compress", "my_nets:net", "--weights", "weights.pt", "--out", "compact", "--params", "0.5", "--input-shape", 1, 32, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["params_after"] <= 0.5 * report["params_before"]
    assert report["max_abs_diff"] > 0
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    assert laconic.load("compact", model)[0][0].weight.shape[0] < 32


def test_compress_with_inputs_counts_them_and_re_estimates_statistics(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("two_nets.py").write_text(
        "from torch import nn\n\n"
        "def normed():\n    return nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))\n\n"
        "def tokens():\n    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)\n"
        "    return nn.Sequential(nn.Embedding(10, 16), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 40))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    nets = importlib.import_module("two_nets")
    torch.manual_seed(0)
    for name in ("normed", "tokens"):
        torch.save(getattr(nets, name)().state_dict(), f"{name}.pt")
    np.save("x.npy", np.random.default_rng(0).normal(3.0, 1.0, (80, 32)))
    torch.save(torch.randint(0, 10, (6, 5)), "ids.pt")
    run("compress", "two_nets:normed", "--weights", "normed.pt", "--out", "one", "--macs", 0.5, "--inputs", "x.npy", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["macs_after"] <= 0.5 * report["macs_before"]
    assert "BatchNorm statistics re-estimated on 2 batches" in report["notes"]
    small = laconic.load("one", nets.normed())
    inner = small[0](torch.from_numpy(np.load("x.npy")).float())
    torch.testing.assert_close(small[1].running_mean, torch.stack([b.mean(0) for b in inner.split(64)]).mean(0))
    run(
        "compress",
        "two_nets:normed",
        "--weights",
        "normed.pt",
        "--out",
        "fitted",
        "--params",
        0.5,
        "--inputs",
        "x.npy",
        "--refit",
        "--json",
    )
    assert any(note.startswith("2 layers were fitted") for note in json.loads(capsys.readouterr().out)["notes"])
    run(
        "compress",
        "two_nets:tokens",
        "--weights",
        "tokens.pt",
        "--out",
        "two",
        "--max-params",
        2000,
        "--macs",
        0.9,
        "--inputs",
        "ids.pt",
        "--unfuse",
        "--json",
    )
    report = json.loads(capsys.readouterr().out)
    assert report["params_after"] <= 2000
    laconic.load("two", laconic.unfuse(nets.tokens()))


BAD = [
    (["train", "nope"], "neither a file nor a shipped recipe"),
    (["train", "digit"], "did you mean 'digits'"),
    (["train", "typo.toml"], "unknown key 'epoch'; did you mean 'epochs'"),
    (["train", "wrong.toml"], "epochs = 'two' should be a int"),
    (["train", "broken.toml"], "not valid TOML"),
    (["train", "digits", "--method", "lacnic"], "did you mean 'laconic'"),
    (["train", "digits", "--params", "1.5"], "Budget\\(params=1.5\\)"),
    (["train", "scene", "--data", "nowhere"], "chars74k_scene36.npz is not in nowhere: name its folder with --data"),
    (["compress", "no_colon", "--weights", "w.pt", "--out", "x", "--params", "0.5"], "expected package.module:callable"),
    (
        ["compress", "torch.nn:Identity", "--weights", "w.pt", "--out", "x"],
        "how small\\? give a budget \\(--params, --macs or --max-params\\), or else --energy",
    ),
    (["compress", "torch.nn:Identity", "--weights", "w.pt", "--out", "x", "--params", "0.5", "--energy", "0.9"], "how small"),
    (
        ["compress", "torch.nn:Identity", "--weights", "w.pt", "--out", "x", "--params", "0.5", "--inputs", "nope.npy"],
        "--inputs nope.npy: expected a .npy file.*FileNotFoundError",
    ),
    (["compress", "torch.nn:Nothing", "--weights", "w.pt", "--out", "x", "--params", "0.5"], "Nothing"),
    (["compress", "torch.nn:Identity", "--weights", "w.pt", "--out", "x", "--params", "0.5"], "w.pt does not exist"),
    (
        ["compress", "torch.nn:Linear", "--weights", "w.pt", "--out", "x", "--params", "0.5"],
        "called without arguments: TypeError: .*in_features",
    ),
    (["compress", "torch:pi", "--weights", "w.pt", "--out", "x", "--params", "0.5"], "called without arguments: TypeError: .*not callable"),
    (["compress", "torch.nn:Identity", "--weights", "w.pt", "--out", "typo.toml/x", "--params", "0.5"], "typo.toml is not a directory"),
    (["compress", "torch.nn:Identity", "--weights", "w.pt", "--out", "x", "--params", "0.5", "--refit"], "--refit: needs --inputs"),
    (["compress", "torch.nn:Identity", "--weights", "w.pt", "--out", "x", "--macs", "0.5"], "--macs 0.5: needs --inputs, or --input-shape"),
    (
        ["compress", "torch.nn:Identity", "--weights", "w.pt", "--out", "x", "--macs", "0.5", "--input-shape", "-1", "3"],
        "--input-shape -1 3: every",
    ),
    (["train", "digits", "--out", "typo.toml"], "typo.toml is not a directory"),
    (["train", "digits", "--results", "typo.toml/results"], "typo.toml is not a directory"),
    (["search", "digits", "--init", "w.pt", "--out", "typo.toml/a/b"], "typo.toml is not a directory"),
    (["demo", "--out", "typo.toml"], "typo.toml is not a directory"),
    (["compress", "unnamed:net", "--weights", "w.pt", "--out", "x", "--params", "0.5"], "factory = 'unnamed:net': NameError: name 'nets'"),
    (
        ["compress", "unparsed:net", "--weights", "w.pt", "--out", "x", "--params", "0.5"],
        "factory = 'unparsed:net': SyntaxError: .*unparsed.py",
    ),
    (["train", "digits", "--threads", "-1"], "threads = -1: must be a whole number, at least 0 and at most 1024"),
    (["train", "digits", "--threads", str(2**31 - 1)], "threads = 2147483647: must be"),
    (["train", "digits", "--seed", "9" * 23], "seed = 9+: must be a whole number, at least 0 and at most 9223372036854775807"),
    (["search", "digits", "--init", "w.pt", "--threads", "-1"], "threads = -1: must be"),
    (["search", "digits", "--init", "w.pt", "--seed", "9" * 23], "seed = 9+: must be"),
    (["demo", "--seed", "9" * 23], "seed = 9+: must be"),
    (["bench", "digits", "--seeds", "0", "9" * 23], "seed = 9+: must be"),
    (["bench", "digits", "--threads", "-1"], "threads = -1: must be"),
    (["bench", "digits", "--seeds"], "methods, seeds: give at least one of each"),
    (["bench", "digits", "--methods"], "methods, seeds: give at least one of each"),
    (["report", "own"], "own: its report is not what .* but data of your own: --json prints it"),
    (["report", "own", "--json", "--html", "own.html"], "own: its report is not what .* but data of your own: --json prints it"),
    (["report", "nowhere"], "nowhere does not exist"),
    (["report", "."], "laconic.json is missing"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_a_status(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("typo.toml").write_text(RECIPE.format(epochs=2).replace("epochs", "epoch"))
    Path("wrong.toml").write_text(RECIPE.format(epochs='"two"'))
    Path("broken.toml").write_text("task = ")
    Path("unnamed.py").write_text("net = nets")
    Path("unparsed.py").write_text("net = (")
    laconic.save(torch.nn.Identity(), "own", report={"acc": 0.5})
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("laconic: ")
    assert error.count("\n") == 1
    assert pytest.importorskip("re").search(message, error), error


def test_a_report_of_the_users_own_is_printed_as_it_is(tmp_path, capsys):
    laconic.save(torch.nn.Identity(), tmp_path / "own", report={"acc": 0.5})
    run("report", tmp_path / "own", "--json")
    assert json.loads(capsys.readouterr().out) == {"acc": 0.5}


def test_an_error_of_the_operating_system_is_one_line_and_a_status(recipe, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "runs")

    monkeypatch.setattr("laconic.checkpoint.write_file", full)
    with pytest.raises(SystemExit) as stopped:
        run("train", recipe, "--method", "thin", "--json")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "laconic: [Errno 28] No space left on device: 'runs'"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*([command] if command else []), "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert ("laconic " + (command or "")) in shown
    wanted = (
        f"Example: laconic {command}" if command else "Train, shrink, measure and report PyTorch models."
    )  # to a user, not to who reads the code
    assert wanted in " ".join(shown.split())


def test_ctrl_c_in_training_leaves_a_model_that_loads_and_says_where(recipe, capsys, monkeypatch):
    @contextmanager
    def signal_at_step_40(title, show):
        yield lambda progress: os.kill(os.getpid(), signal.SIGINT) if progress.step == 40 else None

    monkeypatch.setattr(laconic.cli.shared, "progress_bar", signal_at_step_40)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(SystemExit) as stopped:
            run("train", recipe)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    assert "interrupted at step 40 of 44; the model as it is now: runs/small/laconic-seed0/interrupted" in " ".join(
        capsys.readouterr().err.split()
    )
    data = load_dataset("digits")
    model = laconic.load("runs/small/laconic-seed0/interrupted", build(data, load_recipe(recipe), seed=3))
    dense = build(data, load_recipe(recipe), seed=3)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in dense.parameters())  # final since step 15
    assert accuracy(model, data.test_x, data.test_y) > 0.15


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid(name):
    assert isinstance(load_recipe(name), Recipe)


def test_search_finds_a_smaller_model_from_trained_weights(recipe, capsys):
    run("train", recipe, "--method", "dense", "--no-times", "--json")
    assert json.loads(capsys.readouterr().out)["method"] == "dense"
    with recipe.open("a") as file:
        file.write("\n[rates]\nlaconic = 5e-3\n")
    run("search", recipe, "--init", "runs/small/dense-seed0/model", "--max-loss", "1", "--epochs", "1", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"]["lr"] == 5e-3
    assert found["params"]["found"] < found["params"]["dense"]
    assert [t["good"] for t in found["trials"]] == [True]  # everything may be lost: the smallest is tried first, and taken
    data = load_dataset("digits")
    model = laconic.load(found["model"], build(data, load_recipe(recipe), seed=9))
    assert accuracy(model, data.test_x, data.test_y) == found["test_accuracy"]["found"]


def test_training_starts_from_given_weights(recipe, capsys):
    run("train", recipe, "--method", "dense", "--no-times", "--json")
    first = json.loads(capsys.readouterr().out)
    run("train", recipe, "--method", "dense", "--init", "runs/small/dense-seed0/model", "--no-times", "--json", "--out", "again")
    second = json.loads(capsys.readouterr().out)
    assert second["curve"]["loss"][0] < first["curve"]["loss"][1]
