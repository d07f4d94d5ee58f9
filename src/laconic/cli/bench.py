"""A grid of runs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from ..bench import claimed, execute, grid, self_contained, summary, trials
from ..console import console, queue_bar
from ..errors import InvalidValueError, LaconicError
from ..report import comparison_table
from .shared import check_method, check_seed, check_threads, show_json


def bench(
    recipes: Positional[tuple[str, ...]] = (),
    methods: tuple[str, ...] = ("svd", "thin", "thin-long", "laconic"),
    seeds: tuple[int, ...] = (0, 1, 2),
    tune: bool = False,
    results: Path = Path("results"),
    data: Path | None = None,
    tier: str = "cpu",
    device: str = "",
    threads: int = 0,
    times: bool = True,
    json: bool = False,
) -> None:
    """Run what is missing of a grid, recipe x method x seed; one result file each. Stop it and start it again at any moment.

    Example: laconic bench scene cifar10 --methods thin-long laconic --seeds 0 1 2 --threads 1 --no-times

    Args:
        recipes: files or names; none: all that are shipped for this tier, but those that start from trained weights.
        methods: as of `laconic train`; svd gives dense, too.
        seeds: of initialisation and batches.
        tune: instead, every method at each of its settings, measured on held-out training images.
        results: folder of the result files: RESULTS/<recipe>/<method>-seed<seed>.json. Several commands may share it.
        data: folder of the data sets; default: $LACONIC_DATA, data/, ../shared/data.
        tier: cpu (minutes on a core), or gpu (full published schedules).
        device: as of `laconic train`; default: cuda for the tier gpu, else cpu.
        threads: of PyTorch in each run; 0: as many as there are cores.
        times: measure latency; leave it out for runs that do not have the machine to themselves.
        json: print the means as JSON.
    """
    for method in methods:
        check_method(method)
    for seed in seeds:
        check_seed(seed)
    check_threads(threads)
    if not (methods and seeds):
        raise InvalidValueError("methods, seeds: give at least one of each, such as --methods thin-long laconic --seeds 0 1 2")
    names = recipes or self_contained(tier)
    if not names:
        raise InvalidValueError(f"tier = {tier!r}: no recipe is of this tier, only cpu and gpu have some")
    queue = (trials if tune else grid)(names, methods, seeds)
    if not queue:
        raise InvalidValueError(f"tune: nothing can be set of {', '.join(methods)}")
    options = ["--threads", str(threads), "--times" if times else "--no-times", *(["--data", str(data)] if data else [])]
    options += ["--device", device or ("cuda" if tier == "gpu" else "cpu")]
    failed, skipped = [], []
    with queue_bar(len(queue), show=not json) as advance:
        for run in queue:
            with claimed(run.path(results)) as ours:
                done = execute(run, results, options) if ours else None
            if done is None:
                skipped.append(run)
            advance(f"{run.recipe} {run.method} {run.seed}", done is not None)
            if done is not None and done.returncode:
                failed.append(f"{run.recipe} {run.method} seed {run.seed}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    elsewhere = [f"{run.recipe} {run.method} {run.seed}" for run in skipped if not run.path(results).exists()]
    if elsewhere:
        console.print(f"left to another queue, which is at work on them: {', '.join(elsewhere)}", markup=False)
    rows = {recipe: summary(results, recipe) for recipe in names}
    if json:
        show_json({"rows": rows, "failed": failed})
    for recipe in () if json else [name for name in names if rows[name]]:
        print(recipe)
        Console().print(comparison_table(rows[recipe]))
    if failed:
        raise LaconicError(f"{len(failed)} of {len(queue)} runs failed, the others are there: {'; '.join(failed)}")
