"""What a model costs: parameters, MACs, latency, memory.

Counting is left to PyTorch (`FlopCounterMode`, `benchmark.Timer`); this module makes the two see everything. Fused
attention is invisible to the counter on CPU, so attention is sent through its mathematical form while counting.
One file, though long: all of it is a forward pass that is looked at, and leaves no trace.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import statistics
import sys
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from .checks import check_module, check_number
from .distributed import bare
from .errors import InvalidTypeError, InvalidValueError, NonFiniteError, first_line
from .matricize import an_input

Inputs = Sequence[Any]

BLOCK = 0.02  # seconds that a model has its turn, where two are timed beside each other
TURNS = 8  # at least, of each
PRECISION = 0.005  # of their ratio
PATIENCE = 2.0  # seconds, after which it is taken as it is


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one forward pass, in milliseconds: median and interquartile range of `blocks` timed blocks."""

    median_ms: float
    spread_ms: float
    blocks: int
    threads: int
    device: str


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One layer that holds parameters itself. `macs` is None where no example inputs were given."""

    name: str
    kind: str
    params: int
    macs: int | None


@dataclass(frozen=True, slots=True)
class Profile:
    """What a model costs on the example inputs it was profiled with (for a batch: the whole batch).

    Attributes:
        params: number of parameters, tied ones once.
        macs: multiply-accumulates of one forward pass, attention included.
        latency_ms: median time of one forward pass in eval mode, without gradients; None if not asked for.
        latency: the same with spread, thread count, device.
        peak_memory: bytes of parameters, buffers and, at the worst moment, activations of one forward pass.
        layers: one entry for each layer with parameters.
    """

    params: int
    macs: int
    latency_ms: float | None
    latency: Latency | None
    peak_memory: int
    layers: tuple[LayerProfile, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_inputs(example_inputs: Any, model: nn.Module, name: str = "example_inputs") -> tuple[Any, ...]:
    """Example inputs as a tuple of positional arguments of the model; a lone tensor is accepted, and a dict of arguments by name, as tokenizers make it.

    Args:
        name: what errors call them.

    Raises:
        InvalidTypeError: something else, or a dict that the model's forward does not take.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, Mapping):
        return _in_order(example_inputs, model, name)
    if not isinstance(example_inputs, (tuple, list)):
        raise InvalidTypeError(
            f"{name} must be a tuple of the model's arguments in the order of its forward, such as (ids, mask), or a dict of them by name, "
            f"got {type(example_inputs).__name__}"
        )
    return tuple(example_inputs)


def _in_order(named: Mapping[str, Any], model: nn.Module, what: str) -> tuple[Any, ...]:
    """Arguments by name as positional ones, with the defaults of those that are left out up to the last that is given."""
    signature = inspect.signature(bare(model).forward)
    kinds = {name: p.kind for name, p in signature.parameters.items()}
    by_order = [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    forward = f"{type(bare(model)).__name__}.forward"
    if strange := [str(name) for name in named if name not in by_order]:
        raise InvalidTypeError(
            f"{what}: {', '.join(strange)}: not among the arguments that {forward} takes in order: {', '.join(by_order) or 'none'}"
        )
    last = max((by_order.index(name) for name in named), default=-1)
    arguments = {name: named.get(name, signature.parameters[name].default) for name in by_order[: last + 1]}
    needed = [name for name in by_order if name not in named and signature.parameters[name].default is inspect.Parameter.empty]
    if needed:
        raise InvalidTypeError(f"{what}: {', '.join(needed)} missing, without which {forward} does not run")
    return tuple(arguments.values())


def check_run(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """The model runs on them, and nothing that it starts from is NaN or Inf.

    Raises:
        InvalidValueError: it does not, with its own message. NonFiniteError: names the input or the statistic.
    """
    if meta := [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_meta]:
        raise InvalidValueError(f"example_inputs[{meta[0]}] is on the meta device, without numbers: give inputs as the model will get them")
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and x.is_floating_point() and not bool(torch.isfinite(_numbers(x)).all()):
            raise NonFiniteError(f"example_inputs[{i}] holds NaN or Inf: give inputs as the model will get them")
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var") and not bool(torch.isfinite(buffer).all()):
            raise NonFiniteError(f"{name} holds NaN or Inf: run batches through the model in training mode again, or load it again")
    run(model, inputs)


def _numbers(x: Tensor) -> Tensor:
    """Those that a tensor stores: of a sparse one without its zeros."""
    if x.layout is torch.sparse_coo:
        return x._values()
    return x if x.layout is torch.strided else x.values()


def run(model: nn.Module, inputs: Inputs) -> None:
    """One forward pass, for its error: InvalidValueError, with the model's own message."""
    try:
        with evaluating(model), seeded():
            call(model, inputs)
    except Exception as error:
        reason = first_line(error)
        if _needs_gradients(model, inputs):
            raise InvalidValueError(
                f"{type(model).__name__} computes gradients in its forward, and does not under torch.no_grad(), as every model is looked at "
                f"({type(error).__name__}: {reason}): put `with torch.enable_grad():` around them there"
            ) from error
        given = ", ".join(f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in inputs)
        hint = "; pass a tuple of its positional arguments, or a dict of them by name" if isinstance(error, TypeError) else ""
        raise InvalidValueError(
            f"example_inputs: {type(model).__name__} does not run on ({given}): {type(error).__name__}: {reason}{hint}"
        ) from error


def _needs_gradients(model: nn.Module, inputs: Inputs) -> bool:
    """Does it run only where gradients are recorded?"""
    try:
        with evaluating(model), seeded(), torch.enable_grad():
            call(model, inputs)
    except Exception:
        return False
    return True


def count_params(model: nn.Module) -> int:
    """Number of parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The same chances every time, and outside as if nothing had happened."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    elsewhere = devices or torch.xpu.is_initialized() or torch.backends.mps.is_available()
    with torch.random.fork_rng(devices=devices):
        # Of a device that has not been used, the seed would be noted for later: slow, and not as if nothing had happened.
        (torch.manual_seed if elsewhere else torch.default_generator.manual_seed)(seed)
        yield


def varied(inputs: Inputs, seed: int) -> Inputs:
    """Other inputs of the same shapes: floating numbers with as much noise as they scatter, all others in another order."""
    generator = torch.Generator().manual_seed(seed)

    def other(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.numel():
            return x
        if not x.is_floating_point():
            return x.flatten()[torch.randperm(x.numel(), generator=generator, device="cpu").to(x.device)].reshape(x.shape)
        spread = float(x.double().std()) if x.numel() > 1 else 0.0
        noise = torch.randn(x.shape, generator=generator, device="cpu").to(x)
        return x + (spread or 1.0) * noise if math.isfinite(spread) else x

    return tuple(other(x) for x in inputs)


PLAIN = (bool, int, float, str, type(None))  # what a module may count with


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards the model has the modes, the buffers, and the numbers that its forward passes count on its modules, of before."""
    modules = [(m, m.training, {k: v for k, v in vars(m).items() if isinstance(v, PLAIN)}, dict(m._buffers)) for m in model.modules()]
    values = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    try:
        yield
    finally:
        for module, training, attributes, buffers in modules:
            module.__dict__.update(attributes)
            module.training = training  # in a scripted module neither this nor a buffer is in a dict
            for name, buffer in buffers.items():
                module._buffers[name] = buffer
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards the model is as it was."""
    with as_it_was(model), torch.no_grad():
        model.eval()
        yield


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model on copies of the inputs, which are the user's: it may write into a tensor, or take an entry out of a dict. Nothing is compiled for it."""
    compiled = "torch._dynamo" in sys.modules  # importing it takes seconds
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        return model(*copied(inputs))


def copied(inputs: Inputs) -> tuple[Any, ...]:
    """Fresh containers and tensors, however nested; of other objects the same ones."""
    copies: tuple[Any, ...] = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tuple(inputs))
    return copies


class OneDtype(TorchDispatchMode):
    """Inside, real numbers are made and cast to this dtype alone, whatever the model's code asks for: it may have a half-precision trunk."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __enter__(self) -> Any:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self.before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wanted = (kwargs or {}).get("dtype")
        return func(*args, **(kwargs or {}) | ({"dtype": self.dtype} if wanted is not None and wanted.is_floating_point else {}))


def cast(inputs: Inputs, dtype: torch.dtype) -> tuple[Any, ...]:
    """Their real numbers in this dtype, however nested."""
    made: tuple[Any, ...] = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tuple(inputs))
    return made


@contextlib.contextmanager
def _countable_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Forward(ModuleTracker):
    """Which modules are running. Of a forward pass alone: PyTorch's own also hooks the backward pass, and then a model that differentiates in its
    `forward` (forces are gradients of an energy) would fail."""

    def _fw_pre_hook(self, mod: nn.Module, input: Any) -> None:
        self.parents.add(self._get_mod_name(mod))

    def _fw_post_hook(self, mod: nn.Module, input: Any, output: Any) -> None:
        self.parents.discard(self._get_mod_name(mod))


@contextlib.contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Everything that a forward pass computes, module by module."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Forward()
    with warnings.catch_warnings(), _countable_attention(), counter:
        warnings.filterwarnings(
            "ignore", r"Using `torch\.compile\(module\)` when there are global hooks"
        )  # what they see twice counts once
        yield counter


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass: matrix products, convolutions and attention, as PyTorch counts them."""
    return macs_of_batches(model, example_inputs)[0]


def macs_of_batches(model: nn.Module, example_inputs: Any) -> tuple[int, int]:
    """`count_macs`, and how many of them are in batches of products: between activations, as attention's."""
    inputs = check_inputs(example_inputs, model)
    with evaluating(model), _counting() as counter:
        call(model, inputs)
    batches = [n for kind, n in counter.get_flop_counts().get("Global", {}).items() if kind.__name__ in ("bmm", "baddbmm")]
    return int(counter.get_total_flops()) // 2, int(sum(batches)) // 2


def input_shapes(model: nn.Module, modules: Sequence[nn.Module], example_inputs: Any) -> dict[nn.Module, list[torch.Size]]:
    """Shapes of the first input of each module, one per call, in one forward pass. A hook would not see `layer.forward(x)`."""
    shapes: dict[nn.Module, list[torch.Size]] = {m: [] for m in modules}

    def noting(module: nn.Module, forward: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if given:
                shapes[module].append(given[0].shape)
            return forward(*args, **kwargs)

        return noted

    before = {m: vars(m).get("forward") for m in shapes}
    try:
        for module in shapes:
            vars(module)["forward"] = noting(module, module.forward)
        with evaluating(model), _countable_attention():
            call(model, check_inputs(example_inputs, model))
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            vars(module).update({"forward": forward} if forward is not None else {})
    return shapes


def layer_macs(module: nn.Module, shapes: Sequence[torch.Size]) -> int:
    """MACs of one layer for inputs of these shapes; the layer must live on the meta device (nothing is computed)."""
    with torch.no_grad(), _counting() as counter:
        for shape in shapes:
            module(an_input(module, shape, device="meta"))
    return int(counter.get_total_flops()) // 2


def measure_latency(model: nn.Module, example_inputs: Any, seconds: float = 0.3) -> Latency:
    """Time forward passes for about `seconds` after a warm-up, with the threads that torch is set to use now."""
    inputs = copied(check_inputs(example_inputs, model))
    check_number("seconds", seconds)
    if not 0 < seconds < math.inf:
        raise InvalidValueError(f"seconds = {seconds}: must be finite and above 0")
    parameter = next(model.parameters(), None)
    device = str(parameter.device) if parameter is not None else "cpu"
    with evaluating(model):
        measured = _warm_timer(model, inputs).blocked_autorange(min_run_time=seconds)
    return Latency(measured.median * 1e3, measured.iqr * 1e3, len(measured.times), measured.num_threads, device)


def relative_latency(model: nn.Module, reference: nn.Module, example_inputs: Any) -> tuple[float, float]:
    """The share of a reference's time that a model takes for a forward pass, and the reference's milliseconds.

    Clocks wander: one after the other, the two may be off by a tenth. So they take turns in short blocks, and the share is the
    median over the turns, which go on until its standard error is below `PRECISION`, or for `PATIENCE` seconds.
    """
    inputs = copied(check_inputs(example_inputs, model))
    times: list[tuple[float, float]] = []
    with evaluating(model), evaluating(reference):
        timers = [_warm_timer(m, inputs) for m in (model, reference)]
        counts = [max(1, round(BLOCK / timer.timeit(1).mean)) for timer in timers]
        start = time.perf_counter()
        while len(times) < TURNS or (_uncertainty(times) > PRECISION and time.perf_counter() - start < PATIENCE):
            one, other = (timer.timeit(count).mean for timer, count in zip(timers, counts, strict=True))
            times.append((one, other))
    return statistics.median(a / b for a, b in times), statistics.median(b for _, b in times) * 1e3


def _uncertainty(times: Sequence[tuple[float, float]]) -> float:
    """Standard error of the median of the ratios, relative to it, from their quartiles (as those of a normal distribution)."""
    low, middle, high = statistics.quantiles([a / b for a, b in times], n=4)
    return 0.93 * (high - low) / middle / math.sqrt(len(times))


def _warm_timer(model: nn.Module, inputs: tuple[Any, ...]) -> Timer:
    """It sets the number of threads, synchronises an accelerator, and picks a block long enough for the clock."""
    for _ in range(3):
        call(model, inputs)
    # A dict is a fresh one every time, for a model that takes entries out of it.
    fresh = "copied(inputs)" if any(isinstance(x, Mapping) for x in inputs) else "inputs"
    named = {"model": model, "inputs": inputs, "copied": copied}
    return Timer(f"model(*{fresh})", globals=named, num_threads=torch.get_num_threads())


def _stored(x: Any) -> bool:
    """In one piece: a sparse tensor is not, but its parts are."""
    return isinstance(x, Tensor) and x.layout is torch.strided


class _LiveBytes(TorchDispatchMode):
    """Bytes of tensor storage that the operations inside have created and not yet released: now, and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage()._cdata for x in args if _stored(x)}
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if not _stored(out):
                continue
            storage = out.untyped_storage()
            key = storage._cdata
            if key in inputs or key in self.known:
                continue
            self.known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._release, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


def peak_memory(model: nn.Module, example_inputs: Any) -> int:
    """Bytes of parameters and buffers, plus the most bytes of activations alive at once in one forward pass."""
    fixed = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    inputs = copied(check_inputs(example_inputs, model))
    with evaluating(model), _LiveBytes() as live:
        model(*inputs)
    return fixed + live.peak


def profile(model: nn.Module, example_inputs: Any, latency: bool = True, seconds: float = 0.3) -> Profile:
    """Count and time a model on example inputs.

    Args:
        model: any module; left as it was.
        example_inputs: tuple of positional arguments, or a dict of arguments by name. MACs, latency and memory are those of this very batch.
        latency: also time it.
        seconds: how long to time.

    Raises:
        InvalidTypeError: no model, no number of seconds.
        InvalidValueError: the model does not run on these inputs.

    Example:
        >>> import torch, laconic
        >>> laconic.profile(torch.nn.Linear(8, 4), (torch.zeros(1, 8),), latency=False).macs
        32
    """
    check_module(model)
    inputs = check_inputs(example_inputs, model)
    run(model, inputs)
    holders = [(name, m) for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    with evaluating(model), _counting() as counter:
        call(model, inputs)
    by_module = {key.partition(".")[2]: sum(ops.values()) // 2 for key, ops in counter.get_flop_counts().items() if key != "Global"}
    timed = measure_latency(model, inputs, seconds) if latency else None
    return Profile(
        params=count_params(model),
        macs=int(counter.get_total_flops()) // 2,
        latency_ms=timed.median_ms if timed else None,
        latency=timed,
        peak_memory=peak_memory(model, inputs),
        layers=tuple(
            LayerProfile(name, type(m).__name__, sum(p.numel() for p in m.parameters(recurse=False)), by_module.get(name, 0))
            for name, m in holders
        ),
    )
