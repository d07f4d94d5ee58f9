"""The main job in two minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from .. import checkpoint
from ..data import load_dataset
from ..errors import CheckpointError
from ..methods import METHODS, build
from ..recipe import load_recipe
from ..report import comparison_table
from ..results import evaluate
from ..training import accuracy
from .shared import check_seed, context, runs, show_json, show_report, write_page


def demo(out: Path = Path("laconic-demo"), seed: int = 0, json: bool = False) -> None:
    """Train, shrink, verify, save, reload and time a network on handwritten digits, beside its rivals.

    Example: laconic demo --out laconic-demo

    Args:
        out: where the compact model and the report go.
        seed: of initialisation and batches.
        json: print JSON instead of a table.
    """
    checkpoint.check_target(out / "model")
    check_seed(seed)
    recipe = load_recipe("digits")
    data = load_dataset(recipe.task)
    rows: list[dict[str, Any]] = []
    for method in ("svd", "thin", "laconic"):
        for name, ours in runs(method, data, recipe, seed, out, show=not json):
            rows.append({"method": METHODS[name].label, **evaluate(ours, data)})
    assert ours.report is not None
    folder = checkpoint.save(ours.model, out / "model", report=ours.report)
    page = write_page(out / "report.html", ours.report, "Handwritten digits", rows, context(recipe, seed))
    again = checkpoint.load(folder, build(data, recipe, seed))
    reloaded = accuracy(again, data.test_x, data.test_y)
    if reloaded != rows[-1]["accuracy"]:
        raise CheckpointError(f"the reloaded model has accuracy {reloaded}, the saved one {rows[-1]['accuracy']}")
    if json:
        show_json({"rows": rows, "model": str(folder), "report": str(page) if page else None, "reloaded_accuracy": reloaded})
        return
    Console().print(comparison_table(rows))
    show_report(ours.report)
    print(f"compact model: {folder}   (reloaded: accuracy {reloaded:.4f}, the same)")
    print(f"report: {page}" if page else "report: pip install 'laconic[plot]' for the HTML page")
