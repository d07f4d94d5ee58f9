"""A trained model, without training."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import Positional

from .. import attention, checkpoint
from ..budget import Budget
from ..compaction import compress as compress_model
from ..console import console
from ..errors import InvalidValueError, first_line
from ..structures import LowRank
from ..surgery.batchnorm import batch_norms
from .shared import show_json, show_report, write_page

BATCH = 64  # of the inputs on which BatchNorm is re-estimated


def compress(
    factory: Positional[str],
    weights: Path,
    out: Path,
    params: float | None = None,
    macs: float | None = None,
    max_params: int | None = None,
    energy: float | None = None,
    input_shape: tuple[int, ...] = (),
    inputs: Path | None = None,
    refit: bool = False,
    unfuse: bool = False,
    matricization: str = "out,in*kh*kw",
    json: bool = False,
) -> None:
    """Cut a trained model, without training: build it, load its weights, choose ranks, verify, save.

    Example: laconic compress mypackage.models:resnet --weights model.safetensors --params 0.5 --out compact

    Args:
        factory: `package.module:callable`; called without arguments it returns the model.
        weights: a .safetensors file, or a .pt file that loads with weights_only=True.
        out: directory of the compact model and its report.
        params: budget as a fraction of the parameters.
        macs: budget as a fraction of the MACs; needs --inputs or --input-shape.
        max_params: budget as a number of parameters.
        energy: instead of a budget, the share of squared singular values that each layer keeps.
        input_shape: of one input, batch first, e.g. 1 3 32 32: of random numbers.
        inputs: a .npy file, or a .pt file with one tensor: inputs of the model, batch first. BatchNorm statistics are re-estimated on them.
        refit: then fit the layers to what they put out on --inputs (some hundred) before the cut.
        unfuse: cut the attention of nn.MultiheadAttention and TransformerEncoderLayer, too, as `laconic.unfuse` does; load with it again.
        matricization: of convolutions: "out,in*kh*kw", "out*kh,in*kw", or "auto".
        json: print the report as JSON.
    """
    checkpoint.check_target(out)
    if input_shape and min(input_shape) < 1:
        raise InvalidValueError(
            f"--input-shape {' '.join(map(str, input_shape))}: every number must be at least 1, batch first, e.g. 1 3 32 32"
        )
    if refit and inputs is None:
        raise InvalidValueError("--refit: needs --inputs, some hundred of them")
    if input_shape and inputs is not None:
        raise InvalidValueError("--input-shape and --inputs: give one of them")
    if macs is not None and not input_shape and inputs is None:
        raise InvalidValueError(f"--macs {macs}: needs --inputs, or --input-shape of one input, batch first, e.g. 1 3 32 32")
    bounded = any(bound is not None for bound in (params, macs, max_params))
    if bounded == (energy is not None):
        raise InvalidValueError("how small? give a budget (--params, --macs or --max-params), or else --energy")
    budget = Budget(params=params, macs=macs, max_params=max_params) if bounded else None
    given = read_inputs(inputs) if inputs is not None else None
    model = checkpoint.load_weights(call_factory(factory), weights)
    model = attention.unfuse(model) if unfuse else model
    if given is not None and given.is_floating_point():
        given = given.to(next(model.parameters()).dtype)
    example = given[:1] if given is not None else torch.randn(input_shape, generator=torch.Generator().manual_seed(0))
    calibration = given.split(BATCH) if given is not None and (refit or batch_norms(model)) else None
    with console.status("cutting"):
        report = compress_model(
            model, LowRank(matricization=matricization), budget, energy=energy, calibration=calibration, refit=refit,
            example_inputs=(example,) if input_shape or given is not None else None,
        )  # fmt: skip
        folder = checkpoint.save(model, out, report=report)
    page = write_page(folder.with_name(folder.name + "-report.html"), report, factory, None, {"weights": weights.name})
    if json:
        show_json({**report.to_json(), "model": str(folder)})
        return
    show_report(report)
    print(f"parameters {report.params_before:,} -> {report.params_after:,}; model: {folder}" + (f"; report: {page}" if page else ""))


def read_inputs(path: Path) -> Tensor:
    """A batch of inputs.

    Raises:
        InvalidValueError: not there, or something else.
    """
    expected = "expected a .npy file, or a .pt file with one tensor (torch.save(x, path)), batch first"
    try:
        x = torch.from_numpy(np.load(path)) if path.suffix == ".npy" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidValueError(f"--inputs {path}: {expected}; {type(error).__name__}: {first_line(error)}") from None
    if not isinstance(x, Tensor) or x.ndim == 0 or len(x) == 0:
        raise InvalidValueError(f"--inputs {path}: {expected}; it holds {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}")
    return x


def call_factory(factory: str) -> nn.Module:
    """The model that `package.module:callable` returns."""
    module_name, _, attribute = factory.partition(":")
    if not module_name or not attribute:
        raise InvalidValueError(f"factory = {factory!r}: expected package.module:callable")
    sys.path.insert(0, "")  # modules beside the user, as with python -m
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the module's own code runs
        raise InvalidValueError(f"factory = {factory!r}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.remove("")
    try:
        model = found()
    except Exception as error:
        raise InvalidValueError(f"factory = {factory!r}, called without arguments: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InvalidValueError(f"factory = {factory!r} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model
