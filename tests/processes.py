"""Two processes that train one model together.

python processes.py WORKER ARGUMENT ...
"""

import importlib
import os
import signal
import socket
import subprocess
import sys

import torch.distributed as dist

POSSIBLE = dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")
SECONDS = 200


def two_processes(worker: str, *arguments: str) -> None:
    """Runs `main(*arguments)` of a module beside this one twice, with what torchrun puts in the environment."""
    done = subprocess.run([sys.executable, __file__, worker, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def main(worker: str, *arguments: str) -> int:
    """Torchrun takes seconds to start, and each of its processes to import what it needs: this one forks when all is there."""
    importlib.import_module("torch._dynamo")  # an optimizer imports it
    module = importlib.import_module(worker)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    for rank in range(2):
        if not os.fork():
            signal.alarm(SECONDS)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            module.main(*arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            # Groups that models still hold outlive this, and gloo's threads sometimes abort the interpreter on its way out.
            os._exit(0)
    return sum(os.wait()[1] != 0 for _ in range(2))


if __name__ == "__main__":
    importlib.import_module("torch").set_num_threads(1)
    sys.exit(main(*sys.argv[1:]))
