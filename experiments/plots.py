"""Draw the pictures of the documentation from committed results.

python experiments/plots.py [--out docs/images]
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import tyro
from matplotlib.figure import Figure

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
    warmup, settle, first, last = run["recipe"]["warmup"], run["recipe"]["settle"], max(seen[0][1], 0.1), 0.1
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


def phases(axes: Any, run: dict[str, Any]) -> None:
    for name in ("warmup", "settle"):
        axes.axvline(run["recipe"][name], color="0.7", linewidth=1)


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
    for name, figure in pictures.items():
        figure.savefig(options.out / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Options))
