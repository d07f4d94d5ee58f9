"""What only a CUDA device can show; skipped without one (`python -m pytest -m gpu`)."""

import json

import pytest
import torch
from torch import nn, optim

import laconic
from laconic.cli import main
from laconic.methods import METHODS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIMIZERS = {
    "AdamW capturable": lambda p: optim.AdamW(p, lr=1e-3, capturable=True),
    "AdamW fused": lambda p: optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW fused and capturable": lambda p: optim.AdamW(p, lr=1e-3, fused=True, capturable=True),
    "Adam foreach, amsgrad": lambda p: optim.Adam(p, lr=1e-3, foreach=True, amsgrad=True),
    "SGD fused": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "RMSprop capturable": lambda p: optim.RMSprop(p, lr=1e-3, capturable=True),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).cuda()  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "float16"])
def test_a_network_shrinks_while_it_trains(optimizer, amp, tmp_path, monkeypatch):
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))
    model = network()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    x, y = torch.randn(32, 3, 16, 16, device="cuda"), torch.arange(32, device="cuda") % 10
    compressor = laconic.Compressor(model, stepper, budget=laconic.Budget(params=0.3), total_steps=60, example_inputs=(x,))
    scaler = torch.amp.GradScaler("cuda", enabled=amp)
    losses = []
    for _ in range(60):
        stepper.zero_grad()
        with torch.autocast("cuda", torch.float16, enabled=amp):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(stepper)
        scaler.update()
        losses.append(float(loss.detach()))
    report = compressor.compact()
    assert report.params_after <= 0.3 * report.params_before
    assert losses[-1] < losses[0]
    own = set(model.parameters())
    held = {p for group in stepper.param_groups for p in group["params"]}
    assert held == own == set(stepper.state)
    for p in own:
        for key, value in stepper.state[p].items():
            if isinstance(value, torch.Tensor) and value.ndim:
                assert value.shape == p.shape, key
            if isinstance(value, torch.Tensor) and "apturable" in optimizer:
                assert value.device.type == "cuda", key


def test_a_budget_in_milliseconds_is_measured_on_the_device():
    model = network()
    stepper = optim.AdamW(model.parameters())
    x = torch.randn(64, 3, 64, 64, device="cuda")
    compressor = laconic.Compressor(model, stepper, budget=laconic.Budget(latency=0.9), total_steps=10, example_inputs=(x,))
    assert compressor.plan.latency_ms is not None
    assert compressor.plan.latency_ms > 0


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("dense", "cp")])
def test_every_method_trains_on_the_device(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))
    recipe = tmp_path / "small.toml"
    recipe.write_text('task = "digits"\nwidths = [8, 16, 16]\npools = [0]\nepochs = 2\nparams = 0.5\nlr = 4e-3\n')
    main(["train", str(recipe), "--method", method, "--device", "cuda", "--out", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["accuracy"] > 0.2
