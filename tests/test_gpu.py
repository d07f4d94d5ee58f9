"""What only a CUDA device can show; skipped without one (`python -m pytest -m gpu`)."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.nn.functional import cross_entropy

import laconic
from laconic import reference
from laconic.cli import main
from laconic.methods import METHODS
from laconic.models.resnet import ResNet
from laconic.solvers import factored_prox
from laconic.solvers.gram import singular_values

from .models import assert_same

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
            loss = cross_entropy(model(x), y)
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


@pytest.fixture(params=["highest", "high"])
def products(request):
    """In float32, and in TF32 where PyTorch takes it."""
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("solver", ["svd", "gram", "gram-float64", "auto"])
@pytest.mark.parametrize("shape", [(64, 576), (300, 200), (1024, 1024)])
def test_singular_values_are_shrunk_as_by_the_oracle(solver, shape):
    x = torch.randn(shape)
    tau = 0.5 * float(torch.linalg.matrix_norm(x, 2))
    exact = reference.svt(x.double().numpy(), tau)
    got = laconic.svt(x.cuda(), tau, solver=solver)
    assert np.linalg.norm(got.x.double().cpu().numpy() - exact) <= 1e-5 * np.linalg.norm(exact)
    assert got.failures == ()


@pytest.mark.usefixtures("products")
def test_a_pair_is_shrunk_as_by_the_oracle():
    left, right = torch.randn(1, 300, 64), torch.randn(1, 64, 200)
    x = left.double() @ right.double()
    tau = 0.5 * float(torch.linalg.matrix_norm(x, 2))
    a, b, _ = factored_prox(left.cuda(), right.cuda(), laconic.L1(), tau)
    exact = reference.svt(x[0].numpy(), tau)
    assert np.linalg.norm((a @ b)[0].cpu().numpy() - exact) <= 1e-9 * np.linalg.norm(exact)


@pytest.mark.parametrize("shape", [(64, 576), (700, 600)])
def test_singular_values_are_those_of_float64(shape):
    x = torch.randn(1, *shape)
    exact = torch.linalg.svdvals(x.double())
    assert float((singular_values(x.cuda()).cpu() - exact).abs().max()) <= 1e-7 * float(exact.max())


def residual(widths=(16, 24, 32)) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(3, 10, widths, 8).cuda().to(memory_format=torch.channels_last)


def batch(step: int = 0, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(size, 3, 16, 16, generator=generator), torch.randint(10, (size,), generator=generator)
    return x.cuda(), y.cuda()


def compressor_of(model: nn.Module, optimizer: optim.Optimizer, steps: int, **options) -> laconic.Compressor:
    settings = {"budget": laconic.Budget(params=0.3), "structures": [laconic.LowRank(), laconic.Channels()]}
    return laconic.Compressor(model, optimizer, total_steps=steps, example_inputs=(batch()[0][:2],), **settings | options)


def train(net, optimizer: optim.Optimizer, steps: range, dtype: torch.dtype | None = None) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step % 8)
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_neurons_and_ranks_of_a_residual_network_go(dtype):
    """Convolutions are in TF32 here, which is PyTorch's own choice: what is removed is checked nevertheless."""
    assert torch.backends.cudnn.allow_tf32
    model = residual()
    optimizer = optim.AdamW(model.parameters(), lr=2e-3)
    compressor = compressor_of(model, optimizer, 60)
    train(model, optimizer, range(60), dtype)
    report = compressor.compact()
    assert report.params_after <= 0.3 * report.params_before
    assert any(g.kept < g.units for g in report.groups)
    assert not [n for n in report.notes if "differ" in n or "no longer" in n]


@pytest.fixture
def deterministic():
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("stop", [3, 25, 40])  # before the first cut, between cuts, when settled
def test_a_run_goes_on_from_its_state_exactly(stop, tmp_path):
    ends = []
    model = residual()
    optimizer = optim.AdamW(model.parameters(), lr=2e-3)
    compressor = compressor_of(model, optimizer, 48)
    train(model, optimizer, range(stop))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "compressor": compressor.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    train(model, optimizer, range(stop, 48))
    compressor.compact()
    ends.append(model.state_dict())
    model = residual()
    optimizer = optim.AdamW(model.parameters(), lr=2e-3)
    compressor = compressor_of(model, optimizer, 48)
    state = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
    compressor.load_state_dict(state["compressor"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, range(stop, 48))
    compressor.compact()
    ends.append(model.state_dict())
    assert_same(*ends)


def test_a_compact_model_is_loaded_on_another_device(tmp_path):
    model = residual()
    optimizer = optim.AdamW(model.parameters(), lr=2e-3)
    compressor = compressor_of(model, optimizer, 40)
    train(model, optimizer, range(40))
    report = compressor.compact()
    laconic.save(model, tmp_path / "small", report=report)
    on_cpu = laconic.load(tmp_path / "small", ResNet(3, 10, (16, 24, 32), 8)).eval()
    assert {p.device.type for p in on_cpu.parameters()} == {"cpu"}
    x, _ = batch()
    with torch.no_grad():
        wanted = model.eval()(x).cpu()
    torch.testing.assert_close(on_cpu(x.cpu()).detach(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))  # TF32
    again = laconic.load(tmp_path / "small", residual())
    assert_same(again.state_dict(), model.state_dict())


def test_a_compiled_network_is_cut():
    """A small one: it is compiled again after each cut, which takes longer than all the rest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 10)).cuda()
    compiled = torch.compile(model)
    optimizer = optim.AdamW(model.parameters(), lr=2e-3)
    compressor = compressor_of(compiled, optimizer, 12, every=6)
    losses = train(compiled, optimizer, range(12), torch.bfloat16)
    report = compressor.compact()
    assert report.params_after <= 0.3 * report.params_before
    assert losses[-1] < losses[0]


def test_the_network_is_as_fast_as_the_budget_in_milliseconds_says():
    """With something to compute: a layer that is launched and waits costs the same at any size."""
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(4096, 4096), nn.ReLU())], nn.Linear(4096, 10)).cuda()
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(4096, 4096, device="cuda")
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(latency=0.4), total_steps=20, example_inputs=(x,))
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    report = compressor.compact()
    dense = laconic.profile(
        nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(4096, 4096), nn.ReLU())], nn.Linear(4096, 10)).cuda(), (x,), latency=True
    )
    small = laconic.profile(model, (x,), latency=True)
    assert small.latency_ms <= 0.5 * dense.latency_ms, (small.latency_ms, dense.latency_ms, report.notes)


@pytest.fixture
def nccl(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("nccl")
def test_distributed_data_parallel():
    model = residual()
    box = {"net": nn.parallel.DistributedDataParallel(model, device_ids=[0])}
    optimizer = optim.AdamW(model.parameters(), lr=2e-3)
    again = lambda bare: box.update(net=nn.parallel.DistributedDataParallel(bare, device_ids=[0]))  # noqa: E731
    compressor = compressor_of(box["net"], optimizer, 40, rebuild=again)
    train(lambda x: box["net"](x), optimizer, range(40))
    report = compressor.compact()
    assert report.params_after <= 0.3 * report.params_before
    assert box["net"].module is model


@pytest.mark.usefixtures("nccl")
def test_fully_sharded():
    from torch.distributed.fsdp import fully_shard

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).cuda()

    model = net()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(16, 32, device="cuda")
    options = {"structures": laconic.LowRank(), "cut": "end", "budget": laconic.Budget(params=0.5)}
    compressor = laconic.Compressor(model, optimizer, total_steps=20, example_inputs=(x,), **options)
    for _ in range(20):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    small = net()
    report = compressor.compact(into=small)
    assert report.params_after <= 0.5 * report.params_before
    assert sum(p.numel() for p in small.parameters()) == report.params_after


# ---- the trainers, in half precision --------------------------------------------------------------------------------

trainers = pytest.mark.filterwarnings("ignore")


@trainers
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_lightning(precision, tmp_path):
    from .lightning_worker import Module, compression, fit

    class InFloat(Module):
        def __init__(self):
            super().__init__()
            self.net.float()
            self.example_input_array = torch.zeros(1, 20)

        def training_step(self, batch, index):
            return cross_entropy(self.net(batch[0].to(next(self.parameters()).dtype)), batch[1])

    callback = compression(directory=tmp_path / "compact")
    module = fit(callback, tmp_path, InFloat(), accelerator="gpu", precision=precision, every_epoch=True)
    assert callback.report.params_after <= 0.25 * callback.report.params_before
    for epoch in (3, 5):
        again = compression()
        resumed = fit(again, tmp_path, InFloat(), accelerator="gpu", precision=precision, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert again.report.params_after == callback.report.params_after
        assert_same(resumed.state_dict(), module.state_dict())


@trainers
@pytest.mark.parametrize("options", [{}, {"fp16": True}, {"bf16": True}], ids=["float32", "fp16", "bf16"])
def test_the_trainer_of_hugging_face(options, tmp_path):
    from accelerate.state import AcceleratorState

    from . import test_trainers as t

    AcceleratorState._reset_state(reset_partial_state=True)  # tests before this one have one of the CPU
    model, again = t.Classifier().float(), t.Classifier().float()
    callback = t.hf_callback(directory=tmp_path / "compact", example_inputs=torch.zeros(1, 20))
    trainer = t.hf_trainer(callback, tmp_path, model, t.in_float(), use_cpu=False, **options)
    trainer.train()
    assert next(model.parameters()).device.type == "cuda"
    assert callback.report.params_after <= 0.25 * callback.report.params_before
    checkpoint = str(tmp_path / "checkpoint-80")
    other = t.hf_callback(example_inputs=torch.zeros(1, 20), resume_from_checkpoint=checkpoint)
    t.hf_trainer(other, tmp_path, again, t.in_float(), use_cpu=False, **options).train(resume_from_checkpoint=checkpoint)
    assert_same(again.state_dict(), model.state_dict())
    AcceleratorState._reset_state(reset_partial_state=True)


@trainers
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_accelerate(precision, tmp_path):
    import accelerate
    from accelerate.state import AcceleratorState

    from laconic.integrations.accelerate import register_for_checkpointing

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision=precision)
    model = residual()
    optimizer = optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    compressor = compressor_of(model, optimizer, 40)
    register_for_checkpointing(accelerator, compressor)
    for step in range(40):
        x, y = batch(step % 8)
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(tmp_path / "end"))
    report = compressor.compact()
    assert report.params_after <= 0.3 * report.params_before
    assert any(g.kept < g.units for g in report.groups)
    AcceleratorState._reset_state(reset_partial_state=True)
