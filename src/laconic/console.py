"""What a person sees in the terminal while something long runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from .training import Progress, Report

console = Console(stderr=True)


def duration(seconds: float) -> str:
    """`75` -> `1:15`."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"


@contextmanager
def progress_bar(title: str, show: bool = True) -> Iterator[Report]:
    """A bar with loss, accuracy, current size and time left; nothing at all where `show` is False."""
    if not show:
        yield lambda progress: None
        return
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(title, state="")

        def report(p: Progress) -> None:
            right = f"acc {p.accuracy:.3f}" if p.accuracy is not None else "acc   -  "
            left = duration(p.seconds_left)
            bar.update(
                task, total=p.total_steps, completed=p.step, state=f"loss {p.loss:6.3f}  {right}  {p.params:,} parameters  {left} left"
            )

        yield report


@contextmanager
def queue_bar(total: int, show: bool = True) -> Iterator[Callable[[str, bool], None]]:
    """A bar over runs, with the time that those left would take; call it after each with its name, and whether it took time."""
    if not show:
        yield lambda name, ran: None
        return
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    with Bar(*columns, console=console) as bar:
        task, start, ran_so_far, done = bar.add_task("", total=total, state=""), monotonic(), 0, 0

        def advance(name: str, ran: bool) -> None:
            nonlocal ran_so_far, done
            ran_so_far, done = ran_so_far + ran, done + 1
            each = (monotonic() - start) / max(ran_so_far, 1)
            bar.update(task, completed=done, state=f"{name}  about {duration(each * (total - done))} left")

        yield advance
