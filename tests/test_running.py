"""Running checkpoints: nothing is lost, whatever is killed or damaged, and a resumed run ends as the uninterrupted one."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn, optim

import laconic
from laconic import running
from laconic.checkpoint import read_tensors

from .models import assert_same, backward, cnn, snapshot

BUDGET = laconic.Budget(params=0.5)


class Loop:
    """A training loop with everything that has a state."""

    def __init__(self, directory: Path, **options) -> None:
        torch.manual_seed(0)
        self.model = cnn()
        self.optimizer = optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 30)
        self.compressor = laconic.Compressor(self.model, self.optimizer, budget=BUDGET, total_steps=30, every=2)
        self.checkpoints = laconic.RunCheckpoints(
            directory, self.model, self.compressor, optimizer=self.optimizer, scheduler=self.scheduler, **options
        )

    def train(self, start: int, stop: int) -> "Loop":
        for t in range(start, stop):
            backward(self.model, t)
            self.optimizer.step()
            self.scheduler.step()
            self.model.zero_grad()
        return self

    def state(self) -> list:
        return snapshot(self.compressor, self.model, self.optimizer, self.scheduler)


@pytest.mark.parametrize("at", [0, 1, 9, 15, 16, 29])
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, at):
    whole = Loop(tmp_path / "whole").train(0, 30)
    Loop(tmp_path / "run").train(0, at).checkpoints.save(at, {"note": "here", "noise": torch.ones(3)})
    torch.manual_seed(123)
    again = Loop(tmp_path / "run")
    step, extra = again.checkpoints.resume()
    assert step == at
    assert extra["note"] == "here"
    assert torch.equal(extra["noise"], torch.ones(3))
    assert_same(again.train(at, 30).state(), whole.state())


def test_random_numbers_go_on_where_they_were(tmp_path):
    loop = Loop(tmp_path)
    torch.manual_seed(5)
    loop.checkpoints.save(1)
    wanted = torch.rand(4)
    torch.manual_seed(6)
    Loop(tmp_path).checkpoints.resume()
    assert torch.equal(torch.rand(4), wanted)


def test_the_model_of_a_checkpoint_loads_into_a_dense_one(tmp_path):
    loop = Loop(tmp_path).train(0, 20)
    fresh = laconic.load(loop.checkpoints.save(20) / "model", cnn())
    assert_same(snapshot(fresh), snapshot(loop.model))


def test_only_the_newest_are_kept_and_what_was_killed_is_swept(tmp_path):
    loop = Loop(tmp_path)
    (tmp_path / ".step-00000001.abc.tmp").mkdir(parents=True)
    for step in (1, 2, 5, 10):
        loop.checkpoints.save(step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]
    loop.checkpoints.clear()
    assert list(tmp_path.iterdir()) == []
    assert loop.checkpoints.resume() is None


DAMAGE = {
    "cut short": lambda p: (p / "training.pt").write_bytes((p / "training.pt").read_bytes()[:-100]),
    "edited": lambda p: (p / "training.pt").write_bytes((p / "training.pt").read_bytes()[:-1] + b"x"),
    "model edited": lambda p: (p / "model" / "model.safetensors").write_bytes((p / "model" / "model.safetensors").read_bytes()[:-1] + b"x"),
    "no manifest": lambda p: (p / "checkpoint.json").unlink(),
    "manifest of another step": lambda p: (p / "checkpoint.json").write_text((p / "checkpoint.json").read_text().replace("20", "21")),
    "no model": lambda p: (p / "model" / "laconic.json").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, damage):
    loop = Loop(tmp_path).train(0, 10)
    loop.checkpoints.save(10)
    before = loop.state()
    damage(loop.train(10, 20).checkpoints.save(20))
    again = Loop(tmp_path)
    with pytest.warns(UserWarning, match=r"step-00000020 is damaged.*resuming from step 10"):
        assert again.checkpoints.resume()[0] == 10
    assert_same(again.state(), before)


def test_where_none_is_whole_it_says_so(tmp_path):
    DAMAGE["edited"](Loop(tmp_path).checkpoints.save(3))
    with pytest.raises(laconic.CheckpointError, match=r"no whole checkpoint in .*step-00000003 is damaged"):
        Loop(tmp_path).checkpoints.resume()


@pytest.mark.parametrize("step", ["save", "write_file", "sync_directory", "os.rename"])
def test_a_save_that_fails_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch, step):
    loop = Loop(tmp_path)
    loop.checkpoints.save(4)

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(running.os if step == "os.rename" else running, step.removeprefix("os."), fails)
    with pytest.raises(OSError, match="disk full"):
        loop.checkpoints.save(8)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    assert Loop(tmp_path).checkpoints.resume()[0] == 4


def edited(path: Path, **changes) -> None:
    manifest = path / "checkpoint.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def test_another_format_or_another_run_is_refused_by_name(tmp_path):
    path = Loop(tmp_path, settings={"lr": 0.01, "seed": 0}).checkpoints.save(3)
    with pytest.raises(laconic.CheckpointError, match=r"other settings: lr was 0\.01, is 0\.02"):
        Loop(tmp_path, settings={"lr": 0.02, "seed": 0}).checkpoints.resume()
    edited(path, format=7)
    with pytest.raises(laconic.CheckpointError, match=r"has format 7; this laconic reads 1"):
        Loop(tmp_path, settings={"lr": 0.01, "seed": 0}).checkpoints.resume()


def test_other_parts_are_refused_by_name(tmp_path):
    loop = Loop(tmp_path)
    loop.checkpoints.save(3)
    with pytest.raises(laconic.CheckpointError, match=r"holds the parts \['optimizer', 'scheduler'\], this run has \['optimizer'\]"):
        laconic.RunCheckpoints(tmp_path, cnn(), loop.compressor, optimizer=loop.optimizer).resume()
    with pytest.raises(laconic.CheckpointError, match="saved with a compressor, unlike this run"):
        laconic.RunCheckpoints(tmp_path, cnn(), optimizer=loop.optimizer, scheduler=loop.scheduler).resume()
    with pytest.raises(laconic.InvalidTypeError, match="lr: float has no state_dict"):
        laconic.RunCheckpoints(tmp_path, nn.Linear(1, 1), lr=0.1)
    with pytest.raises(laconic.InvalidValueError, match="keep = 0"):
        laconic.RunCheckpoints(tmp_path, nn.Linear(1, 1), keep=0)


# ---- the command line -----------------------------------------------------------------------------------------------

RECIPE = 'task = "digits"\nwidths = [8, 16, 16]\npools = [0, 1]\nepochs = 3\nlr = 3e-3\nparams = 0.4\n'


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--threads", "1", "--no-times", "--json", "--checkpoint-every", "3", "--out", str(out)]
    return [sys.executable, "-m", "laconic", "train", str(recipe), *fixed, *more]


def outcome(out: Path) -> list:
    folder = out / "tiny" / "laconic-seed0"
    result = json.loads((folder / "result.json").read_text())
    tensors = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in sorted(read_tensors(folder / "model").items())}
    return [tensors, result["history"], {k: v for k, v in result["curve"].items() if k != "seconds"}]


def test_a_killed_run_resumes_from_the_command_line(tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    subprocess.run(command(recipe, tmp_path / "whole"), check=True, capture_output=True)
    running_folder = tmp_path / "killed" / "tiny" / "laconic-seed0" / "running"
    for more, seen in (((), 12), (("--resume",), 45)):  # killed twice: in the warm-up of the run, and after the cut
        child = subprocess.Popen(command(recipe, tmp_path / "killed", *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not any(int(p.name[5:]) >= seen for p in running_folder.glob("step-*")):
            assert child.poll() is None
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    done = subprocess.run(command(recipe, tmp_path / "killed", "--resume"), check=True, capture_output=True, text=True)
    assert "starting from the beginning" not in done.stderr
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert not running_folder.exists()


def test_resuming_nothing_or_something_else_is_said(tmp_path, capsys):
    from laconic.cli import main

    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE.replace("epochs = 3", "epochs = 1"))
    arguments = ["train", str(recipe), "--threads", "1", "--no-times", "--json", "--out", str(tmp_path), "--method", "dense"]
    main([*arguments, "--resume"])
    assert "no checkpoint to resume from, starting from the beginning" in " ".join(capsys.readouterr().err.split())
    folder = tmp_path / "tiny" / "dense-seed0" / "running"
    laconic.RunCheckpoints(folder, nn.Linear(1, 1), settings={"seed": 1}).save(3)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--resume"])
    assert stopped.value.code == 2
    assert "seed was 1, is 0" in capsys.readouterr().err
    main(arguments)
    assert "checkpoints of an earlier run are removed" in " ".join(capsys.readouterr().err.split())
    assert not folder.exists()
