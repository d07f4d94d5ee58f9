"""Train, shrink, measure and report PyTorch models.

Results go to standard output, everything else to standard error. Exit status 0: done; 2: bad input, with one clear
line; 130: interrupted, with the place of the checkpoint.
"""  # the help: functions are commands, and their docstrings the rest of it

from __future__ import annotations

import sys
from collections.abc import Callable

import tyro

from ..errors import LaconicError, first_line
from .bench import bench
from .compress import compress
from .demo import demo
from .report import report
from .search import search
from .train import train

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo, "train": train, "search": search, "compress": compress, "report": report, "bench": bench,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `laconic`."""
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="laconic", args=arguments, description=__doc__)
    except (LaconicError, OSError) as error:  # of the operating system: a full disk, a file that may not be read
        print(f"laconic: {first_line(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("laconic: interrupted; nothing had been trained that could be saved", file=sys.stderr)
        raise SystemExit(130) from None
