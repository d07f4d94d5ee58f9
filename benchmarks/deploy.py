"""What a cut network gives where models are served: PyTorch, torch.compile, ONNX Runtime, and int8 on top.

The photographs at a tenth: the dense network, laconic's and the thin one, each at its own learning rate. Accuracy on the test images, the size of
the file, and milliseconds of one image and of 64; the networks take turns within a runtime, so that the machine's noise hits all.

    laconic train scene-tenth-rate --method dense     # and laconic, thin-long: once each
    python benchmarks/deploy.py runs/scene-tenth-rate
"""

from __future__ import annotations

import io
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from common import interleaved, write
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quant_pre_process, quantize_static
from torch import Tensor, nn

import laconic
from laconic.data import Dataset, load_dataset
from laconic.methods.base import network, sample, thin_network
from laconic.recipe import Recipe, load_recipe
from laconic.training import accuracy

RECIPE = "scene-tenth-rate"
METHODS = ("dense", "thin-long", "laconic")
CALIBRATED = 512  # training images that give the ranges of int8


class Onnx(nn.Module):
    """A file of ONNX as a module, so that what measures models measures it."""

    def __init__(self, file: Path):
        super().__init__()
        options = SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait would take time from the next network
        self.session = InferenceSession(file, options)
        self.anywhere = nn.Parameter(torch.zeros(()))  # the CPU

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.session.get_inputs()[0].name: x.contiguous().numpy()})[0])


class Images(CalibrationDataReader):
    """Training images, one by one."""

    def __init__(self, x: Tensor, name: str):
        self.images: Iterator[dict[str, object]] = iter([{name: image[None].contiguous().numpy()} for image in x])

    def get_next(self) -> dict[str, object] | None:
        return next(self.images, None)


def trained(runs: Path, method: str, data: Dataset, recipe: Recipe) -> nn.Module:
    """The network that `laconic train` saved."""
    fresh = thin_network(data, recipe, 0) if method == "thin-long" else network(data, recipe, recipe.widths)
    return laconic.load(runs / f"{method}-seed0" / "model", fresh).eval().to(memory_format=torch.channels_last)


def to_onnx(model: nn.Module, x: Tensor, file: Path) -> Path:
    """Of any number of images."""
    torch.onnx.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("images")},), dynamo=True, verbose=False).save(file)
    return file


def to_int8(file: Path, x: Tensor) -> Path:
    """Weights and activations, a scale for each output channel; the ranges of activations leave out the largest, which costs less."""
    prepared, quantized = file.with_suffix(".prepared.onnx"), file.with_suffix(".int8.onnx")
    quant_pre_process(file, prepared)
    name = InferenceSession(prepared).get_inputs()[0].name
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "quant_format": QuantFormat.QDQ}
    quantize_static(prepared, quantized, Images(x, name), calibrate_method=CalibrationMethod.Percentile, per_channel=True, **kinds)
    return quantized


def size(model: nn.Module) -> int:
    """Bytes of the file of weights."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def milliseconds(served: dict[str, tuple[nn.Module, int]], x: Tensor) -> dict[str, float]:
    times = interleaved({method: partial(model, x) for method, (model, _) in served.items()}, rounds=31)
    return {method: 1e3 * seconds for method, seconds in times.items()}


def main(runs: Path) -> None:
    logging.getLogger().setLevel(logging.ERROR)  # quantize_static says on each call what it would like better
    torch._dynamo.config.recompile_limit = 64  # three networks of one class, in three sizes of batches
    recipe = load_recipe(RECIPE)
    data = load_dataset(recipe.task, None, recipe.train_limit or None, recipe.size)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        models = {method: trained(runs, method, data, recipe) for method in METHODS}
        files = {method: to_onnx(model, data.test_x[:64], Path(folder) / f"{method}.onnx") for method, model in models.items()}
        small = {method: to_int8(file, data.train_x[sample(data, CALIBRATED)]) for method, file in files.items()}
        runtimes: dict[str, Callable[[str], tuple[nn.Module, int]]] = {
            "PyTorch": lambda method: (models[method], size(models[method])),
            "torch.compile": lambda method: (torch.compile(models[method], dynamic=False), size(models[method])),
            "ONNX Runtime": lambda method: (Onnx(files[method]), files[method].stat().st_size),
            "ONNX Runtime, int8": lambda method: (Onnx(small[method]), small[method].stat().st_size),
        }
        rows = []
        for runtime, ready in runtimes.items():
            served = {method: ready(method) for method in METHODS}
            one, many = (milliseconds(served, x) for x in (data.test_x[:1], data.test_x[:64]))
            for method, (model, bytes_) in served.items():
                right = accuracy(model, data.test_x, data.test_y, batch_size=64)
                row = {"runtime": runtime, "method": method, "accuracy": 100 * right, "bytes": bytes_}
                rows.append(row | {"ms_one": one[method], "ms_64": many[method]})
                print(rows[-1], flush=True)
    write("deploy", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else f"runs/{RECIPE}"))
