"""Where training runs in TF32, as on GPUs after `torch.set_float32_matmul_precision("high")`, decompositions and cuts do not.

No CPU computes in TF32. So `TF32` rounds what goes into float32 products to 10 bits, where the settings would allow a GPU to.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import laconic
from laconic import reference
from laconic.precision import full_precision
from laconic.surgery.factorize import pair_matrices

from .test_inner import Net, compressor_for, run

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


def ten_bits(x):
    """The nearest number with 10 bits behind the point."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        return x
    bits = x.detach().clone().view(torch.int32)
    return bits.add_(0x1000).bitwise_and_(~0x1FFF).view(torch.float32)


class TF32(TorchDispatchMode):
    """Float32 products as a GPU computes them that may use TF32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        allowed = torch.backends.cuda.matmul.allow_tf32
        return func(*(tree_map(ten_bits, args) if func in PRODUCTS and allowed else args), **(kwargs or {}))


@pytest.fixture(params=["high", "medium"])
def fast(request):
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def test_the_mode_rounds_products(fast):
    x = torch.randn(32, 32)
    exact = x.double() @ x.double()
    with TF32():
        rounded = x @ x
        with full_precision(x.device):
            full = x @ x
    assert 1e-4 < torch.dist(rounded.double(), exact) / exact.norm() < 1e-3
    assert torch.dist(full.double(), exact) / exact.norm() < 1e-6


@pytest.mark.parametrize("solver", ["svd", "gram", "gram-float64", "auto"])
def test_singular_values_are_shrunk_in_float32(fast, solver):
    x = torch.randn(48, 96)
    tau = 0.3 * float(torch.linalg.matrix_norm(x, 2))
    exact = reference.svt(x.double().numpy(), tau)
    with TF32():
        got = laconic.svt(x, tau, solver=solver)
    assert np.linalg.norm(got.x.double().numpy() - exact) <= 3e-6 * np.linalg.norm(exact)
    assert torch.get_float32_matmul_precision() == fast


def cut(model: nn.Module) -> laconic.Compressor:
    """Some of its layers are three afterwards."""
    compressor = compressor_for(model, lambda p: torch.optim.SGD(p, lr=0.0))
    run(model, *compressor.optimizers, range(20))
    compressor.compact()
    return compressor


def test_a_network_is_cut_as_without(fast):
    plain = Net()
    rounded = copy.deepcopy(plain)
    cut(plain)
    with TF32():
        compressor = cut(rounded)
        products = [(site, *site.factors) for site in compressor.plan.sites if site.inner is not None and site.inner.rank is not None]
    for (name, a), b in zip(plain.state_dict().items(), rounded.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert products, "none was cut to three layers, whose product is formed"
    for site, left, right in products:
        inner = site.inner.unfolding.fold(torch.matmul(*site.inner.factors))
        *_, last = site.weights
        for got, exact in zip((left, right), pair_matrices(site.unfolding, inner.detach(), last.detach()), strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


def test_the_newer_names_of_the_setting():
    backend = torch.backends.cuda.matmul
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("from PyTorch 2.9 on")
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with full_precision(torch.device("cpu")):
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


def test_an_ordinary_setting_is_not_touched(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    with full_precision(torch.device("cpu")):
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert calls == []
