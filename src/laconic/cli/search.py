"""The smallest model that is good enough."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn
from tyro.conf import Positional

from .. import checkpoint
from ..budget import Budget
from ..console import console, progress_bar
from ..data import load_dataset
from ..measure import count_params
from ..methods import at_own_rate, build, compressor_for, example
from ..recipe import load_recipe
from ..report import CompactReport
from ..results import result_path, write_json
from ..search import Trial, smallest
from ..training import accuracy, fit, make_optimizer
from .shared import check_seed, show_json, show_report, use_threads


def search(
    recipe: Positional[str],
    init: Path,
    max_loss: float = 0.005,
    currency: str = "params",
    epochs: int = 0,
    precision: float = 0.1,
    out: Path = Path("runs"),
    seed: int = 0,
    data: Path | None = None,
    threads: int = 0,
    json: bool = False,
) -> None:
    """The smallest model that loses at most MAX_LOSS of a trained one's accuracy, by a search over budgets.

    Each trial starts from the trained weights and trains a little while it shrinks. The accuracy that decides is that on
    training images held out from all trials; that on the test images is reported for the result alone. (If INIT was trained
    on all training images, its own accuracy on those held out is a little too good, and the search errs on the large side.)

    Example: laconic search digits --init runs/digits/dense-seed0/model --max-loss 0.01

    Args:
        recipe: file or name: the network, its data, how it is trained.
        init: trained dense weights: a .safetensors or .pt file, or a saved model.
        max_loss: accuracy that may be lost, as a share of the images.
        currency: params, macs or latency.
        epochs: of each trial; 0: a quarter of the recipe's.
        precision: stop when the best budget is known to this relative precision.
        out: the model and the result go to OUT/<recipe>/search-seed<seed>/.
        seed: of batches, and of what is held out.
        data: folder of the data sets.
        threads: of PyTorch; 0: as it is.
        json: print the result as JSON.
    """
    chosen = dataclasses.replace(at_own_rate(load_recipe(recipe), "laconic"), init=str(init))
    checkpoint.check_place(out / chosen.name)
    chosen = dataclasses.replace(chosen, epochs=epochs or max(1, chosen.epochs // 4))
    check_seed(seed)
    use_threads(threads)
    whole = load_dataset(chosen.task, data, chosen.train_limit or None, chosen.size)
    held = whole.validation(seed=seed)
    dense = build(held, chosen, seed)

    def shrink(model: nn.Module, budget: Budget) -> CompactReport:
        optimizer = make_optimizer(model, chosen)
        compressor = compressor_for(model, optimizer, held, chosen, budget)
        with progress_bar("trial", not json) as bar:
            fit(model, held, chosen, seed, optimizer, report=bar, compressor=compressor)
        return compressor.compact()

    def tell(trial: Trial) -> None:
        verdict = "good enough" if trial.good else "too small"
        console.print(f"{currency} {trial.budget:.4f}: accuracy {trial.score:.4f}, {verdict}")

    found = smallest(
        dense, lambda m: accuracy(m, held.test_x, held.test_y), max_loss,
        currency=currency, shrink=shrink, example_inputs=example(held), precision=precision, report=tell,
    )  # fmt: skip
    right = {k: accuracy(m, whole.test_x, whole.test_y) for k, m in (("dense", dense), ("found", found.model))}
    folder = result_path(out, chosen, "search", seed).with_suffix("")
    checkpoint.save(found.model, folder / "model", report=found.report)
    result = {
        "recipe": dataclasses.asdict(chosen),
        "seed": seed,
        "currency": currency,
        "budget": found.budget,
        "max_loss": max_loss,
        "held_out_accuracy": {"dense": found.dense_score, "found": found.score},
        "test_accuracy": right,
        "params": {"dense": count_params(dense), "found": count_params(found.model)},
        "trials": [dataclasses.asdict(t) for t in found.trials],
        "model": str(folder / "model"),
    }
    write_json(folder / "result.json", result)
    if json:
        show_json(result)
        return
    if found.report is None:
        print(f"no budget below 1 was good enough ({len(found.trials)} trials)")
    else:
        show_report(found.report)
    print(
        f"parameters {count_params(dense):,} -> {count_params(found.model):,}; test accuracy {right['dense']:.4f} -> {right['found']:.4f}"
    )
    print(f"model: {folder / 'model'}   result: {folder / 'result.json'}")
