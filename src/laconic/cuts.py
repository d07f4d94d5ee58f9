"""What all cuts have in common: the record of what they did, all or nothing, and what the model puts out before and after."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .allocate import Floats
from .errors import SurgeryError, first_line
from .graph import gap, outputs
from .plan import Plan
from .structures import Site


@dataclasses.dataclass(slots=True)
class CutResult:
    """What the cuts of a run did so far, by site name.

    Attributes:
        ranks: of the sites that were cut.
        values: singular values just before a site's last cut; of sites that stayed dense, where known.
        energies: share of the squared singular values that a site's cuts have kept, multiplied up.
        errors: largest `surgery_error` of a site's cuts.
        timings: (dense ms, cut ms), where measured.
        max_abs_diff: largest change of an output by a single round of cuts; None without example inputs, or where outputs cannot be compared.
        kept: units that are left, by their numbers in the dense model, of the groups that lost some.
        shares: what the consumers still receive of such a group, multiplied up.
        prices: of sites and groups, see `laconic.walk.Walk.prices`, when the structure became final.
    """

    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    values: dict[str, Floats] = dataclasses.field(default_factory=dict)
    energies: dict[str, float] = dataclasses.field(default_factory=dict)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    timings: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    max_abs_diff: float | None = None
    kept: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    prices: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, later: CutResult) -> None:
        """Take in the next round of cuts."""
        for name, energy in later.energies.items():
            self.energies[name] = self.energies.get(name, 1.0) * energy
        for name, error in later.errors.items():
            self.errors[name] = max(self.errors.get(name, 0.0), error)
        for name, share in later.shares.items():
            self.shares[name] = self.shares.get(name, 1.0) * share
        self.kept |= later.kept
        self.prices |= later.prices
        self.ranks |= later.ranks
        self.values |= {name: v for name, v in later.values.items() if name in later.ranks or name not in self.ranks}
        self.timings |= later.timings
        self.notes += [note for note in later.notes if note not in self.notes]
        if later.max_abs_diff is not None:
            self.max_abs_diff = max(later.max_abs_diff, self.max_abs_diff or 0.0)


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, plan: Plan | None, optimizers: Sequence[Any] = ()) -> Iterator[None]:
    """On an error inside, model, plan and optimizers are as they were: the same objects with the same values."""
    modules = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in model.modules()]
    values = [(x, x.detach().clone()) for x in (*model.parameters(), *model.buffers()) if not _expanded(x)]
    planned: list[Any] = [plan, *plan.sites, *plan.inner, *plan.layers, *plan.neurons] if plan is not None else []
    attributes_of = [(x, {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}) for x in planned]
    gradients = [(p, p.grad) for p in model.parameters()]
    lists = [[{key: list(x) for key, x in g.items() if isinstance(x, list)} for g in o.param_groups] for o in optimizers]
    states = [{p: (entries, dict(entries)) for p, entries in getattr(o, "state", {}).items()} for o in optimizers]
    try:
        yield
    except BaseException:
        for module, attributes, parameters, buffers, children in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes | {"_parameters": parameters, "_buffers": buffers, "_modules": children})
        with torch.no_grad():
            for tensor, value in values:
                if tensor.dtype == value.dtype:
                    tensor.copy_(value)
                else:
                    tensor.data = value
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for x, of_x in attributes_of:
            for name, value in of_x.items():
                setattr(x, name, value)
        for optimizer, groups, state in zip(optimizers, lists, states, strict=True):
            for group, before in zip(optimizer.param_groups, groups, strict=True):  # parameters, and their names where it has them
                for key, content_before in before.items():
                    group[key][:] = content_before
            if hasattr(optimizer, "state"):
                optimizer.state.clear()
                for parameter, (entries, content) in state.items():  # cuts take entries out of them one by one
                    entries.clear()
                    entries.update(content)
                    optimizer.state[parameter] = entries
        raise


def _expanded(tensor: Tensor) -> bool:
    """One place in memory for several entries: PyTorch refuses to write there, so that it needs no copy, and would not take one back."""
    return tensor.layout == torch.strided and any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A Ctrl-C inside is heard at the end: in between, the model may have new layers and the optimizers still the old ones. A second one is heard at once."""
    heard = signal.getsignal(signal.SIGINT)
    if not callable(heard) or threading.current_thread() is not threading.main_thread():  # not ours to replace
        yield
        return
    pressed: list[int] = []

    def wait(number: int, frame: Any) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            heard(number, frame)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heard)
        if len(pressed) == 1:
            signal.raise_signal(signal.SIGINT)


def check_in_place(model: nn.Module, site: Site) -> None:
    """A layer that the user has replaced or removed in mid-run must not be overwritten."""
    for module, paths in zip(site.modules, site.paths, strict=True):
        for path in paths:
            try:
                same = model.get_submodule(path) is module
            except AttributeError:
                same = False
            if not same:
                raise SurgeryError(
                    f"{path} is no longer the layer that was planned (replaced or removed since): build a new Compressor after changing the model"
                )


def hooks_lost(names: Sequence[str]) -> list[str]:
    """What to say, at once and in the report, of hooks that go with what is cut. Those that were there before are known to the plan."""
    if not names:
        return []
    note = (
        f"{', '.join(names)}: hooks that were put there after the Compressor was built are gone with the weight that was cut: "
        "put them there before, and the layer stays as it is, or once the structure is final"
    )
    warnings.warn(f"laconic: {note}", stacklevel=2)
    return [note]


def outputs_uncut(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Before anything is changed.

    Raises:
        SurgeryError: the model ran on the example inputs when it was planned, and does not any more.
    """
    try:
        return outputs(model, inputs)
    except Exception as error:
        raise SurgeryError(
            f"the model no longer runs on the example inputs ({type(error).__name__}: {first_line(error)}); it was left as it was; "
            "build the Compressor after .to(), .half() and the like"
        ) from error


NOTHING_TO_COMPARE = "the outputs before and after a cut were not compared: no tensor was found in what the model returns"
OTHER_SHAPES = (
    "the outputs before and after a cut could not be compared: how many there are, or their shapes, depend on the numbers in them"
)


def largest_difference(before: list[Tensor], after: list[Tensor]) -> tuple[float | None, list[str]]:
    """Of the outputs; None, and what to say of that, where they cannot be compared."""
    if not before and not after:
        return None, [NOTHING_TO_COMPARE]
    if [x.shape for x in before] != [x.shape for x in after]:  # a detector finds other boxes
        return None, [OTHER_SHAPES]
    return max(map(gap, before, after)), []
