"""The queue: only what is missing is run, nothing twice, and a failure costs one run."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from laconic import bench
from laconic.cli import main
from laconic.methods import METHODS

RECIPE = 'task = "digits"\nwidths = [8, 16]\npools = [0]\nepochs = 1\nparams = 0.5\n'


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(RECIPE)
    return "small.toml"


def finished(path: Path, **metrics) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metrics": {"accuracy": 0.5, "params": 10, "macs": 20} | metrics}))


def run(*arguments: str) -> None:
    main([str(a) for a in ("bench", *arguments)])


def test_only_what_is_missing_is_run(recipe, capsys):
    there = Path("results/small/laconic-seed0.json")
    finished(there)
    before = there.read_text()
    run(recipe, "--methods", "thin", "laconic", "--seeds", "0", "--threads", "1", "--no-times", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert there.read_text() == before
    assert json.loads(Path("results/small/thin-seed0.json").read_text())["method"] == "thin"
    assert [row["method"] for row in shown["rows"][recipe]] == [METHODS["thin"].label, METHODS["laconic"].label]
    assert shown["failed"] == []
    assert not list(Path("results/small").glob(".*"))


def test_a_run_that_fails_is_named_and_the_others_are_done(recipe, capsys):
    Path("bad.toml").write_text(RECIPE.replace("digits", "digit"))
    with pytest.raises(SystemExit) as stopped:
        run("bad.toml", recipe, "--methods", "thin", "--seeds", "0", "--threads", "1", "--no-times")
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert "1 of 2 runs failed" in shown.err
    assert "bad.toml thin seed 0: laconic:" in " ".join(shown.err.split())
    assert Path("results/small/thin-seed0.json").exists()
    assert "small.toml\n" in shown.out
    assert "thin" in shown.out
    assert "bad.toml" not in shown.out  # nothing to show of it


def test_unknown_methods_are_refused_before_anything_runs(recipe, capsys):
    with pytest.raises(SystemExit):
        run(recipe, "--methods", "thinn")
    assert "method = 'thinn' is unknown" in capsys.readouterr().err
    assert not Path("results").exists()


def test_the_grid_goes_seed_by_seed_and_svd_gives_dense():
    runs = bench.grid(["a", "b"], ["dense", "svd"], [0, 1])
    assert [(r.seed, r.recipe, r.method) for r in runs] == [(0, "a", "svd"), (0, "b", "svd"), (1, "a", "svd"), (1, "b", "svd")]


@pytest.mark.parametrize(("owner", "taken"), [("alive", False), ("dead", True), ("none", True)])
def test_a_run_that_somebody_is_making_is_left_to_him(owner, taken, tmp_path):
    path = tmp_path / "small" / "thin-seed0.json"
    path.parent.mkdir()
    claim = path.with_name(".thin-seed0.json.claim")
    if owner != "none":
        claim.write_text(str(os.getppid() if owner == "alive" else 2**22 + 1))  # above the largest process number
    with bench.claimed(path) as ours:
        assert ours is taken
        assert claim.read_text() == str(os.getpid() if taken else os.getppid())
        with bench.claimed(path) as again:
            assert again is False
    assert claim.exists() is not taken


def test_means_and_spreads_over_the_seeds(recipe):
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        finished(Path(f"results/small/laconic-seed{seed}.json"), accuracy=accuracy, latency_b1_ms=None)
    (row,) = bench.summary(Path("results"), recipe)
    assert row["method"] == "laconic, 3 seeds"
    assert row["accuracy"] == pytest.approx(0.6)
    assert row["accuracy_spread"] == pytest.approx(0.1)
    assert row["params"] == 10
    assert "latency_b1_ms" not in row


def test_tuning_tries_every_setting_on_held_out_training_images(recipe, capsys, monkeypatch):
    settings = (3.0,)
    monkeypatch.setitem(METHODS, "spectral-decay", dataclasses.replace(METHODS["spectral-decay"], settings=settings))
    run(recipe, "--methods", "spectral-decay", "thin", "--seeds", "0", "--tune", "--threads", "1", "--no-times", "--json")
    rows = json.loads(capsys.readouterr().out)["rows"][recipe]
    assert [row["method"] for row in rows] == [f"{METHODS['spectral-decay'].label} {s:g}" for s in settings]
    files = {s: json.loads(Path(f"results/small/spectral-decay-{s:g}-seed0.json").read_text()) for s in settings}
    assert {s: (f["validation"], f["recipe"]["setting"]) for s, f in files.items()} == {s: (True, s) for s in settings}


def test_tuning_what_has_no_settings_is_refused(recipe, capsys):
    with pytest.raises(SystemExit):
        run(recipe, "--methods", "thin", "--tune")
    assert "tune: nothing can be set of thin" in capsys.readouterr().err
