"""Render the tables between `<!-- table: NAME -->` and `<!-- end -->` in the pages from the committed result files.

python experiments/render.py            write
python experiments/render.py --check    exit 1 and say which page differs
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from ablations import DEFAULTS, FACTORS, file_name
from scipy.stats import ttest_ind

from laconic.methods import METHODS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)
LABELS = {name: f"**{method.label}**" if name == "laconic" else method.label for name, method in METHODS.items()}
SET_TO = " = "
SHARED = {
    f"{task}-{part}": (task, "dense")
    for task in ("cifar10", "cifar10-full", "cifar10-finetune", "scene", "lenet-5", "lenet-300-100")
    for part in ("half", "quarter", "eighth", "tenth", "twentieth", "latency", "latency-quarter")
} | {  # recipes that differ in what does not concern a method share its runs
    "scene-twentieth-rate": ("scene-tenth-rate", "dense"),
    "cifar10-tenth-short-rate": ("cifar10-tenth-rate", "thin-long"),
    "shakespeare-eighth-rate": ("shakespeare-rate", "dense"),
    "shakespeare-sixteenth-rate": ("shakespeare-rate", "dense"),
    "shakespeare-eighth-gain": ("shakespeare-gain", "dense"),
    "shakespeare-sixteenth-gain": ("shakespeare-gain", "dense"),
    "shakespeare-finetune-gain": ("shakespeare-gain", "dense"),  # what they start from
    "shakespeare-finetune": ("shakespeare-rate", "dense"),
}
SAME_NETWORK = {"thin-long": "thin", "distilled": "thin"}  # not timed twice
TIMES_OF = {f"cifar10-full{part}": f"cifar10{part}" for part in ("", "-tenth")}  # the same network, in the same shares of a run

TASKS = {
    **{f"scene{part}": "photographs" for part in ("-half", "", "-eighth", "-tenth", "-twentieth", "-latency", "-latency-quarter")},
    "scene-vit": "photographs, small ViT",
    "dec3": "photographs, Dec_3",
    **{f"cifar10{part}": "CIFAR-10, part" for part in ("-half", "", "-tenth", "-twentieth", "-latency", "-latency-quarter")},
    **{f"cifar10-full{part}": "CIFAR-10, all" for part in ("", "-tenth")},
    "resnet20-tenth": "CIFAR-10, part, ResNet-20",
    "resnet20-full-tenth": "CIFAR-10, all, ResNet-20",
    **{f"lenet-300-100{part}": "MNIST, LeNet-300-100" for part in ("-quarter", "")},
    **{f"lenet-5{part}": "MNIST, LeNet-5" for part in ("-tenth", "")},
    "digits": "digits",
    **{f"shakespeare{part}": "Shakespeare, GPT (bits)" for part in ("", "-eighth", "-sixteenth")},
}
COSTS = {"params": "parameters", "macs": "MACs", "latency": "milliseconds"}


def load(recipe: str) -> dict[str, list[dict[str, Any]]]:
    """Results of one recipe by method (and by its setting, where that is not its default), in the order of LABELS, each sorted by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    shared, of = SHARED.get(recipe, ("-", "-"))
    for path in sorted([*(RESULTS / recipe).glob("*-seed*.json"), *(RESULTS / shared).glob(f"{of}-seed*.json")]):
        result = json.loads(path.read_text())
        if result.get("validation"):
            continue  # a trial, not a result
        setting = result["recipe"].get("setting")
        runs = found.setdefault(f"{result['method']}{SET_TO}{setting:g}" if setting else result["method"], [])
        if all(result["seed"] != other["seed"] for other in runs):  # svd writes dense again
            runs.append(result)
    order = sorted(found, key=lambda name: (list(LABELS).index(name.partition(SET_TO)[0]), name))
    return {name: sorted(found[name], key=lambda r: r["seed"]) for name in order}


def label(name: str) -> str:
    """Of a method, and of one with another setting than its default."""
    method, _, setting = name.partition(SET_TO)
    return LABELS[method] + f" ({setting})" * bool(setting)


def mean(runs: list[dict[str, Any]], metric: str) -> float | None:
    values = [r["metrics"].get(metric) for r in runs]
    return statistics.mean(values) if values and all(v is not None for v in values) else None


def spread(runs: list[dict[str, Any]], metric: str = "accuracy") -> float:
    """Sample standard deviation over the seeds."""
    return statistics.stdev(r["metrics"][metric] for r in runs) if len(runs) > 1 else 0.0


def percent(runs: list[dict[str, Any]]) -> str:
    """Mean accuracy with its spread; a single run has none."""
    return f"{100 * (mean(runs, 'accuracy') or 0):.2f}" + (f" ± {100 * spread(runs):.2f}" if len(runs) > 1 else "")


def is_text(results: dict[str, list[dict[str, Any]]]) -> bool:
    return next(iter(results.values()))[0]["task"] == "tiny-shakespeare"


def score(runs: list[dict[str, Any]], text: bool) -> str:
    """Accuracy in percent, or of a text bits per character."""
    return f"{mean(runs, 'bits') or 0:.3f}" + (f" ± {spread(runs, 'bits'):.3f}" if len(runs) > 1 else "") if text else percent(runs)


def ahead(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], text: bool, p: float | None = None) -> str:
    """Difference of the means, positive where laconic is better, and how likely chance alone would make it as large."""
    if not ours or ours is theirs:
        return "-"
    ours_mean, theirs_mean = (statistics.mean(scores(runs, text)) for runs in (ours, theirs))
    chance = "" if p is None else f" (p {'< 0.001' if p < 0.001 else f'= {p:.3f}' if p < 0.1 else f'= {p:.2f}'})"
    return f"{ours_mean - theirs_mean:+.{3 if text else 2}f}{chance}"


def scores(runs: list[dict[str, Any]], text: bool) -> list[float]:
    """What is better is larger."""
    return [-r["metrics"]["bits"] if text else 100 * r["metrics"]["accuracy"] for r in runs]


def chances(ours: list[dict[str, Any]], rows: dict[Any, list[dict[str, Any]]], text: bool) -> dict[Any, float]:
    """p of Welch's t-test of each row against ours, where both have three seeds or more and other networks; corrected for their number."""
    return holm(
        {
            name: float(ttest_ind(scores(ours, text), scores(runs, text), equal_var=False).pvalue)
            for name, runs in rows.items()
            if min(len(ours), len(runs)) >= 3 and not are_same(ours, runs)
        }
    )


def holm(single: dict[Any, float]) -> dict[Any, float]:
    """Each p times the number of hypotheses that are left when it is its turn, the smallest first: among all that stay below a level, the chance
    of a single mistake is below it, too (Holm 1979)."""
    corrected, most = {}, 0.0
    for done, (name, p) in enumerate(sorted(single.items(), key=lambda item: item[1])):
        corrected[name] = most = max(most, min(1.0, p * (len(single) - done)))
    return corrected


def times_of(recipe: str) -> dict[str, dict[str, float]]:
    """From the timing pass: training times relative to dense (thin for longer: by its epochs in this recipe), and latencies."""
    path = RESULTS / TIMES_OF.get(recipe, recipe) / "times.json"
    if not path.exists():
        return {"train": {}, "b64": {}}
    found = json.loads(path.read_text())
    rivals = path.with_name("rival-times.json")
    train = json.loads(rivals.read_text())["relative"] if rivals.exists() else {}
    train |= {method: seconds / found["train_seconds"]["dense"] for method, seconds in found["train_seconds"].items()}
    train |= dict.fromkeys(("svd-energy", "svd-activation"), 1.0)
    results = load(recipe)
    for rival in results.get("thin-long", [])[:1]:
        epochs = next(
            (run["metrics"]["epochs"] for run in results.get("laconic", [])), rival["recipe"]["epochs"]
        )  # the rival's recipe may be older
        train["thin-long"] = train["thin"] * rival["metrics"]["epochs"] / epochs
    b64 = found["latency_b64_ms"]
    if are_same(results.get("laconic", []), results.get("low-rank", [])):  # timed when the default was both structures
        for times in (train, b64):
            times["laconic"] = times["low-rank"]
    return {"train": train, "b64": b64}


def are_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> bool:
    """Seed by seed the same networks: ranks alone, where that is what the default decided."""
    a, b = ({r["seed"]: (r["metrics"]["params"], r["metrics"]["accuracy"]) for r in runs} for runs in (ours, theirs))
    return bool(a) and a == b


def side_by_side(recipe: str) -> dict[str, float]:
    """Latencies relative to dense of networks that were timed beside it (latencies.py): by method, mean over its seeds; {} where none were."""
    path = RESULTS / recipe / "latencies.json"
    relative = json.loads(path.read_text())["relative"] if path.exists() else {}
    of: dict[str, list[float]] = {}
    for run, share in relative.items():
        of.setdefault(run.rpartition("-seed")[0] or run, []).append(share)
    return {method: statistics.mean(shares) for method, shares in of.items()}


def comparison(recipe: str) -> str:
    """Method, accuracy with its spread over seeds, how far laconic is ahead, parameters, MACs; from the timing pass: training time, latency."""
    results, times, beside = load(recipe), times_of(recipe), side_by_side(recipe)
    if not results:
        return "(no results yet)\n"
    text = is_text(results)
    head = "bits per character" if text else "test accuracy, %"
    lines = [f"| method | {head} | laconic ahead by | parameters | MACs | training time | batch of 64 | seeds |", "|---" * 8 + "|"]
    base = results.get("dense", [])  # without it there are no shares
    p = chances(results.get("laconic", []), results, text)
    for method, runs in results.items():
        relative = f"{times['train'][method]:.2f}" if method in times["train"] else "-"
        network = SAME_NETWORK.get(method, method)
        own = mean(runs, "latency_b64_ms")
        ms = times["b64"].get(network, own)
        latency = f"{ms:.2f} ms" if ms is not None else "-"
        if beside:
            latency = f"{beside[method]:.2f} of dense" if method in beside else "-"
        params, macs = mean(runs, "params") or 0, mean(runs, "macs") or 0
        shares = [f" ({x / y:.2f})" if (y := mean(base, name)) else "" for name, x in (("params", params), ("macs", macs))]
        lines.append(
            f"| {label(method)} | {score(runs, text)} | {ahead(results.get('laconic', []), runs, text, p.get(method))} | {params:,.0f}{shares[0]} "
            f"| {macs / 1e6:.2f} M{shares[1]} | {relative} | {latency} | {len(runs)} |"
        )
    return "\n".join(lines) + "\n"


def inference(_: str) -> str:
    """Speed-up against the MAC ratio, whole network and layer by layer."""
    lines = ["| | MACs, times fewer | times faster | dense, ms | cut, ms |", "|---|---|---|---|---|"]
    rows = json.loads((ROOT / "benchmarks" / "results" / "inference.json").read_text())["rows"]
    lines += [f"| {r['layer']} | {r['macs_ratio']:.2f} | {r['speedup']:.2f} | {r['dense_ms']:.2f} | {r['cut_ms']:.2f} |" for r in rows]
    return "\n".join(lines) + "\n"


def attention(_: str) -> str:
    """What unfusing costs, and what cuts gain then."""
    if not (ROOT / "benchmarks" / "results" / "attention.json").exists():
        return "(no results yet)\n"
    rows = json.loads((ROOT / "benchmarks" / "results" / "attention.json").read_text())["rows"]
    models = list(dict.fromkeys(r["model"] for r in rows))
    lines = ["| | " + " | ".join(models) + " |", "|" + "---|" * (1 + len(models))]
    kinds = dict.fromkeys(r["what"] for r in rows)
    lines += [f"| {what} | " + " | ".join(f"{r['ratio']:.2f}" for r in rows if r["what"] == what) + " |" for what in kinds]
    return "\n".join(lines) + "\n"


def refit(_: str) -> str:
    """Cut without training, as cut and fitted: a row for each share, of photographs in percent, of the text in bits."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "refit.json").read_text())["rows"]
    tasks = {"scene": ("photographs, %", "accuracy", 2), "tiny-shakespeare": ("GPT, bits", "bits", 3)}
    lines = ["| | of the parameters | ranks, as cut | fitted | even widths, as cut | fitted |", "|---|---|---|---|---|---|"]
    for task, (name, key, digits) in tasks.items():
        of_task = {(r["share"], r["what"], r["refit"]): f"{r[key]:.{digits}f}" for r in rows if r["task"] == task}
        lines.append(f"| {name} | 1 | {of_task[1.0, 'dense', False]} | | | |")
        for share in dict.fromkeys(s for s, *_ in of_task if s < 1):
            cells = [of_task[share, what, fitted] for what in ("ranks", "even widths") for fitted in (False, True)]
            lines.append(f"| {name} | {share:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def even_widths(_: str) -> str:
    """What multiples gain in time, and leave of the budget."""
    lines = ["| | of the parameters | in multiples | largest | time of a training step | of inference |", "|---|---|---|---|---|---|"]
    for r in json.loads((ROOT / "benchmarks" / "results" / "widths.json").read_text())["rows"]:
        coarse, fine = r["multiples"], r["largest"]
        sizes = (f"{one['widths'][0]}, {one['widths'][1]}" for one in (coarse, fine))
        ratios = (f"{coarse[key] / fine[key]:.2f}" for key in ("step_ms", "inference_ms"))
        lines.append(f"| {r['model'].upper().replace('VIT', 'ViT')} | {r['share']:g} | {' | '.join((*sizes, *ratios))} |")
    return "\n".join(lines) + "\n"


def deploy(_: str) -> str:
    """Accuracy, bytes and milliseconds in each runtime."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "deploy.json").read_text())["rows"]
    names = {"dense": "dense", "thin-long": "thin dense", "laconic": "**laconic**"}
    lines = ["| | network | accuracy, % | file, kB | one image, ms | 64 images, ms |", "|---|---|---|---|---|---|"]
    for r in rows:
        cells = f"{r['accuracy']:.2f} | {r['bytes'] / 1e3:,.0f} | {r['ms_one']:.2f} | {r['ms_64']:.2f}"
        lines.append(f"| {r['runtime']} | {names[r['method']]} | {cells} |")
    return "\n".join(lines) + "\n"


def training(_: str) -> str:
    """Training time against the plain loop."""
    if not (ROOT / "benchmarks" / "results" / "training.json").exists():
        return "(no results yet)\n"
    lines = [
        "| network | steps | training time | a step after settling | laconic itself | final training loss, dense | laconic |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text())["rows"]:
        own = sum(r["overhead_seconds"].values()) / r["seconds"]["laconic"]
        loss = r["final_loss"]
        lines += [
            f"| {r['name']} | {r['steps']} | {r['ratio']:.2f} | {r['step_ratio_after_settling']:.2f} | {own:.0%} of its time | {loss['dense']:.3f} | {loss['laconic']:.3f} |"
        ]
    return "\n".join(lines) + "\n"


def profile(_: str) -> str:
    """Where the training time goes, in units of the plain loop's."""
    path = ROOT / "benchmarks" / "results" / "training.json"
    if not path.exists():
        return "(no results yet)\n"
    parts = ("proximal steps", "cuts", "layer timing", "construction")
    lines = [f"| network | {' | '.join(('training steps', *parts))} | sum |", "|---|---|---|---|---|---|---|"]
    for r in json.loads(path.read_text())["rows"]:
        dense = r["seconds"]["dense"]
        own = [r["overhead_seconds"].get(part, 0.0) / dense for part in parts]
        steps = r["ratio"] - sum(r["overhead_seconds"].values()) / dense
        lines.append(f"| {r['name']} | {steps:.3f} | {' | '.join(f'{x:.3f}' for x in own)} | {r['ratio']:.3f} |")
    return "\n".join(lines) + "\n"


def gpu_solvers(_: str) -> str:
    """A proximal step's decomposition on a GPU: milliseconds and error of each way, at the smaller threshold."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "solvers-cuda.json").read_text())["rows"]
    ways = ("torch.linalg.svd", "gram", "gram-float64")
    lines = ["| matrix | " + " | ".join(f"`{w}`, ms | error" for w in ways) + " |", "|---" * (1 + 2 * len(ways)) + "|"]
    for shape in sorted({tuple(r["shape"]) for r in rows}, key=lambda s: (min(s), max(s))):
        found = {r["solver"]: r for r in rows if tuple(r["shape"]) == shape and r["tau"] == 0.01}
        cells = (f"{r['ms']:.1f} | {r['error']:.0e}" for r in map(found.__getitem__, ways))
        lines.append(f"| {shape[0]} x {shape[1]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gpu_training(_: str) -> str:
    """What laconic does once, in seconds, and what a step and a forward pass take afterwards, relative to dense."""
    lines = [
        "| network | parameters | MACs | a training step | forward pass, batch 1 | large batch | construction, s | timing layers | proximal steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in json.loads((ROOT / "benchmarks" / "results" / "training-cuda.json").read_text())["rows"]:
        spent, (one, many) = r["overhead_seconds"], (1 / v for v in r["inference_speedup"].values())
        lines.append(
            f"| {r['name']} | {r['params_fraction']:.2f} | {r['macs_fraction']:.2f} | {r['step_ratio_after_settling']:.2f} | {one:.2f} | {many:.2f} | "
            f"{spent['construction']:.1f} | {spent['layer timing']:.1f} | {spent['proximal steps']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def cut_last(_: str) -> str:
    """Cut on the way against cut last, from the seeds that all have, at the budgets that have any."""
    methods = ("laconic", "late", "dense")
    lines = ["| budget | laconic, % | cut last, % | dense, % | seeds |", "|---|---|---|---|---|"]
    for recipe in ("cifar10", "cifar10-tenth"):
        runs = load(recipe)
        seeds = set.intersection(*({r["seed"] for r in runs.get(m, [])} for m in methods))
        if seeds:
            cells = [percent([r for r in runs[m] if r["seed"] in seeds]) for m in methods]
            lines.append(f"| {runs['laconic'][0]['budget']['params']} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "(no results yet)\n"


def kills(_: str) -> str:
    """What killing runs at random moments did."""
    path = ROOT / "benchmarks" / "results" / "kills.json"
    if not path.exists():
        return "(no results yet)\n"
    (row,) = json.loads(path.read_text())["rows"]
    cells = ["trials", "kills", "kills_in_a_save", "identical", "damaged_checkpoints"]
    return (
        "| runs | times killed | of them in a save | ended bit-identical | checkpoints lost |\n|---|---|---|---|---|\n"
        f"| {' | '.join(str(row[c]) for c in cells)} |\n"
    )


def memory(_: str) -> str:
    """Peak memory of training, with and without laconic."""
    path = ROOT / "benchmarks" / "results" / "memory.json"
    if not path.exists():
        return "(no results yet)\n"
    lines = [
        "| network | plain loop, MiB | to the first cut | in units of the largest matrix | after the first cut | settled |",
        "|---|---|---|---|---|---|",
    ]
    for r in json.loads(path.read_text())["rows"]:
        plain, to_cut, after, settled = (r[k] / 2**20 for k in ("plain", "to_first_cut", "after_first_cut", "settled"))
        extra = r["extra_matrices_to_first_cut"]
        lines.append(f"| {r['name']} | {plain:.1f} | {to_cut:.1f} | {extra:+.1f} | {after:.1f} | {settled:.1f} |")
    return "\n".join(lines) + "\n"


def no_loss(_: str) -> str:
    """The smallest budget at which laconic's mean accuracy is not below that of the dense network, and the next smaller one."""
    tasks = {
        "photographs": ("scene", ("", "-half", "-eighth", "-tenth", "-twentieth")),
        "CIFAR-10, part": ("cifar10", ("", "-half", "-tenth", "-twentieth")),
        "MNIST, LeNet-300-100": ("lenet-300-100", ("", "-quarter")),
        "MNIST, LeNet-5": ("lenet-5", ("", "-tenth")),
        "digits": ("digits", ("",)),
    }
    lines = [
        "| task | dense, % | parameters removed at no loss | laconic there, % | removed at the next budget tried | laconic there, % |",
        "|---" * 6 + "|",
    ]
    for label, (task, parts) in tasks.items():
        dense = load(task)["dense"]
        found = sorted((r for part in parts if (r := load(task + part).get("laconic"))), key=lambda r: -r[0]["budget"]["params"])
        good = [r for r in found if (mean(r, "accuracy") or 0) >= (mean(dense, "accuracy") or 0)]
        smaller = [r for r in found if not good or r[0]["budget"]["params"] < good[-1][0]["budget"]["params"]]
        cells = [f"{100 * (1 - good[-1][0]['budget']['params']):.3g}%", percent(good[-1])] if good else ["none of those tried", "-"]
        cells += [f"{100 * (1 - smaller[0][0]['budget']['params']):.3g}%", percent(smaller[0])] if smaller else ["-", "-"]
        lines.append(f"| {label} | {percent(dense)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def both(_: str) -> str:
    """laconic's default against the better structure alone, in accuracy and in cross-entropy."""
    lines = [
        "| task | bound | ranks alone | neurons alone | **laconic** | ahead of the better one by | in bits of cross-entropy | seeds |",
        "|---" * 8 + "|",
    ]
    for recipe, name in TASKS.items():
        runs = load(recipe)
        if "laconic" not in runs or not runs.keys() & {"low-rank", "channels"}:
            continue
        text, ours = is_text(runs), runs["laconic"]
        better = max(
            (runs[m] for m in ("low-rank", "channels") if m in runs),
            key=lambda r: -(mean(r, "bits") or 0) if text else mean(r, "accuracy") or 0,
        )
        cells = [score(runs[m], text) if m in runs else "-" for m in ("low-rank", "channels", "laconic")]
        cells += ["-" if text else paired(ours, better, "accuracy", 100, 2), paired(ours, better, "bits", -1, 3)]
        bound = ", ".join(f"{share:g} of {COSTS[c]}" for c, share in ours[0]["budget"].items() if share < 1)
        count = len({r["seed"] for r in ours} & {r["seed"] for r in better})
        lines.append(f"| {name} | {bound} | {' | '.join(cells)} | {count} |")
    return "\n".join(lines) + "\n"


def rates(_: str) -> str:
    """laconic and the thin network for as long, each at a learning rate of its own: also for other lengths of a run, and as laconic is set for a short one."""
    lines = [
        "| task | of the parameters | epochs: thin, laconic | thin dense, for longer | **laconic** | ahead by | in bits of cross-entropy | seeds |",
        "|---" * 8 + "|",
    ]
    for start, name in ((base + part, name) for base, name in TASKS.items() for part in ("", "-10", "-40", "-short")):
        runs = load(f"{start}-gain") or load(f"{start}-rate")
        if not {"laconic", "thin-long"} <= runs.keys():
            continue
        ours, thin = runs["laconic"], runs["thin-long"]
        text = is_text(runs)
        cells = [f"{score(r, text)} (rate {r[0]['recipe']['lr']:g})" for r in (thin, ours)]
        cells += ["-" if text else paired(ours, thin, "accuracy", 100, 2), paired(ours, thin, "bits", -1, 3)]
        count = len({r["seed"] for r in ours} & {r["seed"] for r in thin})
        also = f", {macs:g} of the MACs" if (macs := ours[0]["budget"].get("macs")) else ""
        epochs = ", ".join(f"{r[0]['metrics']['epochs']}" for r in (thin, ours))
        lines.append(f"| {name} | {ours[0]['budget']['params']:g}{also} | {epochs} | {' | '.join(cells)} | {count} |")
    return "\n".join(lines) + "\n"


def paired(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], metric: str, scale: float, digits: int) -> str:
    """Mean of the differences seed by seed, on those that both have, with its standard error."""
    of_seed = {r["seed"]: r["metrics"].get(metric) for r in theirs}
    pairs = [(r["metrics"].get(metric), of_seed[r["seed"]]) for r in ours if r["seed"] in of_seed]
    if not pairs or any(x is None for pair in pairs for x in pair):
        return "-"
    differences = [scale * (a - b) for a, b in pairs]
    error = f" ± {statistics.stdev(differences) / len(pairs) ** 0.5:.{digits}f}" if len(pairs) > 1 else ""
    return f"{statistics.mean(differences):+.{digits}f}{error}"


def milliseconds(task: str) -> str:
    """Budgets in milliseconds: accuracy of each method, and what its network takes beside the dense one."""
    methods = ("thin", "thin-long", "channels", "low-rank", "laconic")
    lines = ["| milliseconds | " + " | ".join(LABELS[m] for m in methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for recipe in (f"{task}-latency", f"{task}-latency-quarter"):
        runs, beside = load(recipe), side_by_side(recipe)
        if "laconic" not in runs:
            continue
        cells = [f"{percent(runs[m])} (takes {beside[m]:.2f})" if m in runs and m in beside else "-" for m in methods]
        lines.append(f"| {runs['laconic'][0]['budget']['latency']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "(no results yet)\n"


def ablations(recipe: str) -> str:
    """One factor after the other: accuracy of its variants, the default first among them where it stands."""
    lines = ["| | | test accuracy, % | against the default | seeds |", "|---|---|---|---|---|"]
    default = variant_runs(recipe, "default")
    found = {(f, v): variant_runs(recipe, f"{f}-{v}") for f, variants in FACTORS.items() for v in variants if v != DEFAULTS[f]}
    p = chances(default, found, False)
    for factor, variants in FACTORS.items():
        for variant in variants:
            is_default = variant == DEFAULTS[factor]
            runs = default if is_default else found[factor, variant]
            if runs:
                name = f"**{variant}**" if is_default else variant
                against = "-" if is_default else ahead(runs, default, False, p.get((factor, variant)))
                lines.append(f"| {factor} | {name} | {percent(runs)} | {against} | {len(runs)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "(no results yet)\n"


def paper(_: str) -> str:
    """Alvarez & Salzmann's protocol: every regularizer at every share of energy, parameters and accuracy without training after the cut."""
    found = {p.stem: json.loads(p.read_text()) for p in (RESULTS / "paper").glob("*.json")}
    if "dense" not in found:
        return "(no results yet)\n"
    whole = found["dense"]["metrics"]["params"]
    energies = [row["energy"] for row in found["dense"]["metrics"]["energies"]]
    lines = ["| trained with | uncut, % | " + " | ".join(f"energy {e:g}" for e in energies) + " |", "|---" * (len(energies) + 2) + "|"]
    for name in ("dense", *(f"{kind}-{factor}" for factor in ("x0.3", "x1") for kind in ("group-sparsity", "low-rank", "both"))):
        if name in found:
            metrics = found[name]["metrics"]
            cells = [f"{100 * row['accuracy']:.2f} ({row['params'] / whole:.2f})" for row in metrics["energies"]]
            lines.append(f"| {name.replace('-', ' ')} | {100 * metrics['accuracy']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def paper_reload(_: str) -> str:
    """Cut in mid-run: accuracy, size, and how much of the dense run's training time it took."""
    found = {p.stem: json.loads(p.read_text()) for p in (RESULTS / "paper").glob("*.json")}
    reloads = sorted((name for name in found if name.startswith("reload")), key=lambda n: int(n.split("-")[1]))
    if "dense" not in found or not reloads:
        return "(no results yet)\n"
    dense = found["dense"]
    lines = ["| cut after epoch | test accuracy, % | parameters | MACs | training time |", "|---|---|---|---|---|"]
    for name in reloads:
        m, seconds = found[name]["metrics"], found[name]["curve"]["seconds"][-1] / dense["curve"]["seconds"][-1]
        shares = [m[key] / dense["metrics"][key] for key in ("params", "macs")]
        lines.append(f"| {name.split('-')[1]} | {100 * m['accuracy']:.2f} | {shares[0]:.2f} | {shares[1]:.2f} | {seconds:.2f} |")
    return "\n".join(lines) + "\n"


def variant_runs(recipe: str, name: str) -> list[dict[str, Any]]:
    """Results of one variant (see ablations.py), by seed."""
    return [json.loads(p.read_text()) for p in sorted((RESULTS / "ablations" / recipe).glob(f"{file_name(name)}-seed*.json"))]


TABLES = {
    "paper": paper,
    "paper-reload": paper_reload,
    "ablations-scene-tenth": lambda _: ablations("scene-tenth"),
    "ablations-cifar10-tenth": lambda _: ablations("cifar10-tenth"),
    "no-loss": no_loss,
    "both": both,
    "rates": rates,
    "milliseconds-scene": lambda _: milliseconds("scene"),
    "inference": inference,
    "deploy": deploy,
    "refit": refit,
    "even-widths": even_widths,
    "attention": attention,
    "training": training,
    "profile": profile,
    "gpu-solvers": gpu_solvers,
    "gpu-training": gpu_training,
    "cut-last": cut_last,
    "kills": kills,
    "memory": memory,
}  # any other name is a recipe's


def render(page: str) -> str:
    return MARKED.sub(lambda m: m[1] + TABLES.get(m[2], comparison)(m[2]) + m[3], page)


def main() -> int:
    stale = []
    for path in PAGES:
        text = path.read_text()
        if render(text) != text:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.write_text(render(text))
    if stale:
        print("differs from the result files:" if "--check" in sys.argv else "rewritten:", *stale)
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
