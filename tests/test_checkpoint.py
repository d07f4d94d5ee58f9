"""Save and load: bit for bit, whole or not at all, no pickle, and every damage is noticed."""

import builtins
import copy
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import laconic
from laconic.checkpoint import load_weights

from .models import Shared, Tied, assert_same, cnn, inputs_for, mlp, snapshot


class WithBuffers(nn.Module):
    """Buffers of several dtypes, one of them not persistent, one a view of a parameter, one empty."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc, self.head = nn.Linear(10, 10), nn.Linear(10, 10)
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("table", torch.randn(6)[::2])
        self.register_buffer("mask", torch.rand(10) > 0.5)
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x) * self.mask) + self.table.sum()


class TiedSlices(nn.Module):
    """Two weights that are views of one storage, and no alias of each other."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        both = torch.randn(20, 10)
        self.one, self.two = nn.Linear(10, 10), nn.Linear(10, 10)
        self.one.weight.data, self.two.weight.data = both[:10], both[10:]

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def seeded(build):
    def make(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return build()

    return make


def trained_norms(seed: int = 0) -> nn.Module:
    model = cnn(seed=seed)
    with torch.no_grad():
        model(inputs_for(model, seed=seed))
    return model


def channels_last(seed: int = 0) -> nn.Module:
    return cnn(seed=seed).to(memory_format=torch.channels_last)


MODELS = {
    "mlp": mlp,
    "network with BatchNorm": trained_norms,
    "two tied linears": seeded(Tied),
    "shared module": seeded(Shared),
    "bfloat16": lambda seed=0: mlp(torch.bfloat16, seed),
    "buffers": WithBuffers,
    "views of one storage": TiedSlices,
    "channels last": channels_last,
}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def saved(tmp_path: Path, model: nn.Module, cuts: int = 1) -> Path:
    for _ in range(cuts):
        laconic.compress(model, energy=0.6)
    return laconic.save(model.eval(), tmp_path / "compact")


def test_a_report_is_kept_as_it_is_or_refused_before_anything_is_written(tmp_path):
    model = mlp()
    report = laconic.compress(model, budget=laconic.Budget(params=0.5))
    saved = [laconic.save(model, tmp_path / str(i), report=r) for i, r in enumerate((report, report.to_json()))]
    kept = [json.loads((folder / "laconic.json").read_text())["report"] for folder in saved]
    assert laconic.CompactReport.from_json(kept[0]).to_json() == report.to_json()
    assert kept[0] == kept[1]
    with pytest.raises(laconic.InvalidTypeError, match=r"report\['model'\] cannot be written as JSON"):
        laconic.save(model, tmp_path / "other", report={"model": model})
    with pytest.raises(
        laconic.InvalidValueError, match=rf"it is of a model that has {report.params_after} parameters, this Sequential has 247"
    ):
        laconic.save(mlp(), tmp_path / "other", report=report)
    assert not (tmp_path / "other").exists()


@models
@pytest.mark.parametrize("cuts", [0, 1, 2])
def test_a_saved_model_loads_bit_for_bit_into_a_fresh_one(build, cuts, tmp_path):
    model = build()
    directory = saved(tmp_path, model, cuts)
    fresh = build(seed=1).eval()
    assert laconic.load(directory, fresh) is fresh
    assert_same(snapshot(fresh), snapshot(model))
    assert [(n, type(m)) for n, m in fresh.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    x = inputs_for(model)
    assert torch.equal(fresh(x), model(x))
    assert {n for n, _ in fresh.named_parameters()} == {n for n, _ in model.named_parameters()}  # ties and all


def test_ties_are_ties_again(tmp_path):
    fresh = laconic.load(saved(tmp_path, Tied()), Tied())
    assert isinstance(fresh.one, nn.Sequential)
    assert fresh.one[0].weight is fresh.two[0].weight
    assert fresh.one[1].weight is fresh.two[1].weight
    assert fresh.one[1].bias is not fresh.two[1].bias
    shared = laconic.load(laconic.save(seeded(Shared)(), tmp_path / "shared"), Shared())
    assert shared.body is shared.again


def test_a_saved_bfloat16_model_makes_a_float32_one_bfloat16(tmp_path):
    model = mlp(torch.bfloat16)
    fresh = laconic.load(saved(tmp_path, model), mlp(torch.float32, seed=1))
    assert_same(snapshot(fresh), snapshot(model))


def test_the_loaded_model_keeps_its_mode_and_what_is_frozen(tmp_path):
    fresh = mlp(seed=1)
    fresh[0].requires_grad_(False)
    laconic.load(saved(tmp_path, mlp()), fresh)
    assert isinstance(fresh[0], nn.Sequential)
    assert all(m.training for m in fresh.modules())
    assert [p.requires_grad for p in fresh[0].parameters()] == [False] * 3
    assert all(p.requires_grad for p in fresh[2:].parameters())


def test_a_compact_model_that_was_loaded_can_be_compressed_and_saved_again(tmp_path):
    model = laconic.load(saved(tmp_path, mlp()), mlp(seed=1))
    laconic.compress(model, energy=0.6)
    fresh = laconic.load(laconic.save(model, tmp_path / "again"), mlp(seed=2))
    assert_same(snapshot(fresh), snapshot(model))


def test_a_model_wrapped_for_data_parallel_training_is_unwrapped(tmp_path):
    model = mlp()
    fresh = laconic.load(laconic.save(nn.DataParallel(model), tmp_path / "compact"), mlp(seed=1))
    assert_same(snapshot(fresh), snapshot(model))


def test_nothing_is_pickled_in_either_direction(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle")

    model = mlp()
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    directory = laconic.save(model, tmp_path / "compact")
    laconic.load(directory, mlp(seed=1))
    assert sorted(p.name for p in directory.iterdir()) == ["laconic.json", "model.safetensors"]


def test_the_files_say_what_they_hold(tmp_path):
    model = mlp()
    report = laconic.compress(model, energy=0.6)
    directory = laconic.save(model, tmp_path / "a" / "b", report={"accuracy": 0.9})
    manifest = json.loads((directory / "laconic.json").read_text())
    assert manifest["report"] == {"accuracy": 0.9}
    assert {c["names"][0]: c["rank"] for c in manifest["cuts"]} == {x.name: x.rank for x in report.layers if x.rank is not None}
    assert manifest["sha256"] == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata()["laconic_record_sha256"] == manifest["record_sha256"]
        assert {n: list(file.get_slice(n).get_shape()) for n in file.keys()} == {n: t["shape"] for n, t in manifest["tensors"].items()}  # noqa: SIM118


# ---- damage ---------------------------------------------------------------------------------------------------------


def edit_json(change):
    def damage(directory: Path) -> None:
        path = directory / "laconic.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


def forge(manifest: dict) -> None:
    """Another cut, with a hash that fits: the one in the tensors' file still tells."""
    manifest["cuts"].pop()
    record = {key: manifest[key] for key in ("cuts", "aliases", "tensors")}
    manifest["record_sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def cut_short(name: str, share: float):
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * share)])

    return damage


def flip(position: float):
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[int(len(content) * position)] ^= 1
        path.write_bytes(content)

    return damage


DAMAGED = r"cut short or altered"
DAMAGES = {
    "tensors cut short": (cut_short("model.safetensors", 0.7), laconic.CheckpointError, DAMAGED),
    "tensors empty": (cut_short("model.safetensors", 0), laconic.CheckpointError, DAMAGED),
    "a bit of the header": (flip(0.01), laconic.CheckpointError, DAMAGED),
    "a bit of a weight": (flip(0.9), laconic.CheckpointError, DAMAGED),
    "json cut short": (cut_short("laconic.json", 0.7), laconic.CheckpointError, DAMAGED),
    "json empty": (cut_short("laconic.json", 0), laconic.CheckpointError, DAMAGED),
    "json of another kind": (lambda d: (d / "laconic.json").write_text("[1, 2]"), laconic.CheckpointError, DAMAGED),
    "json not text": (lambda d: (d / "laconic.json").write_bytes(b"\xff\xfe\x00"), laconic.CheckpointError, DAMAGED),
    "a rank edited": (edit_json(lambda m: m["cuts"][0].update(rank=1)), laconic.CheckpointError, DAMAGED),
    "a cut removed": (edit_json(lambda m: m["cuts"].pop()), laconic.CheckpointError, DAMAGED),
    "a cut and its hash edited": (edit_json(forge), laconic.CheckpointError, "belongs to another record"),
    "an alias to nowhere": (edit_json(lambda m: m["aliases"].update({"two.0.weight": "nowhere"})), laconic.CheckpointError, DAMAGED),
    "an alias to another weight": (
        edit_json(lambda m: m["aliases"].update({"two.1.weight": "one.0.weight"})),
        laconic.CheckpointError,
        DAMAGED,
    ),
    "an alias removed": (edit_json(lambda m: m["aliases"].clear()), laconic.CheckpointError, DAMAGED),
    "a shape edited": (edit_json(lambda m: m["tensors"]["one.0.weight"].update(shape=[1])), laconic.CheckpointError, DAMAGED),
    "the hash edited": (edit_json(lambda m: m.update(sha256="0" * 64)), laconic.CheckpointError, DAMAGED),
    "a key missing": (edit_json(lambda m: m.pop("cuts")), laconic.CheckpointError, DAMAGED),
    "a future format": (edit_json(lambda m: m.update(format=99)), laconic.CheckpointError, r"has format 99; this laconic reads 1"),
    "tensors missing": (lambda d: (d / "model.safetensors").unlink(), laconic.CheckpointNotFoundError, r"model\.safetensors is missing"),
    "json missing": (lambda d: (d / "laconic.json").unlink(), laconic.CheckpointNotFoundError, r"laconic\.json is missing"),
    "all missing": (shutil.rmtree, laconic.CheckpointNotFoundError, "does not exist or is not a directory"),
    "a file in its place": (
        lambda d: (shutil.rmtree(d), d.write_text("")),
        laconic.CheckpointNotFoundError,
        "does not exist or is not a directory",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_a_clear_error_and_the_model_is_untouched(damage, error, message, tmp_path):
    directory = saved(tmp_path, seeded(Tied)())
    damage(directory)
    model = Tied()
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        laconic.load(directory, model)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert_same(snapshot(model), before)


WRONG = {
    "a layer less": (lambda: mlp()[:3], r"layer '4'|lacks"),
    "a layer of another kind": (lambda: nn.Sequential(nn.Conv1d(6, 12, 1), *mlp()[1:]).double(), r"layer '0': saved from a Linear"),
    "another width": (
        lambda: nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 10), *mlp()[3:]),
        r"layer '0': .*\(12, 6\).*\(11, 6\)",
    ),
    "no such layer": (lambda: nn.ModuleDict({"other": nn.Linear(6, 12)}), r"has a layer '0' \(Linear\), which this model lacks"),
    "a layer more": (lambda: nn.Sequential(*mlp(), nn.Linear(3, 3)), r"missing in the file: 5\.bias, 5\.weight"),
    "a bias less": (lambda: nn.Sequential(*mlp()[:4], nn.Linear(10, 3, bias=False)), r"only in the file: 4\.bias"),
}


@pytest.mark.parametrize(("build", "message"), WRONG.values(), ids=WRONG)
def test_the_wrong_architecture_is_refused_with_the_names_that_differ_and_left_untouched(build, message, tmp_path):
    model = mlp()
    laconic.compress(model, laconic.LowRank(include=("0", "2")), energy=0.6)
    directory = laconic.save(model, tmp_path / "compact")
    other = build()
    modules, before = dict(other.named_modules()), snapshot(other)
    if message.startswith("layer '4'"):
        message = r"only in the file: 4\.bias, 4\.weight"
    with pytest.raises(laconic.ArchitectureMismatchError, match=message):
        laconic.load(directory, other)
    assert dict(other.named_modules()) == modules
    assert_same(snapshot(other), before)


class Expanded(nn.Module):
    """With a buffer that nothing can be written into, and another dtype than the one that was saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(10, 16), nn.Linear(16, 10)
        self.register_buffer("table", torch.zeros(1, 4).long().expand(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_a_model_that_refuses_its_values_is_as_it_was(tmp_path):
    saved = Expanded().double()
    laconic.compress(
        saved,
        structures=[laconic.LowRank(), laconic.Channels()],
        budget=laconic.Budget(params=0.5),
        example_inputs=(torch.ones(2, 10).double(),),
    )
    laconic.save(saved, tmp_path / "model")
    model = Expanded()
    modules, before = dict(model.named_modules()), snapshot(model)
    with pytest.raises(
        laconic.CheckpointError, match=r"model could not be loaded into this Expanded: Error\(s\) in loading .*\"table\""
    ) as caught:
        laconic.load(tmp_path / "model", model)
    assert "\n" not in str(caught.value)
    assert dict(model.named_modules()) == modules
    assert_same(snapshot(model), before)
    assert (model.one.out_features, model.one.weight.dtype) == (16, torch.float32)


def untied() -> Tied:
    """Its two weights have grown apart."""
    model = Tied()
    model.two.weight = nn.Parameter(model.two.weight.detach() + 1)
    return model


def test_two_weights_in_the_file_are_not_poured_into_one(tmp_path):
    model = untied()
    laconic.compress(model, laconic.LowRank(include="one"), energy=0.6)
    path = laconic.save(model, tmp_path / "one-cut")  # and no tie in the way
    assert_same(snapshot(laconic.load(path, Tied())), snapshot(model))

    model, fresh = untied(), Tied()
    laconic.compress(model, laconic.LowRank(include="head"), energy=0.2)
    path, before = laconic.save(model, tmp_path / "untied"), snapshot(fresh)
    with pytest.raises(laconic.ArchitectureMismatchError, match=r"one\.weight and two\.weight are one tensor here and two in the file"):
        laconic.load(path, fresh)
    assert_same(snapshot(fresh), before)
    assert fresh.one.weight is fresh.two.weight
    assert_same(snapshot(laconic.load(path, untied())), snapshot(model))


def test_another_width_of_an_uncut_layer_is_named_with_both_shapes(tmp_path):
    directory = laconic.save(mlp(), tmp_path / "compact")
    other = nn.Sequential(*mlp()[:4], nn.Linear(10, 4).double())
    with pytest.raises(
        laconic.ArchitectureMismatchError, match=r"4\.bias is \(3,\) saved, \(4,\) here, 4\.weight is \(3, 10\) saved, \(4, 10\) here"
    ):
        laconic.load(directory, other)


# ---- whole or not at all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["file", "directory"])
def test_what_is_not_a_saved_model_is_not_overwritten(content, tmp_path):
    target = tmp_path / "mine"
    if content == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / "thesis.txt").write_text("precious")
    with pytest.raises(laconic.CheckpointError, match="is not a saved model: nothing was written"):
        laconic.save(mlp(), target)
    kept = target if content == "file" else target / "thesis.txt"
    assert kept.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_an_empty_directory_and_an_earlier_save_are_replaced(tmp_path):
    target = tmp_path / "compact"
    target.mkdir()
    for seed in (0, 1):
        laconic.save(mlp(seed=seed), target)
        assert_same(snapshot(laconic.load(target, mlp(seed=9))), snapshot(mlp(seed=seed)))
        assert [p.name for p in tmp_path.iterdir()] == ["compact"]


@pytest.mark.parametrize("points_to", ["real", "nowhere"])
def test_a_link_is_replaced_and_not_what_it_points_to(points_to, tmp_path):
    laconic.save(mlp(seed=1), tmp_path / "real")
    (tmp_path / "latest").symlink_to(tmp_path / points_to)
    for seed in (2, 3):
        laconic.save(mlp(seed=seed), tmp_path / "latest")
        assert_same(snapshot(laconic.load(tmp_path / "latest", mlp())), snapshot(mlp(seed=seed)))
    assert_same(snapshot(laconic.load(tmp_path / "real", mlp())), snapshot(mlp(seed=1)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "real"]


@pytest.mark.parametrize("where", [".", "{}", ".."])
def test_the_working_directory_is_not_replaced(where, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(laconic.CheckpointError, match="is the working directory, or above it: nothing was written; give one within it"):
        laconic.save(mlp(), where.format(here))
    assert list(here.iterdir()) == []
    assert here.samefile(".")


def test_state_that_is_not_a_tensor_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(laconic.CheckpointError, match="_extra_state in the model's state is a dict"):
        laconic.save(nn.Sequential(Extra(2, 2)), tmp_path / "compact")
    assert list(tmp_path.iterdir()) == []


class Crash(BaseException):
    """Not an Exception: as a kill would be, nothing may handle it."""


def crashing(function, at: int):
    """The function, failing at its call number `at`."""
    calls = iter(range(1000))

    def wrapper(*args, **kwargs):
        if next(calls) == at:
            raise Crash
        return function(*args, **kwargs)

    return wrapper


CRASHES = [("fsync", at) for at in range(4)] + [("rename", at) for at in range(2)]


@pytest.mark.parametrize("cleanup", [True, False], ids=["exception", "killed"])
@pytest.mark.parametrize(("call", "at"), CRASHES)
def test_a_crash_in_the_middle_of_a_save_leaves_a_whole_model(call, at, cleanup, tmp_path, monkeypatch, recwarn):
    """Killed: not even the clean-up of the save itself runs."""
    target = tmp_path / "compact"
    laconic.save(mlp(seed=0), target)
    monkeypatch.setattr(os, call, crashing(getattr(os, call), at))
    if not cleanup:
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(Crash):
        laconic.save(mlp(seed=1), target)
    monkeypatch.undo()
    between_renames = not target.exists()
    assert between_renames == ((call, at) == ("rename", 1))
    loaded = load_quietly(target)
    new = (call, at) == ("fsync", 3)  # all files were in place, only the last flush was missing
    assert_same(snapshot(loaded), snapshot(mlp(seed=1 if new else 0)))

    laconic.save(mlp(seed=2), target)  # and the next save works
    assert_same(snapshot(laconic.load(target, mlp(seed=9))), snapshot(mlp(seed=2)))


def load_quietly(target: Path) -> nn.Module:
    if target.exists():
        return laconic.load(target, mlp(seed=9))
    with pytest.warns(UserWarning, match="probably a save was interrupted"):
        return laconic.load(target, mlp(seed=9))


def test_everything_is_flushed_before_it_takes_the_name(tmp_path, monkeypatch):
    events = []
    fsync, rename, open_ = os.fsync, os.rename, builtins.open
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("flush " + Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {Path(b).name}"), rename(a, b))[1])
    laconic.save(mlp(), tmp_path / "compact")
    assert builtins.open is open_
    name = events.index("rename compact")
    assert {"flush model.safetensors", "flush laconic.json"} <= set(events[:name])
    assert events[name + 1 :] == [f"flush {tmp_path.name}"]


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = trained_norms()
    twin = copy.deepcopy(model)
    laconic.save(model, tmp_path / "compact")
    assert_same(snapshot(model), snapshot(twin))
    assert all(m.training for m in model.modules())


UNREADABLE = {
    "text.safetensors": (lambda p: p.write_text("hello"), r"cannot be read \(SafetensorError"),
    "text.pt": (lambda p: p.write_text("hello"), "cannot be read .*: expected a .safetensors or .pt file"),
    "empty.pt": (lambda p: p.touch(), r"cannot be read \(EOFError"),
    "whole.pt": (lambda p: torch.save(mlp(), p), "holds more than tensors .*save model.state_dict"),
    "list.pt": (lambda p: torch.save([1, 2], p), "holds a list: expected"),
    "inside.pt": (
        lambda p: torch.save({"epoch": 3, "model": mlp().state_dict()}, p),
        r"holds 'epoch', 'model', .*torch.load\(...\)\['model'\]",
    ),
    "fewer.pt": (
        lambda p: torch.save(dict(list(mlp().state_dict().items())[1:]), p),
        "does not fit the model: missing: 0.weight$",
    ),
    "more.pt": (lambda p: torch.save(mlp().state_dict() | {"other": torch.zeros(1)}, p), "not in the model: other$"),
    "larger.pt": (
        lambda p: torch.save({n: torch.zeros(*x.shape, 2) for n, x in mlp().state_dict().items()}, p),
        "of another shape: 0.weight, 0.bias, 2.weight and 3 more$",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_weights_that_cannot_be_taken_are_told_apart_in_one_line(name, tmp_path):
    write, message = UNREADABLE[name]
    write(tmp_path / name)
    with pytest.raises(laconic.CheckpointError, match=message) as raised:
        load_weights(mlp(), tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_tied_weight_may_be_written_under_one_of_its_names(tmp_path):
    model, other = Tied(), Tied()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    state = model.state_dict(keep_vars=True)
    first = {id(x): name for name, x in reversed(state.items())}
    save_file({name: state[name].detach() for name in first.values()}, tmp_path / "w.safetensors")
    assert len(first) < len(state)
    assert_same(snapshot(load_weights(other, tmp_path / "w.safetensors")), snapshot(model))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_weights_of_a_wrapped_model_are_those_of_the_model(prefix, tmp_path):
    model = mlp(seed=1)
    torch.save({f"{prefix}{name}": x for name, x in model.state_dict().items()}, tmp_path / "w.pt")
    assert_same(snapshot(load_weights(mlp(), tmp_path / "w.pt")), snapshot(model))


def test_a_part_that_is_called_as_a_wrapper_would_call_it_is_left_alone(tmp_path):
    model, other = (nn.ModuleDict({"module": mlp(seed=seed)}) for seed in (1, 2))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert_same(snapshot(load_weights(other, tmp_path / "w.pt")), snapshot(model))


def test_an_averaged_model_is_saved_as_the_average(tmp_path):
    model = mlp()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        model[0].weight.zero_()
    loaded = laconic.load(laconic.save(averaged, tmp_path / "m"), mlp(seed=3))
    assert_same(snapshot(loaded), snapshot(averaged.module))


def test_a_model_that_is_slim_already_is_no_fresh_one(tmp_path):
    def slim_one() -> nn.Module:
        model = mlp()
        laconic.compress(model, laconic.Channels(), laconic.Budget(params=0.5), example_inputs=(inputs_for(model),))
        return model

    model = slim_one()
    laconic.save(model, tmp_path / "m")
    with pytest.raises(laconic.ArchitectureMismatchError, match="it has lost channels already: load needs a fresh dense model"):
        laconic.load(tmp_path / "m", slim_one())


def test_a_model_without_numbers_is_not_saved(tmp_path):
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(laconic.CheckpointError, match=r"0\.weight is on the meta device, without numbers"):
        laconic.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_values_that_are_packed_in_another_tensor_are_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(TwoTensor(torch.zeros(4, 4), torch.zeros(4, 4)))
    with pytest.raises(laconic.CheckpointError, match=r"1.weight is a TwoTensor.*before it is quantized"):
        laconic.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_a_compiled_model_is_cut_saved_and_loaded_as_what_it_wraps(tmp_path):
    def compiled() -> nn.Module:
        return torch.compile(mlp(), backend="eager")

    cut, plain = compiled(), mlp()
    x = inputs_for(plain)
    reports = [laconic.compress(model, budget=laconic.Budget(params=0.6), example_inputs=(x,)) for model in (cut, plain)]
    assert reports[0].to_json() == reports[1].to_json()
    laconic.save(cut, tmp_path / "model")
    given = compiled()
    assert laconic.load(tmp_path / "model", given) is given
    assert_same(given(x), plain(x))
