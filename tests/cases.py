"""Tables of layers and builders of matrices that several test files share."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from laconic.matricize import unfoldings


@dataclass(frozen=True)
class Layer:
    """A way to build a layer, and the shape of an input that it takes."""

    build: Callable[..., nn.Module]
    args: tuple
    options: dict
    input_shape: tuple[int, ...]

    def make(self) -> nn.Module:
        """In float64, with values that no initialisation makes special (Hugging Face's bias starts at zero)."""
        module = self.build(*self.args, **self.options).double()
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        return module

    def input(self) -> Tensor:
        return torch.randn(self.input_shape, dtype=torch.float64)


LAYERS = {
    "linear": Layer(nn.Linear, (5, 7), {}, (2, 3, 5)),
    "linear-no-bias": Layer(nn.Linear, (7, 5), {"bias": False}, (7,)),
    "linear-one-output": Layer(nn.Linear, (4, 1), {}, (3, 4)),
    "hf-conv1d": Layer(Conv1D, (6, 4), {}, (2, 3, 4)),
    "conv1d": Layer(nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1, "dilation": 2}, (2, 4, 11)),
    "conv1d-circular": Layer(nn.Conv1d, (4, 6, 5), {"padding": 2, "padding_mode": "circular"}, (2, 4, 9)),
    "conv2d": Layer(nn.Conv2d, (3, 8, 3), {"padding": 1}, (2, 3, 6, 5)),
    "conv2d-no-bias": Layer(nn.Conv2d, (3, 8, 3), {"bias": False}, (2, 3, 6, 5)),
    "conv2d-pointwise": Layer(nn.Conv2d, (6, 4, 1), {"stride": 2, "padding": 1}, (2, 6, 5, 4)),
    "conv2d-all-uneven": Layer(
        nn.Conv2d, (3, 5, (3, 4)), {"stride": (2, 3), "padding": (2, 1), "dilation": (3, 2)}, (2, 3, 13, 16)
    ),
    "conv2d-row-kernel": Layer(nn.Conv2d, (3, 5, (1, 5)), {"padding": (0, 2)}, (2, 3, 4, 6)),
    "conv2d-same": Layer(nn.Conv2d, (3, 5, (3, 5)), {"padding": "same", "dilation": (1, 2)}, (2, 3, 7, 9)),
    "conv2d-same-reflect": Layer(nn.Conv2d, (3, 5, 3), {"padding": "same", "padding_mode": "reflect"}, (2, 3, 5, 6)),
    "conv2d-valid": Layer(nn.Conv2d, (3, 5, 3), {"padding": "valid"}, (2, 3, 5, 6)),
    "conv2d-reflect": Layer(nn.Conv2d, (3, 5, 3), {"padding": (2, 1), "padding_mode": "reflect"}, (2, 3, 5, 6)),
    "conv2d-replicate": Layer(nn.Conv2d, (3, 5, 3), {"padding": 2, "padding_mode": "replicate", "stride": 2}, (2, 3, 5, 6)),
    "conv2d-groups": Layer(nn.Conv2d, (6, 9, (3, 2)), {"groups": 3, "padding": 1, "stride": (1, 2)}, (2, 6, 5, 6)),
    "conv2d-depthwise": Layer(nn.Conv2d, (4, 4, 3), {"groups": 4}, (2, 4, 5, 6)),
    "conv3d": Layer(nn.Conv3d, (3, 4, (3, 2, 2)), {"padding": (1, 0, 1), "stride": (2, 1, 1)}, (2, 3, 5, 4, 4)),
    "conv3d-groups": Layer(nn.Conv3d, (4, 6, 2), {"groups": 2, "dilation": (2, 1, 1)}, (2, 4, 5, 4, 4)),
    "transposed1d": Layer(nn.ConvTranspose1d, (4, 5, 3), {"stride": 2, "output_padding": 1}, (2, 4, 6)),
    "transposed2d": Layer(
        nn.ConvTranspose2d,
        (6, 5, (3, 2)),
        {"stride": (3, 2), "padding": (1, 0), "output_padding": (2, 1), "dilation": (1, 2)},
        (2, 6, 4, 3),
    ),
    "transposed2d-groups": Layer(nn.ConvTranspose2d, (6, 4, 3), {"groups": 2, "stride": 2, "bias": False}, (2, 6, 4, 3)),
    "transposed3d": Layer(nn.ConvTranspose3d, (4, 6, (2, 1, 3)), {"groups": 2, "padding": (1, 0, 1)}, (2, 4, 3, 2, 3)),
}  # fmt: skip

# Every layer with every unfolding that it has: (layer's name, number of the unfolding).
UNFOLDED = [pytest.param(name, i, id=f"{name}-{u.name}") for name, layer in LAYERS.items() for i, u in enumerate(unfoldings(layer.make()))]


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def with_spectrum(m: int, n: int, values, seed: int = 0) -> np.ndarray:
    """A random `[m, n]` with these singular values (missing ones are zero)."""
    rng = np.random.default_rng(seed)
    values = np.asarray(values, dtype=np.float64)[: min(m, n)]
    return (orthonormal(rng, m, len(values)) * values) @ orthonormal(rng, n, len(values)).T


SPECTRA = {
    "zero": lambda k: [0.0],
    "rank one": lambda k: [1.0],
    "repeated": lambda k: [1.0] * -(-k // 2) + [0.5] * (k // 2),
    "linear": lambda k: np.linspace(1, 0, k, endpoint=False),
    "steep": lambda k: np.geomspace(1, 1e-6, k),
}

sizes = st.one_of(st.integers(1, 64), st.sampled_from([1, 2, 3]))


@st.composite
def matrices(draw) -> np.ndarray:
    """Float64 matrices up to 64 x 64, also 1 x n and n x 1, with largest singular value 1 (or 0), of all kinds of spectra."""
    m, n = draw(sizes), draw(sizes)
    spectrum = SPECTRA[draw(st.sampled_from(sorted(SPECTRA)))](min(m, n))
    return with_spectrum(m, n, spectrum, draw(st.integers(0, 999)))
