"""The queue: only what is missing is run, nothing twice, and a failure costs one run."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from laconic import bench
from laconic.cli import main
from laconic.methods import METHODS
from laconic.recipe import load_recipe, shipped_recipes

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


@pytest.fixture
def in_this_process(monkeypatch):
    """What a queue starts runs here: a process of its own takes seconds to import PyTorch."""

    elsewhere = subprocess.run

    def start(command, **options):
        if command[:3] != [sys.executable, "-m", "laconic"]:  # git
            return elsewhere(command, **options)
        with contextlib.redirect_stdout(io.StringIO()):
            main(command[3:])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", start)


def test_a_queue_of_all_has_no_run_that_needs_another_ones_weights():
    names = bench.self_contained("cpu")
    assert {"scene", "cifar10", "digits"} <= set(names)
    assert all(not load_recipe(name).init for name in names)
    assert set(shipped_recipes()) - {*names, *bench.self_contained("gpu")} == {n for n in shipped_recipes() if load_recipe(n).init} != set()


def test_only_what_is_missing_is_run(recipe, capsys, in_this_process):
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


@pytest.mark.slow
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


HOLD = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    "left", [None, "", str(os.getppid())], ids=["nothing", "an empty claim", "a number that another process has by now"]
)
def test_a_run_that_nobody_is_making_is_ours(left, tmp_path):
    path = tmp_path / "small" / "thin-seed0.json"
    path.parent.mkdir()
    if left is not None:
        path.with_name(".thin-seed0.json.claim").write_text(left)
    with bench.claimed(path) as ours, bench.claimed(path) as again:
        assert ours
        assert not again
    assert list(path.parent.iterdir()) == []
    finished(path)
    with bench.claimed(path) as ours:
        assert not ours


def test_a_run_that_somebody_is_making_is_left_to_him_until_he_is_killed(recipe, capsys):
    path = Path("results/small/thin-seed0.json")
    path.parent.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path.with_name(".thin-seed0.json.claim"))], stdout=subprocess.PIPE, text=True
    ) as maker:
        assert maker.stdout.readline() == "held\n"
        run(recipe, "--methods", "thin", "--seeds", "0", "--threads", "1", "--no-times")
        assert "left to another queue, which is at work on them: small.toml thin 0" in " ".join(capsys.readouterr().err.split())
        assert not path.exists()
        maker.kill()
        maker.wait()
        with bench.claimed(path) as ours:
            assert ours


def test_means_and_spreads_over_the_seeds(recipe):
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        finished(Path(f"results/small/laconic-seed{seed}.json"), accuracy=accuracy, latency_b1_ms=None)
    (row,) = bench.summary(Path("results"), recipe)
    assert row["method"] == "laconic, 3 seeds"
    assert row["accuracy"] == pytest.approx(0.6)
    assert row["accuracy_spread"] == pytest.approx(0.1)
    assert row["params"] == 10
    assert "latency_b1_ms" not in row


def test_tuning_tries_every_setting_on_held_out_training_images(recipe, capsys, monkeypatch, in_this_process):
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
