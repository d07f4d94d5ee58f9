"""Save and load a compact model: `model.safetensors` + `laconic.json`, atomic, hashed, no pickle.

The JSON is enough to rebuild the model with torch and safetensors alone (see docs/rebuild.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _version
from .checks import check_module
from .cuts import all_or_nothing
from .distributed import bare
from .errors import ArchitectureMismatchError, CheckpointError, CheckpointNotFoundError, InvalidValueError, first_line, one_line
from .measure import count_params
from .plain import plain_json
from .report import CompactReport
from .surgery.record import Cut, Slim, find_cuts, find_slims, replay, replay_slims

FORMATS = (1, 2)  # 2: layers have lost channels; a model without such layers is still written as 1
TENSORS, RECORD = "model.safetensors", "laconic.json"
METADATA = "laconic_record_sha256"
WRAPPERS = ("module.", "_orig_mod.", "module.")  # of DistributedDataParallel and torch.compile, whichever is outside


def save(model: nn.Module, directory: str | os.PathLike[str], report: CompactReport | dict[str, Any] | None = None) -> Path:
    """Write a model to a directory, whole or not at all.

    Everything goes to a new directory beside it, is flushed to disk, and then takes the name; an earlier saved model of
    that name is replaced, any other content is not. Of a link to a saved model the link alone is.

    Args:
        model: compacted or not; unwrapped from DistributedDataParallel / DataParallel, from what `torch.compile` returned, and from `AveragedModel`.
        directory: created; parents too.
        report: what `compact()` returned, or a dict of plain data of your own; kept under `"report"` in the JSON.

    Raises:
        CheckpointError: the path holds something that is not a saved model, or cannot be written to; or the model holds state that is not tensors.
        InvalidTypeError: no model; a report that JSON cannot hold.
        InvalidValueError: the report of another model, by the number of parameters.
    """
    check_module(model)
    model = bare(model.module if isinstance(model, AveragedModel) else model)
    if isinstance(report, CompactReport) and report.params_after != (here := count_params(model)):
        raise InvalidValueError(
            f"report: it is of a model that has {report.params_after} parameters, this {type(model).__name__} has {here}: pass what compact() or compress() returned for this very model"
        )
    told = report.to_json() if isinstance(report, CompactReport) else None if report is None else plain_json(report, "report")
    target = Path(directory)
    check_target(target)
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} in the model's state is a {type(value).__name__}, not a tensor: it cannot be saved without pickle"
            )
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device, without numbers: load the model's weights before it is saved")
        if is_traceable_wrapper_subclass(value):
            raise CheckpointError(
                f"{name} is a {type(value).__name__}, which safetensors cannot hold: save the model before it is quantized or sharded, and do that again after loading"
            )
    tensors, aliases = _separate_ties(state)
    record = {
        "cuts": [cut.to_json() for cut in find_cuts(model)],
        **({"slims": slims} if (slims := [slim.to_json() for slim in find_slims(model)]) else {}),
        "aliases": aliases,
        "tensors": {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in tensors.items()},
    }
    record_hash = _record_hash(record)
    payload = save_tensors(tensors, metadata={"format": "pt", METADATA: record_hash})
    manifest = {
        "format": 2 if slims else 1,
        "laconic": _version.__version__,
        "torch": torch.__version__,
        "model": type(model).__name__,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "record_sha256": record_hash,
        **record,
    } | ({"report": told} if told is not None else {})
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        write_file(fresh / TENSORS, payload)
        write_file(fresh / RECORD, json.dumps(manifest, indent=1).encode())
        sync_directory(fresh)
        _take_name(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target


@torch.inference_mode(False)  # under which new parameters could not be trained
def load(directory: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Load a saved model into a fresh dense model of the same class: its layers are made slim and cut as they were saved,
    then the values loaded.

    Args:
        directory: what `save` wrote.
        model: as the class builds it, wrapped (DistributedDataParallel, `torch.compile`) or not. Changed in place and returned as it was given; on any error it is
            as it was.

    Raises:
        CheckpointNotFoundError: the directory or one of its files is missing.
        CheckpointError: a file was cut short or altered, or has another format.
        ArchitectureMismatchError: the model is not of the architecture that was saved; names what differs.
        InvalidTypeError: no model, or the class in place of an instance.
    """
    check_module(model)
    given, model = model, bare(model)
    source = _find(Path(directory))
    manifest, tensors = _read(source)
    with all_or_nothing(model, None):
        replay_slims(model, [Slim.from_json(s) for s in manifest.get("slims", [])])
        replay(model, [Cut.from_json(c) for c in manifest["cuts"]])
        _check_fit(model, tensors)
        _check_ties(model, tensors)
        _tie(model, manifest["aliases"])
        with torch.no_grad():
            for name, here in model.state_dict(keep_vars=True).items():
                if here.dtype != tensors[name].dtype:
                    here.data = here.data.to(tensors[name].dtype)
        try:
            model.load_state_dict(tensors)
        except Exception as error:  # a module's own code, or a buffer that nothing can be written into
            raise CheckpointError(f"{source} could not be loaded into this {type(model).__name__}: {one_line(error)}") from error
    return given


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The values of a saved model by name, tied ones under each of their names; checked as `load` does.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `load`.
    """
    return _read(_find(directory))[1]


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    manifest, payload = read_manifest(source), (source / TENSORS).read_bytes()
    if hashlib.sha256(payload).hexdigest() != manifest["sha256"]:
        raise CheckpointError(f"{source / TENSORS} was cut short or altered (its hash is not the one in {RECORD}): save the model again")
    try:
        with safe_open(source / TENSORS, framework="pt") as file:
            recorded = (file.metadata() or {}).get(METADATA)
        tensors = load_tensors(payload)
    except SafetensorError as error:
        raise CheckpointError(f"{source / TENSORS} cannot be read: {error}") from None
    if recorded != manifest["record_sha256"]:
        raise CheckpointError(f"{source / RECORD} was cut short or altered ({TENSORS} belongs to another record): save the model again")
    tensors |= {alias: tensors[name] for alias, name in manifest["aliases"].items()}
    return manifest, tensors


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a state dict (a .safetensors or .pt file; of the model itself, or compiled, or under DistributedDataParallel) or a saved model (a directory);
    no pickle beyond `weights_only`.

    Raises:
        CheckpointNotFoundError: nothing there. CheckpointError: damaged, or does not fit the model.
    """
    if path.is_dir():
        return load(path, model)
    state = read_weights(path)
    own = model.state_dict(keep_vars=True)
    for prefix in WRAPPERS:
        if not any(name.startswith(prefix) for name in own):
            consume_prefix_in_state_dict_if_present(state, prefix)
    for name, x in own.items():  # safetensors writes a tied weight under one of its names
        if name not in state and (given := next((n for n, y in own.items() if y is x and n in state), None)):
            state[name] = state[given]
    try:
        model.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(f"{path} does not fit the model: {_misfit(own, state) or first_line(error)}") from None
    return model


def _misfit(own: dict[str, Any], given: dict[str, Any]) -> str:
    """What of a state dict is not the model's own: counted, with a few names."""
    missing, unknown = [name for name in own if name not in given], [name for name in given if name not in own]
    wrong = [name for name, x in own.items() if name in given and getattr(given[name], "shape", None) != getattr(x, "shape", None)]
    kinds = (("missing", missing), ("not in the model", unknown), ("of another shape", wrong))
    return "; ".join(f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}" for what, names in kinds if names)


def read_weights(path: Path) -> dict[str, Any]:
    """The state dict in a .safetensors or .pt file.

    Raises:
        CheckpointNotFoundError, CheckpointError: there is none.
    """
    expected = "expected a .safetensors or .pt file with the model's state_dict, or a saved model"
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} does not exist: {expected}")
    try:
        state = (
            load_tensors(path.read_bytes()) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors (a whole model?), which could run code and is not loaded: save model.state_dict(), and pass that"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {first_line(error)}): {expected}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}: {expected}")
    if nested := [key for key, value in state.items() if isinstance(value, dict)]:
        raise CheckpointError(
            f"{path} holds {', '.join(map(repr, state))}, not the tensors themselves: save one of them alone, such as torch.load(...)[{nested[0]!r}]"
        )
    return state


def read_manifest(directory: Path) -> dict[str, Any]:
    """The checked content of `laconic.json`."""
    for name in (RECORD, TENSORS):
        if not (directory / name).exists():
            raise CheckpointNotFoundError(f"{directory / name} is missing: {directory} is not a whole saved model")
    try:
        manifest = json.loads((directory / RECORD).read_text())
        version = manifest["format"]
        if version not in FORMATS:
            raise CheckpointError(
                f"{directory / RECORD} has format {version!r}; this laconic reads {' and '.join(map(str, FORMATS))}: install the version that wrote it ({manifest.get('laconic')})"
            )
        whole = "sha256" in manifest and _record_hash(manifest) == manifest["record_sha256"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{directory / RECORD} was cut short or altered: save the model again")
    return dict(manifest)


def _record_hash(manifest: dict[str, Any]) -> str:
    """Of all that loading depends on: an edit of it is noticed."""
    record = {key: manifest[key] for key in ("cuts", "aliases", "tensors")} | {key: manifest[key] for key in ("slims",) if key in manifest}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _find(directory: Path) -> Path:
    if directory.is_dir():
        return directory
    aside = _aside(directory)
    if aside.is_dir():  # a save was interrupted between its two renames
        warnings.warn(f"{directory} is missing, probably a save was interrupted; loading the model before it from {aside}", stacklevel=3)
        return aside
    raise CheckpointNotFoundError(f"{directory} does not exist or is not a directory: expected one that laconic.save wrote")


def _separate_ties(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each distinct tensor once, and the other names of those that several names share."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride()))
        if value.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            # A copy of its own: a view of a larger storage would otherwise be refused, or saved whole.
            tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def _check_fit(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    here = model.state_dict()
    missing, extra = sorted(here.keys() - tensors.keys()), sorted(tensors.keys() - here.keys())
    shapes = [
        f"{n} is {tuple(tensors[n].shape)} saved, {tuple(here[n].shape)} here"
        for n in here.keys() & tensors.keys()
        if here[n].shape != tensors[n].shape
    ]
    parts = [
        f"{what}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
        for what, names in (("missing in the file", missing), ("only in the file", extra), ("other shapes", sorted(shapes)))
        if names
    ]
    if parts:
        raise ArchitectureMismatchError(f"the saved model does not fit this {type(model).__name__}; {'; '.join(parts)}")


def _check_ties(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Of names that are one tensor here, the last one's values would be everyone's."""
    first: dict[int, str] = {}
    for name, here in model.state_dict(keep_vars=True).items():
        other = first.setdefault(id(here), name)
        one, two = tensors[other], tensors[name]
        if one is not two and not (one.dtype == two.dtype and torch.equal(one, two)):
            raise ArchitectureMismatchError(
                f"the saved model does not fit this {type(model).__name__}; {other} and {name} are one tensor here and two in the file: "
                f"give {name} a parameter of its own before loading"
            )


def _tie(model: nn.Module, aliases: dict[str, str]) -> None:
    """Tie again what was tied: a replayed cut gives each module factors of its own."""
    for alias, name in aliases.items():
        (path, _, key), (other, _, source) = alias.rpartition("."), name.rpartition(".")
        parameters, origin = model.get_submodule(path)._parameters, model.get_submodule(other)._parameters
        if key in parameters and source in origin:
            parameters[key] = origin[source]


def check_target(target: Path) -> None:
    """A model can be saved under this name, as far as can be told before.

    Raises:
        CheckpointError: something else is there, or nothing can be written beside it.
    """
    here = Path.cwd()
    if target.resolve() in (here, *here.parents):  # it would be moved aside, with us in it
        raise CheckpointError(f"{target} is the working directory, or above it: nothing was written; give one within it, such as 'compact'")
    if target.exists() and not (target.is_dir() and ((target / RECORD).exists() or not any(target.iterdir()))):
        raise CheckpointError(f"{target} exists and is not a saved model: nothing was written; choose another directory")
    check_place(target, beside=True)


def check_place(path: Path, beside: bool = False) -> None:
    """A file or a directory of this name can be written, as far as can be told before.

    Args:
        beside: it is made under another name there first.

    Raises:
        CheckpointError: it is there and may not be written to; or the nearest thing above it that exists may not, or is no directory.
    """
    path = path.absolute()
    there = next(place for place in (path, *path.parents)[beside:] if place.exists())
    if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
        reason = "may not be written to" if there == path or there.is_dir() else "is not a directory"
        raise CheckpointError(f"{path} cannot be written: {there} {reason}; choose another place")


def write_file(path: Path, payload: bytes) -> None:
    with open(path, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _take_name(fresh: Path, target: Path) -> None:
    """Rename into place. An old model steps aside first and goes last, so that at every moment one whole model is there."""
    os.chmod(fresh, 0o755)
    aside = _aside(target)
    if os.path.lexists(target):
        _remove(aside)
        os.rename(target, aside)
    os.rename(fresh, target)
    sync_directory(target.parent)
    _remove(aside)


def _remove(aside: Path) -> None:
    """A directory, or a link alone: what it points to stays."""
    if aside.is_symlink():
        aside.unlink()
    else:
        shutil.rmtree(aside, ignore_errors=True)
