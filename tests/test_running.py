"""Running checkpoints: nothing is lost, whatever is killed or damaged, and a resumed run ends as the uninterrupted one."""

import copy
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn, optim

import laconic
from laconic import running
from laconic.checkpoint import read_tensors
from laconic.plain import plain

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


@functools.cache
def uninterrupted() -> list:
    return Loop(Path("nothing is written")).train(0, 30).state()


@pytest.mark.parametrize("at", [0, 1, 9, 15, 16, 29])
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, at):
    Loop(tmp_path / "run").train(0, at).checkpoints.save(at, {"note": "here", "noise": torch.ones(3)})
    torch.manual_seed(123)
    again = Loop(tmp_path / "run")
    step, extra = again.checkpoints.resume()
    assert step == at
    assert extra["note"] == "here"
    assert torch.equal(extra["noise"], torch.ones(3))
    assert_same(again.train(at, 30).state(), uninterrupted())


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


def test_a_run_that_got_further_is_not_written_over(tmp_path):
    for step in (900, 1000):
        Loop(tmp_path).checkpoints.save(step)
    other = Loop(tmp_path).checkpoints
    with pytest.raises(laconic.CheckpointError, match=r"to step 1000: step 100 was not saved; resume\(\) that run first, clear\(\) to"):
        other.save(100)
    assert other.steps() == [900, 1000]
    other.clear()
    assert other.save(100).is_dir()
    assert other.steps() == [100]


@pytest.mark.filterwarnings("ignore:checkpoint")
def test_a_damaged_later_checkpoint_goes_once_there_is_a_new_one(tmp_path):
    loop = Loop(tmp_path).checkpoints
    loop.save(900)
    (loop.save(1000) / "training.pt").unlink()
    loop = Loop(tmp_path).checkpoints
    loop.resume()
    assert loop.save(950).is_dir()
    assert loop.steps() == [900, 950]


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
        laconic.RunCheckpoints(tmp_path, loop.model, loop.compressor, optimizer=loop.optimizer).resume()
    with pytest.raises(laconic.CheckpointError, match="saved with a compressor, unlike this run"):
        laconic.RunCheckpoints(tmp_path, cnn(), optimizer=loop.optimizer, scheduler=loop.scheduler).resume()
    with pytest.raises(laconic.InvalidTypeError, match="lr: float has no state_dict"):
        laconic.RunCheckpoints(tmp_path, nn.Linear(1, 1), lr=0.1)
    with pytest.raises(laconic.InvalidValueError, match="keep = 0"):
        laconic.RunCheckpoints(tmp_path, nn.Linear(1, 1), keep=0)


# ---- what can be read back ------------------------------------------------------------------------------------------


def test_numbers_of_numpy_come_back_as_plain_ones(tmp_path):
    loop = Loop(tmp_path)
    loop.optimizer.param_groups[0]["lr"] = np.float64(0.02)
    extra = {"best": np.float64(0.9), "seen": [np.int64(3), (np.bool_(True), np.str_("x"))], np.int64(7): np.arange(3), "big": 2**100}
    given = dict(extra)
    loop.checkpoints.save(np.int64(5), extra)
    assert extra == given  # what was given is not changed
    assert type(loop.optimizer.param_groups[0]["lr"]) is np.float64
    again = Loop(tmp_path)
    step, found = again.checkpoints.resume()
    assert (step, type(step)) == (5, int)
    numbers = found.pop(7)
    assert_same(found, {"best": 0.9, "seen": [3, (True, "x")], "big": 2**100})
    assert type(found["best"]) is float
    assert type(found["seen"][1][0]) is bool
    assert torch.equal(numbers, torch.arange(3))
    assert type(again.optimizer.param_groups[0]["lr"]) is float


def test_what_needs_no_change_stays_the_same_object():
    state = {
        "model": nn.BatchNorm1d(3).state_dict(), "counts": Counter("aab"), "ordered": OrderedDict(a=[1, (2.0, None)]),
        "set": {1, 2}, "kinds": [torch.float32, torch.device("cpu"), torch.Size([2]), b"x", 1j], "weight": nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    assert plain(state, "state") is state
    changed = plain(state["model"] | OrderedDict(a=np.float32(1)), "state")
    assert type(changed) is OrderedDict
    assert changed["a"] == 1
    module = nn.BatchNorm1d(3).state_dict()
    module["a"] = np.float32(1)
    assert plain(module, "state")._metadata == module._metadata
    assert plain(Counter({"a": np.int64(2)}), "state") == Counter({"a": 2})


def labelled() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.source = Path("x")
    return tensor


UNREADABLE = {
    "a path": ({"file": Path("x")}, r"extra\['file'\] is a \w*Path, which could not be read back without pickle"),
    "deep": ({"runs": [{"at": (1, Path("x"))}]}, r"extra\['runs'\]\[0\]\['at'\]\[1\] is a \w*Path"),
    "a key": ({Path("x"): 1}, r"the key \w*Path\('x'\) of extra is a \w*Path"),
    "a function": ({"f": lambda x: x}, r"extra\['f'\] is a function"),
    "an array of objects": ({"a": np.array([None, 1])}, r"extra\['a'\] is an array of object"),
    "a masked array": ({"a": np.ma.zeros(2)}, r"extra\['a'\] is a MaskedArray"),
    "a date of numpy's": ({"day": np.datetime64("2020-01-01")}, r"extra\['day'\] is a date"),
    "a string with a class": ({"torch": torch.__version__}, r"extra\['torch'\] is a TorchVersion"),
    "a tensor with attributes": ({"t": labelled()}, r"extra\['t'\] is a Tensor"),
}  # fmt: skip


@pytest.mark.parametrize(("extra", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_could_not_be_read_back_is_refused_before_anything_is_written(tmp_path, extra, message):
    loop = Loop(tmp_path)
    loop.checkpoints.save(4, {"kept": 1})
    with pytest.raises(laconic.InvalidTypeError, match=message) as caught:
        loop.checkpoints.save(4, extra)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    assert Loop(tmp_path).checkpoints.resume() == (4, {"kept": 1})


def test_a_part_whose_state_could_not_be_read_back_is_named(tmp_path):
    loop = Loop(tmp_path / "run")
    loop.optimizer.param_groups[0]["note"] = Path("x")
    with pytest.raises(laconic.InvalidTypeError, match=r"^optimizer\['param_groups'\]\[0\]\['note'\] is a \w*Path"):
        loop.checkpoints.save(1)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_an_earlier_version_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "plain", lambda value, where: value)
    laconic.RunCheckpoints(tmp_path, nn.Linear(1, 1)).save(1, {"best": np.float64(0.9)})
    with pytest.raises(laconic.CheckpointError, match=r"training\.pt holds what cannot be read without pickle: allow its classes"):
        laconic.RunCheckpoints(tmp_path, nn.Linear(1, 1)).resume()


@pytest.mark.parametrize("step", [-3, "3", True, 2.0, None])
def test_a_step_that_is_no_whole_number_is_one_clear_line(tmp_path, step):
    with pytest.raises(laconic.InvalidValueError, match=rf"^step = {step!r}: must be a whole number, at least 0$"):
        laconic.RunCheckpoints(tmp_path / "run", nn.Linear(1, 1)).save(step)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"a": 1, "p": Path("x")}, r"settings\['p'\] cannot be written as JSON \(\w*Path is not plain data\)"),
        ({"a": {(1, 2): 3}}, r"settings\['a'\] cannot be written as JSON"),
        (["a"], r"settings: expected a dict, got list"),
    ],
)
def test_settings_that_are_not_plain_are_one_clear_line(tmp_path, settings, message):
    with pytest.raises(laconic.InvalidTypeError, match=message):
        laconic.RunCheckpoints(tmp_path, nn.Linear(1, 1), settings=settings)


def test_settings_may_hold_numbers_of_numpy(tmp_path):
    laconic.RunCheckpoints(tmp_path, nn.Linear(1, 1), settings={"seed": np.int64(3), "lr": [np.float32(0.5)]}).save(1)
    assert laconic.RunCheckpoints(tmp_path, nn.Linear(1, 1), settings={"seed": 3, "lr": [0.5]}).resume()[0] == 1


# ---- what belongs together ------------------------------------------------------------------------------------------


def test_another_model_than_the_compressors_is_refused(tmp_path):
    loop = Loop(tmp_path)
    with pytest.raises(laconic.InvalidValueError, match="this Sequential is not the one that the compressor trains"):
        laconic.RunCheckpoints(tmp_path, copy.deepcopy(loop.model), loop.compressor, optimizer=loop.optimizer)
    with pytest.raises(laconic.InvalidTypeError, match=r"expected a laconic\.Compressor, got AdamW"):
        laconic.RunCheckpoints(tmp_path, loop.model, loop.optimizer)
    with pytest.raises(laconic.InvalidTypeError, match=r"got the class Linear itself: build one first, Linear\(\.\.\.\)"):
        laconic.RunCheckpoints(tmp_path, nn.Linear)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda m: nn.DataParallel(compiled(m))])
def test_a_wrapped_model_is_the_compressors(tmp_path, wrap):
    loop = Loop(tmp_path).train(0, 20)
    parts = {"optimizer": loop.optimizer, "scheduler": loop.scheduler}
    laconic.RunCheckpoints(tmp_path, wrap(loop.model), loop.compressor, **parts).save(20)
    assert_same(snapshot(laconic.load(tmp_path / "step-00000020" / "model", cnn())), snapshot(loop.model))
    again = Loop(tmp_path)
    again.checkpoints.resume()
    assert_same(again.state(), loop.state())


class Wrapper:
    """As Accelerate's: with groups, and another optimizer inside."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict

    @property
    def param_groups(self) -> list:
        return self.optimizer.param_groups


def test_an_optimizer_whose_state_would_be_lost_is_refused(tmp_path):
    loop = Loop(tmp_path)
    with pytest.raises(
        laconic.InvalidValueError, match=r"compressor \(AdamW\) is none of the parts \(there are none\).*optimizer=optimizer"
    ):
        laconic.RunCheckpoints(tmp_path, loop.model, loop.compressor)
    with pytest.raises(laconic.InvalidValueError, match=r"none of the parts \(scheduler\)"):  # it knows the optimizer, and saves it not
        laconic.RunCheckpoints(tmp_path, loop.model, loop.compressor, scheduler=loop.scheduler)
    laconic.RunCheckpoints(tmp_path, loop.model, loop.compressor, wrapped=Wrapper(loop.optimizer))


def test_every_optimizer_of_a_compressor_is_asked_for(tmp_path):
    model = cnn()
    one, two = optim.SGD(model[0].parameters(), lr=0.1), optim.SGD(model[7].parameters(), lr=0.1)
    compressor = laconic.Compressor(model, [one, two], laconic.LowRank(strength=0.1))
    with pytest.raises(laconic.InvalidValueError, match=r"none of the parts \(one\)"):
        laconic.RunCheckpoints(tmp_path, model, compressor, one=one)
    laconic.RunCheckpoints(tmp_path, model, compressor, one=one, two=two)


class Counted:
    """A part with a state of its own."""

    def __init__(self, fails: bool = False) -> None:
        self.count, self.fails = 0, fails

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        if self.fails:
            raise KeyError("mean")


def everything(loop: Loop) -> list:
    """The state, the objects that hold it, and the hooks."""
    modules = dict(loop.model.named_modules())
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()}
    groups = [[id(p) for p in g["params"]] for g in loop.optimizer.param_groups]
    rng = torch.get_rng_state()
    return [copy.deepcopy(loop.state()), {k: id(m) for k, m in modules.items()}, hooks, groups, str(loop.compressor.plan), rng]


def test_a_part_of_another_class_is_refused_before_anything_is_loaded(tmp_path):
    Loop(tmp_path).train(0, 20).checkpoints.save(20)
    other = Loop(tmp_path / "other")
    other.optimizer = optim.SGD(other.model.parameters(), lr=0.01)
    other.scheduler = optim.lr_scheduler.CosineAnnealingLR(other.optimizer, 30)
    other.compressor = laconic.Compressor(other.model, other.optimizer, budget=BUDGET, total_steps=30, every=2)
    before = everything(other)
    checkpoints = laconic.RunCheckpoints(tmp_path, other.model, other.compressor, optimizer=other.optimizer, scheduler=other.scheduler)
    with pytest.raises(laconic.CheckpointError, match=r"step-00000020: the part optimizer was of the class AdamW, is of SGD: resume"):
        checkpoints.resume()
    assert_same(everything(other), before)


@pytest.mark.parametrize("at", [1, 20])
def test_a_part_that_fails_to_load_is_named_and_nothing_is_half_loaded(tmp_path, at):
    loop = Loop(tmp_path, counted=Counted()).train(0, at)
    loop.checkpoints.save(at)
    torch.manual_seed(99)
    again = Loop(tmp_path, counted=Counted(fails=True))
    before = everything(again)
    with pytest.raises(laconic.CheckpointError, match=r"does not fit the part counted \(Counted\): KeyError: 'mean'") as caught:
        again.checkpoints.resume()
    assert "\n" not in str(caught.value)
    assert_same(everything(again), before)
    again.checkpoints.parts["counted"].fails = False
    assert again.checkpoints.resume()[0] == at
    assert_same(again.train(at, at + 2).state(), loop.train(at, at + 2).state())


def test_neurons_that_were_taken_out_are_put_back_where_a_part_fails(tmp_path):
    def run(fails: bool) -> tuple:
        torch.manual_seed(0)
        model = cnn()
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        options = {"budget": BUDGET, "total_steps": 30, "every": 2, "example_inputs": (torch.zeros(2, 3, 8, 8),)}
        compressor = laconic.Compressor(model, optimizer, **options)
        counted = Counted(fails)
        return model, optimizer, compressor, laconic.RunCheckpoints(tmp_path, model, compressor, optimizer=optimizer, counted=counted)

    model, optimizer, compressor, checkpoints = run(fails=False)
    for t in range(20):
        backward(model, t)
        optimizer.step()
        model.zero_grad()
    assert compressor.state.cuts.kept
    checkpoints.save(20)
    *fresh, again = run(fails=True)
    before, plan = snapshot(*fresh), str(fresh[2].plan)
    with pytest.raises(laconic.CheckpointError, match="does not fit the part counted"):
        again.resume()
    assert_same(snapshot(*fresh), before)
    assert str(fresh[2].plan) == plan
    again.parts["counted"].fails = False
    assert again.resume()[0] == 20
    assert_same(snapshot(*fresh), snapshot(model, optimizer, compressor))


def test_without_a_compressor_nothing_is_half_loaded_either(tmp_path):
    model = nn.Linear(2, 2)
    laconic.RunCheckpoints(tmp_path, model, average=nn.Linear(2, 2), counted=Counted()).save(1)
    other, average = nn.Linear(2, 2), nn.Linear(2, 2)
    before = snapshot(other, average)
    with pytest.raises(laconic.CheckpointError, match="does not fit the part counted"):
        laconic.RunCheckpoints(tmp_path, other, average=average, counted=Counted(fails=True)).resume()
    assert_same(snapshot(other, average), before)
    with pytest.raises(laconic.CheckpointError, match="does not fit the model"):
        laconic.RunCheckpoints(tmp_path, nn.Linear(3, 2), average=average, counted=Counted()).resume()
    assert_same(snapshot(average), before[1:])


# ---- the command line -----------------------------------------------------------------------------------------------

RECIPE = 'task = "digits"\nwidths = [8, 16, 16]\npools = [0, 1]\nepochs = 3\nlr = 3e-3\nparams = 0.4\n'


def arguments_for(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["train", str(recipe), "--threads", "1", "--no-times", "--json", "--checkpoint-every", "3", "--out", str(out), *more]


def outcome(out: Path) -> list:
    folder = out / "tiny" / "laconic-seed0"
    result = json.loads((folder / "result.json").read_text())
    tensors = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in sorted(read_tensors(folder / "model").items())}
    return [tensors, result["history"], {k: v for k, v in result["curve"].items() if k != "seconds"}]


@pytest.mark.slow
def test_a_killed_run_resumes_from_the_command_line(tmp_path, capsys):
    from laconic.cli import main

    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    main(arguments_for(recipe, tmp_path / "whole"))
    running_folder = tmp_path / "killed" / "tiny" / "laconic-seed0" / "running"
    for more, seen in (((), 12), (("--resume",), 45)):  # killed twice: in the warm-up of the run, and after the cut
        command = [sys.executable, "-m", "laconic", *arguments_for(recipe, tmp_path / "killed", *more)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not any(int(p.name[5:]) >= seen for p in running_folder.glob("step-*")):
            assert child.poll() is None
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    capsys.readouterr()
    main(arguments_for(recipe, tmp_path / "killed", "--resume"))
    assert "starting from the beginning" not in capsys.readouterr().err
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
    with pytest.raises(SystemExit) as stopped:
        main([*arguments[:-1], "lc", "--resume"])
    assert stopped.value.code == 2
    assert "the method lc writes no running checkpoints" in " ".join(capsys.readouterr().err.split())
    main([*arguments[:-1], "lc"])
    assert (tmp_path / "tiny" / "lc-seed0" / "result.json").exists()


def test_another_run_that_clears_the_directory_is_said(tmp_path, monkeypatch):
    """Two runs of one name at once: the second removes what the first has just written."""
    model = nn.Linear(3, 3)
    mine, other = (laconic.RunCheckpoints(tmp_path, model) for _ in range(2))
    mine.save(1)
    steps, cleared = mine.steps, []

    def race():
        if not cleared and (tmp_path / "step-00000002").exists():
            cleared.append(True)
            other.clear()
        return steps()

    monkeypatch.setattr(mine, "steps", race)
    with pytest.raises(laconic.errors.CheckpointError, match=r"step-00000002 is gone as soon as it was written: does another run write to"):
        mine.save(2)
