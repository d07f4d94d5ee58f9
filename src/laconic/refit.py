r"""Fit the layers of a cut model, one after the other, to what they put out before the cut.

.. math:: W_l = \operatorname{argmin}_W \sum_x \|W x_l - (y_l)_{K_l}\|_2^2 + \lambda \|W - W_l^0\|_F^2

where :math:`y_l` is what the layer (linear, or a convolution on all its patches; with its bias) puts out in the dense model, :math:`K_l` the channels that
are left of it, :math:`x_l` what it takes in in the cut model, whose earlier layers are fitted already, and :math:`W_l^0` its weight after the cut. Of a layer
that adds to a residual stream :math:`W x_l` is to be what the stream of the cut model lacks of the dense one's by then. Of a pair the last layer is fitted. No gradient, no labels: a few hundred inputs, a second copy of the model, two runs over the inputs for each layer.

Sources: Zhang et al. 2016, *Accelerating Very Deep Convolutional Networks*, on ranks; He et al. 2017, *Channel Pruning*, and Luo et al. 2017, *ThiNet*, on channels.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import gathered
from .errors import SurgeryError, first_line
from .graph.labels import leaves
from .matricize import has_own_forward, is_hf_conv1d, takes_entries, unfoldings
from .measure import call, check_inputs, evaluating
from .surgery.batchnorm import BATCHES, batch_norms, reestimate
from .surgery.channels import Ints, channels_kept, is_layer_norm
from .surgery.factorize import MARK, plain_layers

RIDGE = 1e-3  # lambda, as a part of the mean square of the inputs
ADDS = 4  # times the rounding of the largest channel, which a sum may be off by
ROWS = 8192  # of patches in a batch: more say little that is new


class _Reached(Exception):  # noqa: N818  no error
    """Nothing behind this layer need run."""


def refit_layers(
    model: nn.Module, dense: nn.Module, batches: Sequence[Any], factors: Mapping[str, tuple[Ints, float]] | None = None
) -> str:
    """Fit all layers that can be, in place, re-estimate BatchNorm, and say how far the model's outputs are from the dense one's, before and after, and
    which layers stay as they were cut.

    Args:
        dense: the model before it was cut.
        batches: as of `calibration`. Of several processes each has its own, and all fit the same.
        factors: by path: these of the channels that a layer puts out (dense numbers) are to be so many times what they were.

    Raises:
        SurgeryError: the model does not run on a batch.
    """
    inputs = [check_inputs(batch, model, "a batch of calibration") for batch in batches]
    with evaluating(model), evaluating(dense), _statistics_of_the_batch(model), torch.no_grad():
        try:
            before = _distance(model, dense, inputs)
        except RuntimeError as error:  # of PyTorch
            raise SurgeryError(f"the model does not run on calibration (RuntimeError: {first_line(error)}); {BATCHES}") from error
        paths = _fittable(model, inputs[0])
        start = [(p, p.clone()) for path in paths for p in plain_layers(model.get_submodule(path))[-1].parameters()]
        streams = _streams(model, paths, inputs[0])
        fitted = [path for path in paths if _fit(model, dense, path, inputs, (factors or {}).get(path), streams.get(path))]
        after = _distance(model, dense, inputs)
        if after > before:
            for parameter, value in start:
                parameter.copy_(value)
            return (
                f"no layer was fitted: the outputs would differ from the dense model's by {after:.2g} of their size, as cut by {before:.2g}"
            )
    reestimate(model, batches)
    left = [path for path, _ in _layers(model) if path not in fitted]
    return (
        f"{len(fitted)} layers were fitted to what they put out before: the outputs differ from the dense model's by {after:.2g} of their size, as cut by {before:.2g}"
        + (f"; not fitted: {', '.join(left)}" if left else "")
    )


@contextlib.contextmanager
def _statistics_of_the_batch(model: nn.Module) -> Iterator[None]:
    """BatchNorm goes by the batch inside: its own statistics are of layers as they were. These stay."""
    momenta = [(norm, norm.momentum) for norm in batch_norms(model)]
    try:
        for norm, _ in momenta:
            norm.train()
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum


def _fittable(model: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
    """Paths in the order in which they run. Not what runs twice, shares its weight, is frozen, or has code of its own around it."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    order: list[str] = []
    handles = []
    for path, module in _layers(model):
        last = plain_layers(module)[-1]
        free = all(owners[id(p)] == 1 and p.requires_grad for p in last.parameters())
        if free and _is_plain(last) and not has_own_forward(module):
            handles.append(module.register_forward_hook(lambda _m, _a, _o, path=path: order.append(path)))
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [path for path, times in Counter(order).items() if times == 1]


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers and pairs, without what is within a pair, and without tables."""
    inside = tuple(f"{path}." for path, module in model.named_modules() if hasattr(module, MARK))
    for path, module in model.named_modules():
        if not path.startswith(inside) and (hasattr(module, MARK) or unfoldings(module)) and not takes_entries(module):
            yield path, module


def _is_plain(module: nn.Module) -> bool:
    """Is it linear in patches of its inputs, with one row of weights for each output?"""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return module.groups == 1 and module.padding_mode == "zeros" and isinstance(module.padding, tuple)
    return type(module) is nn.Linear or is_hf_conv1d(module)


def _streams(model: nn.Module, paths: Sequence[str], inputs: tuple[Any, ...]) -> dict[str, str]:
    """The norm behind each layer that adds to a residual stream: moved outputs move what the norm takes in by as much. By the layer's path."""
    order: list[str] = []
    norms = [path for path, module in model.named_modules() if is_layer_norm(module)]
    with contextlib.ExitStack() as hooks:
        for path in (*paths, *norms):
            hooks.callback(model.get_submodule(path).register_forward_hook(lambda _m, _a, _o, path=path: order.append(path)).remove)
        call(model, inputs)
    found: dict[str, str] = {}
    streams: dict[str, Tensor] = {}
    for path in paths:
        norm = next((later for later in order[order.index(path) :] if later in norms), None)
        if norm is None or order.count(norm) > 1:
            continue
        if norm not in streams:
            streams = {norm: _seen(model, model.get_submodule(norm), inputs, given=True)}  # paths come in the order of their norms
        stream = streams[norm]
        moves: list[Tensor] = []
        size = stream.float().std()

        def move(_m: nn.Module, _a: Any, out: Tensor, moves: list[Tensor] = moves, size: Tensor = size) -> Tensor:
            moves.append(size * torch.randn(out.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(out))
            return out + moves[0]

        with contextlib.ExitStack() as hooks:
            hooks.callback(plain_layers(model.get_submodule(path))[-1].register_forward_hook(move).remove)
            moved = _seen(model, model.get_submodule(norm), inputs, given=True)
        rounding = ADDS * torch.finfo(stream.dtype).eps * float(stream.abs().max() + moves[0].abs().max())
        if (
            moved.shape == moves[0].shape
            and rounding < 0.1 * float(moves[0].abs().max())
            and bool(((moved - stream - moves[0]).abs() <= rounding).all())
        ):
            found[path] = norm
    return found


def _fit(
    model: nn.Module, dense: nn.Module, path: str, inputs: Sequence[tuple[Any, ...]], factor: tuple[Ints, float] | None, norm: str | None
) -> bool:
    """Normal equations in float64, batch by batch; the weight is the solution where that is finite. Before the norm of a stream the error is that of the
    stream, in which there is what earlier layers lack."""
    module = model.get_submodule(path)
    layer = plain_layers(module)[-1]
    weight = layer.weight.T if is_hf_conv1d(layer) else layer.weight.flatten(1)
    start = weight.double() if layer.bias is None else torch.cat([weight, layer.bias[:, None]], 1).double()
    there = channels_kept(dense.get_submodule(path), "out")  # which may have been cut before
    kept = torch.from_numpy(np.searchsorted(there, channels_kept(module, "out"))).to(weight.device)
    times = torch.ones(len(kept), dtype=torch.float64, device=weight.device)
    if factor is not None:
        times[np.isin(channels_kept(module, "out"), factor[0])] = factor[1]
    at, given = (path, False) if norm is None else (norm, True)
    gram, across = torch.zeros((), dtype=torch.float64, device=weight.device), torch.zeros((), dtype=torch.float64, device=weight.device)
    for batch in inputs:
        x = _patches(layer, _seen(model, layer, batch, given=True))
        is_there, is_here = (_rows(layer, _seen(m, m.get_submodule(at), batch, given)) for m in (dense, model))
        if not len(x) == len(is_there) == len(is_here):
            return False
        some = slice(None, None, -(-len(x) // ROWS))
        x, error = x[some].double(), is_there[some][:, kept].double() * times - is_here[some].double()
        if layer.bias is not None:
            x = F.pad(x, (0, 1), value=1.0)
        gram, across = gram + x.T @ x, across + x.T @ error
    gram, across = (torch.stack([y.to(x.device) for y in gathered(x)]).sum(0) for x in (gram, across))
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    change, failed = torch.linalg.solve_ex(gram + ridge, across)
    if int(failed) or not bool(torch.isfinite(change).all()):
        return False
    fitted = start + change.T
    if layer.bias is not None:
        layer.bias.copy_(fitted[:, -1])
        fitted = fitted[:, :-1]
    layer.weight.copy_(fitted.T if is_hf_conv1d(layer) else fitted.reshape(layer.weight.shape))
    return True


def _seen(model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], given: bool) -> Tensor:
    """What a layer takes in, or puts out, in one run of the model."""
    found: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
        raise _Reached

    def put(_: nn.Module, args: Any, out: Tensor) -> None:
        found.append(out)
        raise _Reached

    handle = layer.register_forward_pre_hook(take, with_kwargs=True) if given else layer.register_forward_hook(put)
    try:
        call(model, inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """`[positions, inputs of one output]`, in the order of the weight."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return x.flatten(0, -2)
    assert isinstance(layer.padding, tuple)
    if isinstance(layer, nn.Conv1d):
        x = F.unfold(x[:, :, None], (1, *layer.kernel_size), (1, *layer.dilation), (0, *layer.padding), (1, *layer.stride))
    else:
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return x.movedim(1, -1).flatten(0, -2)


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """`[positions, channels]` of what a layer puts out."""
    return (x.movedim(1, -1) if isinstance(layer, (nn.Conv1d, nn.Conv2d)) else x).flatten(0, -2)


def _distance(model: nn.Module, dense: nn.Module, inputs: Sequence[tuple[Any, ...]]) -> float:
    """Of the outputs, relative, in root mean square over all batches."""
    off = size = 0.0
    for batch in inputs:
        for a, b in zip(leaves(call(model, batch)), leaves(call(dense, batch)), strict=False):
            if a.shape == b.shape and a.is_floating_point():
                off, size = off + float((a - b).double().square().sum()), size + float(b.double().square().sum())
    off, size = (sum(gathered(x)) for x in (off, size))
    return (off / size) ** 0.5 if size else 0.0
