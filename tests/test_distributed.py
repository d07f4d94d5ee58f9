"""Two processes end with the same model, and with the one that a single process gets from the whole batch."""

import pytest
import torch

from .distributed_worker import net, text_net, train
from .models import assert_same
from .processes import POSSIBLE, two_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not POSSIBLE, reason="needs torch.distributed with gloo, and fork"),
]


MODES = ("strength-ddp", "budget-ddp", "even-ddp", "strength-fsdp", "end-fsdp")


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    """What the two processes ended with, in every mode."""
    out = tmp_path_factory.mktemp("processes")
    two_processes("distributed_worker", str(out), *MODES)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_end_as_one(mode, processes):
    first, second = (found[mode] for found in processes)
    assert_same(first, second)
    alone = train(mode.partition("-")[0])
    assert first["ranks"] == alone["ranks"]
    assert first["params"] == alone["params"]
    dense = text_net if mode == "even-ddp" else net
    assert alone["params"] < sum(p.numel() for p in dense().parameters())
    assert first["compact"].keys() == alone["compact"].keys()
    rounding = {"rtol": 0, "atol": 1e-4} if mode == "even-ddp" else {"rtol": 1e-6, "atol": 1e-8}  # covariances are sums of float32
    torch.testing.assert_close(first["outputs"], alone["outputs"], **rounding)
    if mode not in ("budget-ddp", "even-ddp"):  # factors are unique up to the sign of a direction
        for name, value in alone["trained"].items():
            torch.testing.assert_close(first["trained"][name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


REFUSALS = {
    "ddp": "2 processes: a cut in mid-run makes new parameters, so pass rebuild=",
    "bare": "2 processes: a cut in mid-run makes new parameters, so pass rebuild=",
    "fsdp": 'a sharded model (FSDP2) cannot be cut in mid-run: cut="end"',
    "in place": "cannot be cut in place: compact(into=MyNet())",
    "other class": "into=: not of the class of the trained model",
    "latency": "cannot be timed as it will be served",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused_in_one_line(case, processes):
    for found in processes:
        assert REFUSALS[case] in found["refusals"][case]
        assert "\n" not in found["refusals"][case]


def test_running_checkpoints_keep_what_each_process_has_of_its_own(processes):
    assert [found["checkpoints"] for found in processes] == [{"step": 7, "random": True, "model": True}] * 2
