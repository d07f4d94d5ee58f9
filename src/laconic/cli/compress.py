"""A trained model, without training."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from torch import nn
from tyro.conf import Positional

from .. import checkpoint
from ..budget import Budget
from ..compaction import compress as compress_model
from ..console import console
from ..errors import InvalidValueError, first_line
from ..structures import LowRank
from .shared import show_json, show_report, write_page


def compress(
    factory: Positional[str],
    weights: Path,
    out: Path,
    params: float | None = None,
    macs: float | None = None,
    energy: float | None = None,
    input_shape: tuple[int, ...] = (),
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
        macs: budget as a fraction of the MACs; needs --input-shape.
        energy: instead of a budget, the share of squared singular values that each layer keeps.
        input_shape: of one input, batch first, e.g. 1 3 32 32.
        matricization: of convolutions: "out,in*kh*kw", "out*kh,in*kw", or "auto".
        json: print the report as JSON.
    """
    checkpoint.check_target(out)
    if input_shape and min(input_shape) < 1:
        raise InvalidValueError(
            f"--input-shape {' '.join(map(str, input_shape))}: every number must be at least 1, batch first, e.g. 1 3 32 32"
        )
    if macs is not None and not input_shape:
        raise InvalidValueError(f"--macs {macs}: needs --input-shape, of one input, batch first, e.g. 1 3 32 32")
    model = checkpoint.load_weights(call_factory(factory), weights)
    budget = Budget(params=params, macs=macs) if params is not None or macs is not None else None
    inputs = (torch.randn(input_shape, generator=torch.Generator().manual_seed(0)),) if input_shape else None
    with console.status("cutting"):
        report = compress_model(model, LowRank(matricization=matricization), budget, energy=energy, example_inputs=inputs)
        folder = checkpoint.save(model, out, report=report)
    page = write_page(folder.with_name(folder.name + "-report.html"), report, factory, None, {"weights": weights.name})
    if json:
        show_json({**report.to_json(), "model": str(folder)})
        return
    show_report(report)
    print(f"parameters {report.params_before:,} -> {report.params_after:,}; model: {folder}" + (f"; report: {page}" if page else ""))


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
