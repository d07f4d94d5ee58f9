"""One run by a recipe."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from .. import checkpoint
from ..budget import Budget
from ..console import console
from ..data import load_dataset
from ..distributed import rank, world_size
from ..errors import InvalidValueError
from ..methods import METHODS, at_own_rate
from ..recipe import load_recipe
from ..report import comparison_table
from ..results import evaluate, make_result, result_path, write_json
from ..training import join
from .shared import RUNNING, check_method, check_seed, context, runs, show_json, show_report, use_threads, write_page


def train(
    recipe: Positional[str],
    out: Path = Path("runs"),
    method: str = "laconic",
    seed: int = 0,
    data: Path | None = None,
    params: float | None = None,
    init: Path | None = None,
    setting: float = 0.0,
    validation: bool = False,
    results: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 0,
    device: str = "cpu",
    threads: int = 0,
    times: bool = True,
    json: bool = False,
) -> None:
    """Train by a recipe: a TOML file, or one that is shipped (`digits`, `scene-tenth`, ...: all in laconic/recipes/).

    Example: laconic train scene --data ../shared/data --params 0.25

    Several processes: torchrun --nproc-per-node 8 -m laconic train imagenet-resnet50 --data path/to/data --device cuda

    Args:
        recipe: file or name.
        out: the model, the report and the result go to OUT/<recipe>/<method>-seed<seed>/.
        method: laconic, low-rank, channels (laconic with one structure), unpressed, cut-once (without pressure), late (cut last); or a rival: dense, svd (dense, then cut;
            gives both), svd-energy and svd-activation (other ranks), svd-tuned, svd-energy-tuned, svd-activation-tuned (cut on
            the way, trained on), thin (a smaller dense network), thin-long (for longer), distilled, found (laconic's shape from
            scratch), found-widths (dense, with the widths of laconic's neurons alone), as-published, trp, lc, svd-training, spectral-decay, slorr-nuc, slorr-hoyer, slorr-hoyer-tuned, pufferfish, cuttlefish, spectral-init,
            magnitude, tucker, cp, pat, torch-pruning, torch-pruning-taylor (the last five need the extra `rivals`).
        seed: of initialisation and batches.
        data: folder of the data sets; default: $LACONIC_DATA, data/, ../shared/data.
        params: budget as a fraction of the dense parameters, instead of the recipe's.
        init: start from these weights: a .safetensors or .pt file, or a saved model.
        setting: of a rival, instead of its default: what its file names first.
        validation: for tuning: test on a part of the training set, and train on the rest.
        results: also write the result's JSON below this folder.
        resume: go on from the running checkpoints of this very run, after a Ctrl-C or a crash.
        checkpoint_every: steps between running checkpoints; 0: one per epoch.
        device: cpu, cuda, cuda:1, mps.
        threads: of PyTorch; 0: as it is.
        times: measure times; switch off when other things run on this machine. Several processes measure none.
        json: print the result as JSON, show no progress.
    """
    chosen = load_recipe(recipe)
    for base in (out, results):
        if base is not None:
            checkpoint.check_place(base / chosen.name)
    if params is not None:
        Budget(params=params)  # range check, before anything is loaded
        chosen = dataclasses.replace(chosen, params=params)
    if init is not None:
        chosen = dataclasses.replace(chosen, init=str(init))
    if setting:
        chosen = dataclasses.replace(chosen, setting=setting)
    check_method(method)
    chosen = at_own_rate(chosen, method)
    if checkpoint_every < 0:
        raise InvalidValueError(f"checkpoint_every = {checkpoint_every}: must be at least 1, or 0 for once per epoch")
    check_seed(seed)
    use_threads(threads)
    place = join(device)
    first, times = rank() == 0, times and world_size() == 1
    console.quiet = not first
    dataset = dataclasses.replace(load_dataset(chosen.task, data, chosen.train_limit or None, chosen.size), device=place)
    for note in dataset.notes:
        console.print(f"note: {note}", markup=False)
    if validation:
        dataset = dataset.validation()
    rows = []
    for name, trained in runs(method, dataset, chosen, seed, out, show=first and not json, every=checkpoint_every, resume=resume):
        folder = result_path(out, chosen, name, seed).with_suffix("")
        result = make_result(chosen, name, seed, evaluate(trained, dataset, times), trained, dataset.notes) | {"validation": validation}
        if not first:
            continue
        checkpoint.save(trained.model, folder / "model", report=trained.report)
        write_json(folder / "result.json", result)
        if results is not None:
            write_json(result_path(results, chosen, name, seed), result)
        shutil.rmtree(folder / RUNNING, ignore_errors=True)  # the run is over, and written
        rows.append({"method": METHODS[name].label, **result["metrics"]})
    if not first:
        return
    page = write_page(folder / "report.html", trained.report, chosen.name, rows, context(chosen, seed)) if trained.report else None
    if json:
        show_json(result)
        return
    Console().print(comparison_table(rows))
    if trained.report:
        show_report(trained.report)
    print(f"model: {folder / 'model'}   result: {folder / 'result.json'}" + (f"   report: {page}" if page else ""))
