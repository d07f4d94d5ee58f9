"""The command line: functions are commands, their docstrings the help.

Results go to standard output, everything else to standard error. Exit status 0: done; 2: bad input, with one clear
line; 130: interrupted, with the place of the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json as jsonlib
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import nn
from tyro.conf import Positional

from . import checkpoint
from .bench import claimed, execute, grid, summary, trials
from .budget import Budget
from .compaction import compress as compress_model
from .console import console, progress_bar, queue_bar
from .data import Dataset, load_dataset
from .distributed import rank, world_size
from .errors import CheckpointError, CheckpointNotFoundError, InvalidValueError, LaconicError, MissingExtraError, nearest
from .measure import count_params
from .methods import METHODS, Trained, build, compressor_for, cut_after_training, example
from .recipe import Recipe, load_recipe, shipped_recipes
from .report import CompactReport, comparison_table, layer_table, render
from .results import evaluate, machine, make_result, result_path, versions, write_json
from .search import Trial, smallest
from .structures import LowRank
from .training import Restart, TrainingInterrupted, accuracy, fit, join, make_optimizer


def demo(out: Path = Path("laconic-demo"), seed: int = 0, json: bool = False) -> None:
    """Train, shrink, verify, save, reload and time a network on handwritten digits, beside its rivals.

    Example: laconic demo --out laconic-demo

    Args:
        out: where the compact model and the report go.
        seed: of initialisation and batches.
        json: print JSON instead of a table.
    """
    recipe = load_recipe("digits")
    data = load_dataset(recipe.task)
    rows: list[dict[str, Any]] = []
    for method in ("svd", "thin", "laconic"):
        for name, ours in runs(method, data, recipe, seed, out, show=not json):
            rows.append({"method": METHODS[name].label, **evaluate(ours, data)})
    assert ours.report is not None
    folder = checkpoint.save(ours.model, out / "model", report=ours.report.to_json())
    page = write_page(out / "report.html", ours.report, "Handwritten digits", rows, context(recipe, seed))
    again = checkpoint.load(folder, build(data, recipe, seed))
    reloaded = accuracy(again, data.test_x, data.test_y)
    if reloaded != rows[-1]["accuracy"]:
        raise CheckpointError(f"the reloaded model has accuracy {reloaded}, the saved one {rows[-1]['accuracy']}")
    if json:
        show_json({"rows": rows, "model": str(folder), "report": str(page) if page else None, "reloaded_accuracy": reloaded})
        return
    out_console = Console()
    out_console.print(comparison_table(rows))
    out_console.print(layer_table(ours.report))
    print(f"compact model: {folder}   (reloaded: accuracy {reloaded:.4f}, the same)")
    print(f"report: {page}" if page else "report: pip install 'laconic[plot]' for the HTML page")


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
    """Train by a recipe: a TOML file, or one of the shipped `digits`, `scene`, `cifar10`.

    Example: laconic train scene --data ../shared/data --params 0.25

    Several processes: torchrun --nproc-per-node 8 -m laconic train imagenet-resnet50 --data path/to/data --device cuda

    Args:
        recipe: file or name.
        out: the model, the report and the result go to OUT/<recipe>/<method>-seed<seed>/.
        method: laconic, low-rank, channels (laconic with one structure), late (cut last); or a rival: dense, svd (dense, then cut;
            gives both), svd-energy and svd-activation (other ranks), svd-tuned, svd-energy-tuned, svd-activation-tuned (cut at
            half, trained on), thin (a smaller dense network), thin-long (for longer), distilled, found (laconic's shape from
            scratch), as-published, trp, lc, svd-training, spectral-decay, slorr-hoyer, pufferfish, cuttlefish, spectral-init,
            magnitude, tucker, cp, pat, torch-pruning, torch-pruning-taylor (the last five need the extra `rivals`).
        seed: of initialisation and batches.
        data: folder of the data sets; default: $LACONIC_DATA, data/, ../shared/data.
        params: budget as a fraction of the dense parameters, instead of the recipe's.
        init: start from these weights: a .safetensors or .pt file, or a saved model.
        setting: of a rival, instead of its tuned one: what its file names first.
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
    if params is not None:
        Budget(params=params)  # range check, before anything is loaded
        chosen = dataclasses.replace(chosen, params=params)
    if init is not None:
        chosen = dataclasses.replace(chosen, init=str(init))
    if setting:
        chosen = dataclasses.replace(chosen, setting=setting)
    check_method(method)
    if checkpoint_every < 0:
        raise InvalidValueError(f"checkpoint_every = {checkpoint_every}: must be at least 1, or 0 for once per epoch")
    if threads:
        torch.set_num_threads(threads)
    place = join(device)
    first, times = rank() == 0, times and world_size() == 1
    console.quiet = not first
    dataset = dataclasses.replace(load_dataset(chosen.task, data, chosen.train_limit or None, chosen.size), device=place)
    if validation:
        dataset = dataset.validation()
    rows = []
    for name, trained in runs(method, dataset, chosen, seed, out, show=first and not json, every=checkpoint_every, resume=resume):
        folder = result_path(out, chosen, name, seed).with_suffix("")
        result = make_result(chosen, name, seed, evaluate(trained, dataset, times), trained) | {"validation": validation}
        if not first:
            continue
        checkpoint.save(trained.model, folder / "model", report=trained.report.to_json() if trained.report else None)
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
        Console().print(layer_table(trained.report))
    print(f"model: {folder / 'model'}   result: {folder / 'result.json'}" + (f"   report: {page}" if page else ""))


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
    chosen = dataclasses.replace(load_recipe(recipe), init=str(init))
    chosen = dataclasses.replace(chosen, epochs=epochs or max(1, chosen.epochs // 4))
    if threads:
        torch.set_num_threads(threads)
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
    checkpoint.save(found.model, folder / "model", report=found.report.to_json() if found.report else None)
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
        Console().print(layer_table(found.report))
    print(
        f"parameters {count_params(dense):,} -> {count_params(found.model):,}; test accuracy {right['dense']:.4f} -> {right['found']:.4f}"
    )
    print(f"model: {folder / 'model'}   result: {folder / 'result.json'}")


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
        recipes: files or names; none: all that are shipped for this tier.
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
    names = recipes or tuple(name for name in shipped_recipes() if load_recipe(name).tier == tier)
    if not names:
        raise InvalidValueError(f"tier = {tier!r}: no recipe is of this tier, only cpu and gpu have some")
    queue = (trials if tune else grid)(names, methods, seeds)
    if not queue:
        raise InvalidValueError(f"tune: nothing can be set of {', '.join(methods)}")
    options = ["--threads", str(threads), "--times" if times else "--no-times", *(["--data", str(data)] if data else [])]
    options += ["--device", device or ("cuda" if tier == "gpu" else "cpu")]
    failed = []
    with queue_bar(len(queue), show=not json) as advance:
        for run in queue:
            with claimed(run.path(results)) as ours:
                done = execute(run, results, options) if ours else None
            advance(f"{run.recipe} {run.method} {run.seed}", done is not None)
            if done is not None and done.returncode:
                failed.append(f"{run.recipe} {run.method} seed {run.seed}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    rows = {recipe: summary(results, recipe) for recipe in names}
    if json:
        show_json({"rows": rows, "failed": failed})
    for recipe in () if json else [name for name in names if rows[name]]:
        print(recipe)
        Console().print(comparison_table(rows[recipe]))
    if failed:
        raise LaconicError(f"{len(failed)} of {len(queue)} runs failed, the others are there: {'; '.join(failed)}")


def check_method(method: str) -> None:
    if method not in METHODS:
        raise InvalidValueError(f"method = {method!r} is unknown{nearest(method, METHODS)}")


RUNNING = "running"  # the folder of a run's checkpoints


def runs(
    method: str, data: Dataset, recipe: Recipe, seed: int, out: Path, show: bool, every: int = 0, resume: bool = False
) -> Iterator[tuple[str, Trained]]:
    """Train by a method. `svd` starts from the dense network, so that one comes first, as a result of its own."""
    names = ("dense", "svd") if method == "svd" else (method,)
    base: Trained | None = None
    for name in names:
        folder = result_path(out, recipe, name, seed).with_suffix("")
        if (there := any((folder / RUNNING).glob("step-*"))) != resume:
            console.print(
                f"{folder / RUNNING}: the checkpoints of an earlier run are removed (--resume would go on from them)"
                if there
                else f"{folder / RUNNING}: no checkpoint to resume from, starting from the beginning"
            )
        restart = Restart(folder / RUNNING, every, resume, {"recipe": dataclasses.asdict(recipe), "method": name, "seed": seed})
        with progress_bar(name, show and name != "svd") as report, interruptible(folder), told():
            base = cut_after_training(base, data, recipe) if base else METHODS[name].train(data, recipe, seed, report, restart)
        yield name, base


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Warnings as lines on the console."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: console.print(f"note: {message}")
        yield


def compress(
    factory: Positional[str],
    weights: Path,
    out: Path,
    params: float | None = None,
    macs: float | None = None,
    energy: float | None = None,
    input_shape: tuple[int, ...] = (),
    matricization: str = "out,in*kh*kw",
    json: bool = False,
) -> None:
    """Cut a trained model, without training: build it, load its weights, choose ranks, verify, save.

    Example: laconic compress mypackage.models:resnet --weights model.safetensors --params 0.5 --out compact

    Args:
        factory: `package.module:callable`; called without arguments it returns the model.
        weights: a .safetensors file, or a .pt file that loads with weights_only=True.
        out: directory of the compact model and its report.
        params: budget as a fraction of the parameters.
        macs: budget as a fraction of the MACs; needs --input-shape.
        energy: instead of a budget, the share of squared singular values that each layer keeps.
        input_shape: of one input, batch first, e.g. 1 3 32 32.
        matricization: of convolutions: "out,in*kh*kw", "out*kh,in*kw", or "auto".
        json: print the report as JSON.
    """
    model = checkpoint.load_weights(call_factory(factory), weights)
    budget = Budget(params=params, macs=macs) if params is not None or macs is not None else None
    inputs = (torch.randn(input_shape, generator=torch.Generator().manual_seed(0)),) if input_shape else None
    with console.status("cutting"):
        report = compress_model(model, LowRank(matricization=matricization), budget, energy=energy, example_inputs=inputs)
        folder = checkpoint.save(model, out, report=report.to_json())
    page = write_page(folder.with_name(folder.name + "-report.html"), report, factory, None, {"weights": weights.name})
    if json:
        show_json({**report.to_json(), "model": str(folder)})
        return
    Console().print(layer_table(report))
    print(f"parameters {report.params_before:,} -> {report.params_after:,}; model: {folder}" + (f"; report: {page}" if page else ""))
    for note in report.notes:
        print(f"note: {note}")


def report(directory: Positional[Path], html: Path | None = None, json: bool = False) -> None:
    """Show what was done to a saved model.

    Example: laconic report laconic-demo/model --html report.html

    Args:
        directory: a saved model.
        html: also write the HTML page here (needs the extra `plot`).
        json: print the report as JSON.
    """
    if not directory.is_dir():
        raise CheckpointNotFoundError(f"{directory} does not exist or is not a directory: expected a saved model")
    manifest = checkpoint.read_manifest(directory)
    if "report" not in manifest:
        raise CheckpointError(f"{directory} was saved without a report: laconic.save(model, directory, report=report.to_json())")
    found = CompactReport.from_json(manifest["report"])
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(render(found, title=manifest["model"], context={"laconic": manifest["laconic"], "torch": manifest["torch"]}))
    if json:
        show_json(manifest["report"])
        return
    Console().print(layer_table(found))
    print(f"parameters {found.params_before:,} -> {found.params_after:,}")
    for note in found.notes:
        print(f"note: {note}")


class interruptible:  # noqa: N801 - used like a function
    """On Ctrl-C: save the model as it is, say where, leave with status 130."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TrainingInterrupted):
            place = checkpoint.save(error.model, self.folder / "interrupted")
            console.print(
                f"{error}; the model as it is now: {place} (laconic.load reads it); "
                "the same command with --resume goes on from the last running checkpoint"
            )
            raise SystemExit(130) from None


def call_factory(factory: str) -> nn.Module:
    """The model that `package.module:callable` returns."""
    module_name, _, attribute = factory.partition(":")
    if not module_name or not attribute:
        raise InvalidValueError(f"factory = {factory!r}: expected package.module:callable")
    sys.path.insert(0, "")  # modules beside the user, as with python -m
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidValueError(f"factory = {factory!r}: {error}") from None
    finally:
        sys.path.remove("")
    model = found()
    if not isinstance(model, nn.Module):
        raise InvalidValueError(f"factory = {factory!r} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def context(recipe: Recipe, seed: int) -> dict[str, Any]:
    return {"recipe": recipe.name, "seed": seed, **versions(), **machine()}


def write_page(path: Path, report: CompactReport, title: str, rows: list[dict[str, Any]] | None, about: dict[str, Any]) -> Path | None:
    """The HTML page; None, and a line that says why, where its extra is not installed."""
    try:
        page = render(report, title=title, comparison=rows, context=about)
    except MissingExtraError as error:
        console.print(f"no HTML page: {error}")
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    return path


def show_json(content: Any) -> None:
    print(jsonlib.dumps(content))


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo, "train": train, "search": search, "compress": compress, "report": report, "bench": bench,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `laconic`."""
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="laconic", args=arguments, description=__doc__)
    except LaconicError as error:
        print(f"laconic: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("laconic: interrupted; nothing had been trained that could be saved", file=sys.stderr)
        raise SystemExit(130) from None
