"""Mixed precision: skipped steps do not count, autocast does not leak in, low-precision weights get a full-precision prox."""

import numpy as np
import pytest
import torch
from torch import nn, optim

import laconic
from laconic import reference

from .models import assert_same, backward, low_rank, mlp, snapshot

STRENGTH = 0.4
SKIPPED = {1, 4}
SCALED = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam foreach": lambda p: optim.Adam(p, lr=0.1, foreach=True),
    "adam fused": lambda p: optim.Adam(p, lr=0.1, fused=True),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "adagrad fused": lambda p: optim.Adagrad(p, lr=0.1, fused=True),
}


def nuclear(strength: float = STRENGTH) -> laconic.LowRank:
    return laconic.LowRank(penalty=laconic.L1(), strength=strength, scale="absolute")


def scaled_step(model: nn.Module, optimizer: optim.Optimizer, scaler: torch.amp.GradScaler, step: int) -> None:
    backward(model, step, scale=float(scaler.get_scale()) * (np.inf if step in SKIPPED else 1.0))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def scaler() -> torch.amp.GradScaler:
    made = torch.amp.GradScaler("cpu", init_scale=64.0)
    made.scale(torch.ones(()))  # creates its state
    return made


@pytest.mark.parametrize("build", SCALED.values(), ids=SCALED)
def test_steps_that_a_grad_scaler_skips_do_not_count(build):
    model, wanted = mlp(torch.float32), mlp(torch.float32)
    optimizer, alone = build(model.parameters()), build(wanted.parameters())
    fired = []
    optimizer.register_step_post_hook(lambda *_: fired.append(1))
    compressor = laconic.Compressor(model, optimizer, nuclear(), every=3)
    ours, theirs = scaler(), scaler()
    stepped = 0
    for t in range(8):
        scaled_step(model, optimizer, ours, t)
        scaled_step(wanted, alone, theirs, t)
        stepped += t not in SKIPPED
        if t not in SKIPPED and stepped % 3 == 0:
            with torch.no_grad():
                for p in wanted.parameters():
                    if p.ndim > 1:
                        p.copy_(torch.from_numpy(reference.svt(p.numpy(), STRENGTH * 0.3)))
    assert compressor.steps == stepped == 6
    assert len(fired) == (8 if optimizer.defaults["fused"] else 6)  # a fused optimizer's hooks fire all the same
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def autocast(enabled: bool):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def test_autocast_around_the_whole_step_does_not_reach_the_prox():
    """The same gradients with and without autocast active while the optimizer steps: the same weights, bit for bit."""

    def weights(active: bool) -> list:
        model = mlp(torch.float32)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        laconic.Compressor(model, optimizer, nuclear(), every=1)
        for t in range(3):
            backward(model, t)
            with autocast(active):
                optimizer.step()
            optimizer.zero_grad()
        return snapshot(model, optimizer)

    assert_same(weights(True), weights(False))


def test_autocast_around_the_whole_step_does_not_reach_a_cut_in_mid_run():
    def weights(active: bool) -> list:
        model = mlp(torch.float32)
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.6), total_steps=10, every=1)
        for t in range(8):
            backward(model, t)
            with autocast(active):
                optimizer.step()
            optimizer.zero_grad()
        assert any(isinstance(m, nn.Sequential) for m in model)
        return snapshot(model, optimizer)

    assert_same(weights(True), weights(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_weights_are_shrunk_in_full_precision(dtype):
    """The prox of the stored weight differs from the float64 one by the rounding of the result, and by nothing more."""
    model = mlp(dtype)
    stored = {n: p.detach().double().numpy() for n, p in model.named_parameters() if p.ndim > 1}
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    laconic.Compressor(model, optimizer, nuclear(3.0), every=1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, before in stored.items():
        after = model.get_parameter(name)
        assert after.dtype == dtype
        wanted = torch.from_numpy(reference.svt(before, 0.3))
        torch.testing.assert_close(after.double(), wanted, rtol=0.5 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_weights_are_cut_to_their_rank_and_train_on(dtype):
    model = low_rank(mlp(dtype), {"0.weight": 2, "2.weight": 2})
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    compressor = laconic.Compressor(model, optimizer, nuclear(0.0), every=1)
    report = compressor.compact()
    assert [layer.rank for layer in report.layers] == [2, 2, None]
    assert {p.dtype for p in model.parameters()} == {dtype}
    before = model[2][0].weight.clone()
    backward(model, 0)
    optimizer.step()
    assert not torch.equal(before, model[2][0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_singular_values_of_low_precision_weights_are_not_taken_for_rounding(dtype):
    """A tenth of the largest value is far above the rounding of either type."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    u, _, vh = torch.linalg.svd(model[0].weight.detach().double())
    s = torch.cat([torch.ones(8), 0.1 * torch.ones(56), torch.zeros(192)]).double()
    model[0].weight.data = u * s @ vh
    model.to(dtype)
    compressor = laconic.Compressor(model, optim.SGD(model.parameters(), lr=0.1), nuclear(0.0))
    assert compressor.compact().layers[0].rank == 64
