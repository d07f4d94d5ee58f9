"""Draw the pictures of the documentation from committed results.

python experiments/plots.py [--out docs/images]
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import tyro
from ablations import DEFAULTS, FACTORS
from matplotlib.figure import Figure
from render import SAME_NETWORK, load, side_by_side, spread, times_of, variant_runs

from laconic.methods import METHODS
from laconic.schedule import Schedule

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "laconic"  # the same bytes for the same results
mpl.rcParams["svg.fonttype"] = "none"

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"


@dataclass(frozen=True)
class Options:
    """Where to."""

    out: Path = ROOT / "docs" / "images"
    recipe: str = "cifar10"


def result(recipe: str, method: str, seed: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / recipe / f"{method}-seed{seed}.json").read_text())
    return content


def steps_in(run: dict[str, Any]) -> int:
    """Steps of the whole run, from the last epoch's: the recipes drop incomplete batches."""
    return int(run["total_steps"])


def ranks(run: dict[str, Any]) -> Figure:
    """Rank of every layer that was cut, over the run."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    total = steps_in(run)
    for name, final in run["ranks"].items():
        points = [(h["step"] / total, h["ranks"][f"{name}.weight"]) for h in run["history"] if f"{name}.weight" in h["ranks"]]
        if final is not None and points:
            axes.step([*(p for p, _ in points), 1.0], [*(r for _, r in points), final], where="post", label=f"{name}: rank {final}")
    phases(axes, run)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="part of the run", ylabel="rank", xlim=(0, 1))
    axes.legend(frameon=False)
    return figure


def controller(run: dict[str, Any]) -> Figure:
    """What the controller saw (the gap, and the line it is steered along) and what it did (the strength)."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, layout="constrained")
    total = steps_in(run)
    seen = [(h["step"] / total, h["gap"], h["strength"]) for h in run["history"] if h["gap"] is not None]
    times = [t for t, _, _ in seen]
    top.plot(times, [g for _, g, _ in seen], marker=".", label="gap: what a cut to the budget would lose now")
    schedule, first, last = schedule_of(run), max(seen[0][1], 0.1), 0.1
    warmup, settle = schedule.warmup, schedule.settle
    top.plot(
        times, [math.exp(math.log(first) + (t - warmup) / (settle - warmup) * math.log(last / first)) for t in times], "--", label="planned"
    )
    top.set(yscale="log", ylabel="gap")
    top.legend(frameon=False)
    bottom.plot(times, [s for _, _, s in seen], marker=".", color="C2")
    bottom.set(yscale="log", ylabel="strength", xlabel="part of the run", xlim=(0, 1))
    for axes in (top, bottom):
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        phases(axes, run)
    return figure


def accuracy(runs: dict[str, dict[str, Any]], seconds: dict[str, float]) -> Figure:
    """Test accuracy against training time in units of the dense run's."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for label, run in runs.items():
        share = [t / run["curve"]["seconds"][-1] for t in run["curve"]["seconds"]]
        method = run["method"]
        times = [s * seconds[method] / seconds["dense"] for s in share]
        axes.plot(times, [100 * a for a in run["curve"]["accuracy"]], marker=".", label=label)
    axes.set(xlabel="training time, dense = 1", ylabel="test accuracy, %")
    axes.legend(frameon=False)
    return figure


def pareto(task: str) -> Figure:
    """Test accuracy against the share of the parameters: mean and standard deviation over the seeds."""
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    found = {share: load(recipe) for share, recipe in ((0.25, task), (0.1, f"{task}-tenth"), (0.05, f"{task}-twentieth"))}
    for method in ("laconic", "thin-long", "thin", "torch-pruning", "low-rank", "channels"):
        points = [(share, runs[method]) for share, runs in found.items() if method in runs]
        shares, means, spreads = ([f(p) for p in points] for f in (itemgetter(0), lambda p: mean_of(p[1]), lambda p: spread_of(p[1])))
        heavy = {"linewidth": 2.5, "color": "black"} if method == "laconic" else {}
        axes.errorbar(shares, means, spreads, marker="o", capsize=3, label=METHODS[method].label, **heavy)
    axes.axhline(mean_of(found[0.25]["dense"]), color="0.6", linestyle="--", label="dense")
    axes.set(xscale="log", xlabel="parameters, share of dense", ylabel="test accuracy, %")
    axes.set_xticks(list(found), [f"{share:g}" for share in found])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def latency(task: str) -> Figure:
    """Test accuracy against what the network takes for a batch of 64, beside dense: budgets in parameters (hollow), in milliseconds (full)."""
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    colors = {"laconic": "black", "thin-long": "C0", "low-rank": "C3", "channels": "C4"}
    points: dict[str, list[tuple[float, float, float, str]]] = {method: [] for method in colors}
    for recipe in (task, f"{task}-tenth", f"{task}-twentieth"):
        runs, ms = load(recipe), times_of(recipe)["b64"]
        for method in colors.keys() & runs.keys():
            network = SAME_NETWORK.get(method, method)
            if network in ms:
                points[method].append((ms[network] / ms["dense"], mean_of(runs[method]), spread_of(runs[method]), "none"))
    for recipe in (f"{task}-latency", f"{task}-latency-quarter"):
        runs, beside = load(recipe), side_by_side(recipe)
        for method in colors.keys() & runs.keys() & beside.keys():
            points[method].append((beside[method], mean_of(runs[method]), spread_of(runs[method]), "full"))
    for method, color in colors.items():
        for i, (x, y, error, fill) in enumerate(points[method]):
            label = METHODS[method].label if i == 0 else None
            axes.errorbar([x], [y], [error], marker="o", capsize=3, color=color, fillstyle=fill, linestyle="", label=label)
    axes.axhline(mean_of(load(task)["dense"]), color="0.6", linestyle="--", label="dense")
    axes.set(xscale="log", xlabel="milliseconds, share of dense", ylabel="test accuracy, %")
    axes.set_xticks(ticks := [0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0], [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def curves(recipe: str) -> Figure:
    """Test accuracy after every epoch against training time in units of the dense run's: mean, and a band of one standard deviation."""
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    results, seconds = load(recipe), times_of(recipe)["train"]
    for method, color in (("dense", "0.6"), ("thin-long", "C0"), ("laconic", "black")):
        accuracies = [[100 * a for a in run["curve"]["accuracy"]] for run in results[method]]
        # an epoch takes as long as its share of the run's own clock
        shares = [
            statistics.mean(run["curve"]["seconds"][k] / run["curve"]["seconds"][-1] for run in results[method])
            for k in range(len(accuracies[0]))
        ]
        times = [share * seconds.get(method, 1.0) for share in shares]
        means = [statistics.mean(column) for column in zip(*accuracies, strict=True)]
        spreads = [statistics.stdev(column) for column in zip(*accuracies, strict=True)]
        axes.plot(times, means, color=color, label=METHODS[method].label)
        axes.fill_between(
            times,
            [m - s for m, s in zip(means, spreads, strict=True)],
            [m + s for m, s in zip(means, spreads, strict=True)],
            color=color,
            alpha=0.2,
        )
    axes.set(xlabel="training time, dense = 1", ylabel="test accuracy, %", ylim=(max(0.0, means[0] - 5), None))
    axes.legend(frameon=False)
    return figure


def ablations(recipe: str) -> Figure:
    """A panel for each factor: its variants, mean and standard deviation over the seeds; the default is filled, and drawn through all of them."""
    figure, panels = plt.subplots(3, 3, figsize=(11, 9), sharey=True, layout="constrained")
    default = variant_runs(recipe, "default")
    for axes, (factor, variants) in zip(panels.flat, FACTORS.items(), strict=True):
        axes.axhline(mean_of(default), color="0.8")
        for at, variant in enumerate(variants):
            mine = variant == DEFAULTS[factor]
            runs = default if mine else variant_runs(recipe, f"{factor}-{variant}")
            if runs:
                axes.errorbar(
                    [at], [mean_of(runs)], [spread_of(runs)], marker="o", capsize=3, color="black", fillstyle="full" if mine else "none"
                )
        axes.set_title(factor, fontsize=10)
        axes.set_xticks(range(len(variants)), list(variants), rotation=30, ha="right", fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy, %")
    return figure


def mean_of(runs: list[dict[str, Any]]) -> float:
    return 100 * statistics.mean(r["metrics"]["accuracy"] for r in runs)


def spread_of(runs: list[dict[str, Any]]) -> float:
    return 100 * spread(runs)


def schedule_of(run: dict[str, Any]) -> Schedule:
    """The recipe's, or that of ranks and neurons where it names none."""
    recipe = run["recipe"]
    return Schedule(warmup=recipe["warmup"], settle=recipe["settle"]) if recipe["settle"] else Schedule()


def phases(axes: Any, run: dict[str, Any]) -> None:
    for share in (schedule_of(run).warmup, schedule_of(run).settle):
        axes.axvline(share, color="0.7", linewidth=1)


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    run = result(options.recipe, "laconic")
    labels = {"dense": "dense", "thin-long": "thin dense, for as long", "laconic": "laconic, a quarter of the parameters"}
    times = json.loads((RESULTS / options.recipe / "times.json").read_text())["train_seconds"]
    pictures = {
        "ranks": ranks(run),
        "controller": controller(run),
        "accuracy": accuracy({label: result(options.recipe, method) for method, label in labels.items()}, times),
    }
    for task in ("cifar10", "scene"):
        pictures |= {f"pareto-{task}": pareto(task), f"curves-{task}": curves(f"{task}-tenth")}
        if side_by_side(f"{task}-latency"):
            pictures[f"latency-{task}"] = latency(task)
        if variant_runs(f"{task}-tenth", "default"):
            pictures[f"ablations-{task}"] = ablations(f"{task}-tenth")
    for name, figure in pictures.items():
        figure.savefig(options.out / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Options))
