"""One of two processes of tests/test_distributed.py: trains as it is told and writes what it has in the end."""

from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import laconic
from laconic import timing
from laconic.models import GPT

STEPS = 24


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 6)).double()


def text_net() -> nn.Module:
    torch.manual_seed(0)
    return GPT(6, context=12, layers=1, width=32, heads=2, hidden=64).double()


def text_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(6, (16, 12), generator=generator), torch.randn(16, 12, 6, generator=generator, dtype=torch.float64)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 12, generator=generator, dtype=torch.float64), torch.randn(16, 6, generator=generator, dtype=torch.float64)


def train(mode: str, rank: int = 0, world: int = 1) -> dict:
    """With made-up times of layers, in proportion to their parameters. In the second process pairs take longer: the first one's count."""

    def times(module, unfolding, shape, break_even, training):
        ranks = timing.grid(break_even)
        return timing.RankTimes(unfolding.dense_params, ranks, tuple((1 + 9 * rank) * r * unfolding.unit_params for r in ranks))

    with mock.patch("laconic.compressor.layer_times", times):
        return trained(mode, rank, world)


def trained(mode: str, rank: int, world: int) -> dict:
    """`strength`, `budget` (cuts in mid-run), `even` (a transformer, along principal axes) or `end`; alone, or as one of `world` processes under DDP or `fsdp`."""
    kind, _, wrapper = mode.partition("-")
    build, draw = (text_net, text_batch) if kind == "even" else (net, batch)
    model = build()
    box = {"model": model}
    if wrapper == "ddp":
        box["model"] = DistributedDataParallel(model)
    elif wrapper == "fsdp":
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    options = {
        "strength": {"structures": laconic.LowRank(strength=3.0, penalty=laconic.L1()), "every": 4},
        "budget": {"budget": laconic.Budget(params=0.5), "total_steps": STEPS, "every": 2},
        "even": {"budget": laconic.Budget(params=0.5), "total_steps": STEPS},
        # FSDP2 leaves neurons alone
        "end": {"structures": laconic.LowRank(), "budget": laconic.Budget(params=0.5), "total_steps": STEPS, "every": 4, "cut": "end"},
    }[kind]
    if kind in ("budget", "even") and world > 1:
        options["rebuild"] = lambda bare: box.update(model=DistributedDataParallel(bare))
    compressor = laconic.Compressor(box["model"], optimizer, example_inputs=(draw(0)[0],), **options)
    for step in range(STEPS):
        x, y = (part.chunk(world)[rank] for part in draw(step))
        nn.functional.mse_loss(box["model"](x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert held == {id(p) for p in box["model"].parameters()}, "the optimizer holds other parameters than the model"
    weights = {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in model.state_dict().items()}
    result = build() if wrapper == "fsdp" else model
    report = compressor.compact(**({"into": result} if wrapper == "fsdp" else {}), **({"energy": 0.8} if kind == "strength" else {}))
    ranks = {x.name: x.rank for x in report.layers}
    with torch.no_grad():
        outputs = result(draw(99)[0])
    return {"trained": weights, "compact": dict(result.state_dict()), "outputs": outputs, "ranks": ranks, "params": report.params_after}


def refused(build) -> str:
    try:
        build()
    except laconic.LaconicError as error:
        return str(error)
    return "not refused"


def refusals() -> dict:
    budget = {"budget": laconic.Budget(params=0.5), "total_steps": STEPS}
    model = net()
    wrapped = DistributedDataParallel(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    sharded = fully_shard(net())
    its_optimizer = optim.SGD(sharded.parameters(), lr=0.1)
    late = laconic.Compressor(sharded, its_optimizer, **budget, cut="end")
    return {
        "ddp": refused(lambda: laconic.Compressor(wrapped, optimizer, **budget)),
        "bare": refused(lambda: laconic.Compressor(model, optimizer, **budget)),
        "fsdp": refused(lambda: laconic.Compressor(sharded, its_optimizer, **budget)),
        "in place": refused(late.compact),
        "other class": refused(lambda: late.compact(into=nn.Sequential(nn.Linear(3, 3)))),
        "latency": refused(
            lambda: laconic.Compressor(sharded, its_optimizer, budget=laconic.Budget(latency=0.5), total_steps=9, cut="end", example_inputs=batch(0)[:1])
        ),
    }  # fmt: skip


def checkpoints(out: Path) -> dict:
    """Both processes save and resume; each has its own random numbers back."""
    torch.manual_seed(dist.get_rank())
    model = net()
    torch.manual_seed(dist.get_rank())
    laconic.RunCheckpoints(out / "run", DistributedDataParallel(model)).save(7)
    wanted = torch.rand(3)
    fresh = nn.Sequential(*net())
    for p in fresh.parameters():
        p.data.zero_()
    found = laconic.RunCheckpoints(out / "run", fresh).resume()
    return {
        "step": found[0],
        "random": torch.equal(torch.rand(3), wanted),
        "model": all(map(torch.equal, fresh.parameters(), model.parameters())),
    }


def main(out: str, *modes: str) -> None:
    dist.init_process_group("gloo")
    content = {mode: train(mode, dist.get_rank(), dist.get_world_size()) for mode in modes}
    content |= {"refusals": refusals(), "checkpoints": checkpoints(Path(out))}
    torch.save(content, Path(out) / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
