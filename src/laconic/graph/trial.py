"""Are the groups right? The model without some units against the model in which nothing reads them, on a copy."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import first_line
from ..matricize import Layer, by_inputs, by_outputs
from ..measure import OneDtype, as_it_was, call, cast, seeded
from ..surgery.basis import positions
from ..surgery.channels import Count, Group, channels_kept, is_layer_norm, per_channel, slim, slimmed, units_kept
from ..surgery.factorize import plain_layers
from .labels import leaves

TOLERANCE = 1e-5  # of the largest output
DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.alpha_dropout, torch.feature_alpha_dropout,
}  # fmt: skip
Kept = dict[str, list[int]]
Draw = Callable[[int, np.random.Generator], list[int]]
Distance = Callable[[Sequence[Tensor], Sequence[Tensor]], float]


def tried(model: nn.Module, groups: Sequence[Group], inputs: Sequence[Any]) -> tuple[list[Group], dict[str, str]]:
    """The groups whose removal changes nothing but what it should; why the others fail."""
    if not groups:
        return [], {}
    try:
        trial = Trial(model, inputs)
    except Exception as error:
        return [], {end.path: f"the trial failed ({line(error)})" for group in groups for end in group.producers}
    good, failed = settled(trial, groups)
    return good, {end.path: failed[group.name] for group in groups if group.name in failed for end in group.producers}


def settled(trial: Trial, groups: Sequence[Group]) -> tuple[list[Group], dict[str, str]]:
    """The groups that pass, all together; why the others fail, by their names."""
    good, failed = list(groups), dict[str, str]()
    for check, repair in ((trial.evaluated, trial.with_counts), (trial.trained, None)):
        if not good:
            continue
        good, more, together = _passing(check, good, repair)
        failed |= more
        if not together and (why := check(good)) is not None:
            failed |= dict.fromkeys((group.name for group in good), f"all groups together: {why}")
            good = []
    return good, failed


def _passing(
    check: Callable[[Sequence[Group]], str | None],
    groups: Sequence[Group],
    repair: Callable[[Sequence[Group]], list[Group] | None] | None,
) -> tuple[list[Group], dict[str, str], bool]:
    """Those that pass, by halves: one bad group does not cost one trial for each good one. And why the others fail, and whether those
    that pass have passed together."""
    if (why := check(groups)) is None:
        return list(groups), {}, True
    repaired = repair(groups) if repair is not None else None
    if repaired is not None:
        return repaired, {}, True
    if len(groups) == 1:
        return [], {groups[0].name: why}, True
    half = len(groups) // 2
    first, failed, one = _passing(check, groups[:half], repair)
    second, more, other = _passing(check, groups[half:], repair)
    return first + second, failed | more, one and other and not (first and second)


class Trial:
    """Outputs of copies of a model without some units, against those of the whole model in which nothing reads them.

    The parameters of the copies are shaken: a zero that the initialisation has put somewhere must not hide a mistake.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any]):
        self.model, self.inputs = model, list(inputs)
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
        self.dtypes = (torch.float32, torch.float64) if half else (None, torch.float64)
        twin = copy.deepcopy(model).eval()
        _shake(twin)
        self.twin = copy.deepcopy(model).eval()
        unshaken, shaken = (self._run(m, self.dtypes[0], inputs) for m in (self.twin, twin))
        if not unshaken:
            raise ValueError("its outputs hold no floating tensor")
        if not any(bool(torch.isfinite(y).any()) for y in unshaken):
            raise ValueError("its outputs hold no finite number")
        if [y.isfinite().sum() for y in shaken] == [y.isfinite().sum() for y in unshaken]:  # some may be masked, with -inf
            self.twin = twin
        self.helped: dict[tuple[str, ...], None] = {}
        self.training = next((x for x in (self.inputs, _twice(self.inputs)) if self._trains(copy.deepcopy(model), x) is None), None)

    def evaluated(self, groups: Sequence[Group]) -> str | None:
        """Why these groups, together, cannot be removed; None if they can."""
        return self._compared(groups, self.inputs, (_some, _all_but_the_first, _all_but_one), _distance)

    def trained(self, groups: Sequence[Group]) -> str | None:
        """The same in train mode, where other code may run, and backward, too."""
        inputs = self.training
        if inputs is None:
            return None
        generator = np.random.default_rng(0)
        small = copy.deepcopy(self.model)
        slim(small, groups, {group.name: _some(group.units, generator) for group in groups})
        if (why := self._trains(small, inputs)) is not None:
            return why
        self.twin.train()
        try:
            with NoDropout():  # which draws other numbers for fewer units
                once, again = (self._run(self.twin, self.dtypes[0], inputs, seed) for seed in (0, 1))
                random = _distance(once, again) > 0
                return self._compared(groups, inputs, (_some, _all_but_one), _other_shapes if random else _distance, " in training")
        finally:
            self.twin.eval()

    def _compared(
        self, groups: Sequence[Group], inputs: Sequence[Any], draws: Sequence[Draw], distance: Distance, when: str = ""
    ) -> str | None:
        """Why these groups, together, cannot be removed; None if they can."""
        generator = np.random.default_rng(0)
        for draw in draws:
            kept = {group.name: draw(group.units, generator) for group in groups}
            for dtype in self.dtypes:  # a second time with more digits, where rounding may be the reason
                twin = self._twin(dtype)
                try:
                    with slimmed(twin, groups, kept):
                        got = self._run(twin, dtype, inputs)
                except Exception as error:
                    return f"the model does not run{when} without some of its units ({line(error)})"
                with unread(twin, groups, kept):
                    wanted = self._run(twin, dtype, inputs)
                off = distance(wanted, got)
                if off <= TOLERANCE or off > 0.1:
                    break
            if off > TOLERANCE:
                return f"without some of its units the outputs{when} are off by {off:.1g} of the largest"
        return None

    def changed(self, change: Callable[[nn.Module], Any], first: Callable[[nn.Module], Any] = lambda _: None) -> bool:
        """Does a change in place of a copy's weights show in the outputs? After another one, made `first`."""
        for dtype in self.dtypes:
            before = copy.deepcopy(self._twin(dtype))
            first(before)
            twin = copy.deepcopy(before)
            change(twin)
            off = _distance(self._run(before, dtype, self.inputs), self._run(twin, dtype, self.inputs))
            if off <= TOLERANCE or off > 0.1:
                break
        return off > TOLERANCE

    def _twin(self, dtype: torch.dtype | None) -> nn.Module:
        """What is written into its weights is not rounded to 16 bits."""
        return self.twin if dtype is None else copy.deepcopy(self.twin).to(dtype)

    def with_counts(self, groups: Sequence[Group]) -> list[Group] | None:
        """One group with the numbers in its parents that must shrink with it, if there are some that make it pass; several
        with those of the names that helped before."""
        if len(groups) > 1:
            if not self.helped and (one := next(filter(_in_bundles, groups), None)) is not None and self.evaluated([one]) is not None:
                self.with_counts([one])  # a network of like blocks: what helps one may help all, without halving down to each
            repaired = [self._as_before(group) for group in groups]
            shared = [(count.path, count.name) for group in repaired for count in group.counts]
            if len(set(shared)) < len(shared):  # one number cannot follow two groups
                return None
            return repaired if repaired != list(groups) and self.evaluated(repaired) is None else None
        for counts in _candidates(self.model, groups[0]):
            repaired = [dataclasses.replace(groups[0], counts=counts)]
            if self.evaluated(repaired) is None:
                self.helped = dict.fromkeys([tuple(count.name for count in counts), *self.helped])
                return repaired
        return None

    def _as_before(self, group: Group) -> Group:
        for counts in _candidates(self.model, group) if _in_bundles(group) else ():
            if tuple(count.name for count in counts) in self.helped:
                return dataclasses.replace(group, counts=counts)
        return group

    def _run(self, model: nn.Module, dtype: torch.dtype | None, inputs: Sequence[Any], seed: int = 0) -> list[Tensor]:
        if dtype is not None:
            model = copy.deepcopy(model).to(dtype)
        one_dtype = OneDtype(dtype) if dtype is not None else contextlib.nullcontext()
        with as_it_was(model), torch.no_grad(), seeded(seed), one_dtype:  # it may count its calls
            outputs = list(leaves(call(model, cast(inputs, dtype) if dtype is not None else inputs)))
        return [y.detach() for y in outputs if y.is_floating_point() and y.numel()]

    def _trains(self, model: nn.Module, inputs: Sequence[Any]) -> str | None:
        try:
            with torch.enable_grad(), seeded(), _native_kernels() if unsafe_convolutions(model) else contextlib.nullcontext():
                outputs = [y for y in leaves(call(model.train(), inputs)) if y.is_floating_point() and y.requires_grad]
                sum(y.float().square().mean() for y in outputs).backward()  # type: ignore[union-attr]
        except Exception as error:
            return f"the model does not train without some of its units ({line(error)})"
        return None


def _in_bundles(group: Group) -> bool:
    """Units of several channels each: heads, of which some module has the number."""
    return group.units < max(end.index.size for end in group.ends)


def unsafe_convolutions(model: nn.Module) -> list[str]:
    """Strided 1x1 convolutions with fewer than eight inputs, in a model in channels_last on the CPU: oneDNN's backward pass
    writes past the end of its workspace there (its issue 6035: a crash, a hang, or wrong gradients, by the processor).
    """
    convs = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.weight.device.type == "cpu"}
    if all(m.weight.is_contiguous() for m in convs.values()):
        return []
    return [path for path, m in convs.items() if m.in_channels < 8 and m.groups == 1 and m.kernel_size == (1, 1) and max(m.stride) > 1]


@contextlib.contextmanager
def _native_kernels() -> Iterator[None]:
    """Without oneDNN. (PyTorch's own `flags` sets more than this, and warns of it.)"""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def _some(units: int, generator: np.random.Generator) -> list[int]:
    """About half, without the last; of two groups hardly ever as many, or a tie that was not seen would not show."""
    return sorted(generator.permutation(max(units - 1, 1))[: generator.integers(max(units // 3, 1), max(2 * units // 3, 1) + 1)].tolist())


def _all_but_the_first(units: int, generator: np.random.Generator) -> list[int]:
    return list(range(max(units // 3, 1), units))


def _all_but_one(units: int, generator: np.random.Generator) -> list[int]:
    return sorted(generator.permutation(units)[1:].tolist())


def _shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device="cpu").to(like)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                fan = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 1
                parameter.mul_(1 + 0.1 * noise(parameter)).add_(noise(parameter), alpha=0.2 / math.sqrt(max(fan, 1)))
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] == "running_mean":
                buffer.add_(noise(buffer), alpha=0.2)
            elif per_channel(buffer):  # a variance, say
                buffer.mul_(1 + 0.5 * torch.rand(buffer.shape, generator=generator).to(buffer))


@contextlib.contextmanager
def unread(model: nn.Module, groups: Sequence[Group], kept: Kept) -> Iterator[None]:
    """Inside, no consumer reads the units that go: their columns are zero, and LayerNorm has the statistics of the others. Of places within heads
    the products of queries and keys are over those that stay, and divided by the root of *their* number."""
    before: list[tuple[Tensor, Tensor]] = []
    patched: list[nn.Module] = []
    try:
        for group in groups:
            for end in group.carriers:
                norm = model.get_submodule(end.path)
                if is_layer_norm(norm):
                    stay = np.isin(channels_kept(norm, "out"), np.delete(end.index, kept[group.name], axis=0).ravel(), invert=True)
                    vars(norm)["forward"] = functools.partial(_over_some, norm, torch.from_numpy(np.flatnonzero(stay)))
                    patched.append(norm)
        with torch.no_grad():
            for group in groups:
                for end in group.consumers:
                    module: Layer = model.get_submodule(end.path)
                    here = channels_kept(module, "in")
                    module = plain_layers(module)[0]
                    gone = np.delete(end.index, kept[group.name], axis=0).ravel()
                    before.append((module.weight, module.weight.clone()))
                    by_inputs(module)[torch.from_numpy(np.flatnonzero(np.isin(here, gone)))] = 0
                for end in group.queries:
                    module = plain_layers(model.get_submodule(end.path))[-1]
                    before += [(p, p.clone()) for p in module.parameters()]
                    units, left = units_kept(model, group), kept[group.name]
                    factor = torch.from_numpy(np.where(np.isin(units, left), math.sqrt(len(units) / len(left)), 0.0))
                    where = positions(model, group, end)
                    for rows in (by_outputs(module), *(p for name, p in module.named_parameters(recurse=False) if name == "bias")):
                        shape = (-1, *(1,) * rows.ndim)
                        rows[where] *= factor.reshape(shape).to(rows)
        yield
    finally:
        for norm in patched:
            vars(norm).pop("forward", None)
        with torch.no_grad():
            for weight, old in reversed(before):
                weight.copy_(old)


def _over_some(norm: Layer, stay: Tensor, x: Tensor) -> Tensor:
    """LayerNorm over these channels alone; the others are 0."""
    small = copy.deepcopy(norm)
    for name, parameter in norm.named_parameters(recurse=False):
        small._parameters[name] = nn.Parameter(parameter[stay])
    small.normalized_shape = (len(stay),)  # where it has one
    y = type(norm).forward(small, x[..., stay])
    return torch.zeros_like(x, dtype=y.dtype).index_copy(-1, stay.to(x.device), y)


class NoDropout(TorchFunctionMode):
    """Inside, dropout lets everything through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


def _other_shapes(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    return math.inf if [y.shape for y in wanted] != [y.shape for y in got] else 0.0


def _twice(inputs: Sequence[Any]) -> list[Any]:
    """Each example twice: BatchNorm does not train on one."""
    return [torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and x.layout is torch.strided else x for x in inputs]


def _distance(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Largest difference, as a part of the largest output."""
    if [y.shape for y in wanted] != [y.shape for y in got]:
        return math.inf
    return max(gap(a, b) / max(largest(a), 1e-30) for a, b in zip(wanted, got, strict=True))


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors of one shape. Where one is not finite the other must be the same: infinite otherwise."""
    a, b = _wide(a), _wide(b)
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, 0.0, (a - b).abs())
    return float(off.nan_to_num(nan=math.inf, posinf=math.inf).max()) if off.numel() else 0.0


def largest(x: Tensor) -> float:
    """Of the finite numbers in it."""
    sizes = _wide(x).abs()
    return float(torch.where(sizes.isfinite(), sizes, 0.0).max()) if x.numel() else 0.0


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float64))


def _candidates(model: nn.Module, group: Group) -> Iterator[tuple[Count, ...]]:
    """Numbers on the modules above the group's layers that may count its units (`heads`), or their channels; of places within heads, with those by
    which products are multiplied."""
    above = {"", *(end.path for end in group.ends if end.own)} | {
        path.rpartition(".")[0] for end in group.ends for path in _and_above(end.path)
    }
    widths = {group.units * d for end in group.ends for d in range(1, end.index.shape[1] + 1) if end.index.shape[1] % d == 0}
    parent = group.producers[0].path.rpartition(".")[0]
    numbers = [
        Count(path, name, value)
        for path in sorted(above)
        for name, value in vars(model.get_submodule(path)).items()
        if type(value) in (int, float)
    ]
    found = [c for c in numbers if isinstance(c.dense, int) and c.dense in widths]
    if group.queries:  # places within heads, whose number stays
        found = [c for c in found if "head" not in c.name or "size" in c.name or "dim" in c.name]
    heads = tuple(c for c in found if c.dense == group.units)
    named = tuple(c for c in found if "head" in c.name and "dim" not in c.name)
    beside = tuple(c for c in found if c.path == parent)
    inverse = group.units**-0.5 if group.queries else math.nan
    scales = tuple(c for c in numbers if isinstance(c.dense, float) and math.isclose(c.dense, inverse) and "drop" not in c.name)
    near = tuple(c for c in scales if c.path == parent)
    whole = dict.fromkeys(((), heads, named, *((c,) for c in found), beside, tuple(found)))
    yield from (c + of for of in dict.fromkeys(((), near, scales)) for c in whole if c + of)


def _and_above(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:200]
