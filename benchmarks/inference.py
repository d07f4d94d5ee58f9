"""Is a smaller model a faster one? Speed-up at batch 64 against the MAC ratio, on the CIFAR-10 network, dense and cut.

The ranks are those of a committed result (`experiments/results/cifar10/low-rank-seed0.json`); values do not matter for time.
The two models take turns, so that the machine's noise hits both.

    python benchmarks/inference.py
"""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import torch
from common import interleaved, write

from laconic.matricize import choose_unfolding
from laconic.measure import count_macs, evaluating
from laconic.models import ConvNet
from laconic.recipe import load_recipe
from laconic.surgery.factorize import factorize
from laconic.surgery.record import put

RESULT = Path(__file__).parents[1] / "experiments" / "results" / "cifar10" / "low-rank-seed0.json"


def main() -> None:
    torch.manual_seed(0)
    recipe = load_recipe("cifar10")
    dense = ConvNet(3, 10, recipe.widths, recipe.pools).eval().to(memory_format=torch.channels_last)
    cut = copy.deepcopy(dense)
    pairs = {}
    for name, rank in json.loads(RESULT.read_text())["ranks"].items():
        if rank is not None:
            layer = dense.get_submodule(name)
            pairs[name] = factorize(layer, choose_unfolding(layer, recipe.matricization), rank)
            put(cut, name, pairs[name])
    x = torch.randn(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    rows = []
    macs = count_macs(dense, (x,)) / count_macs(cut, (x,))
    with evaluating(dense), evaluating(cut):
        shapes: dict[str, torch.Tensor] = {}
        handles = [dense.get_submodule(n).register_forward_pre_hook(lambda _, a, n=n: shapes.__setitem__(n, a[0])) for n in pairs]
        dense(x)
        for handle in handles:
            handle.remove()
        times = interleaved({"dense": partial(dense, x), "cut": partial(cut, x)}, rounds=31)
        speedup = times["dense"] / times["cut"]
        rows.append(
            {"layer": "whole model", "macs_ratio": macs, "speedup": speedup, "dense_ms": 1e3 * times["dense"], "cut_ms": 1e3 * times["cut"]}
        )
        for name, pair in pairs.items():
            layer, inputs = dense.get_submodule(name), shapes[name]
            times = interleaved({"dense": partial(layer, inputs), "cut": partial(pair, inputs)}, rounds=21)
            ratio = count_macs(layer, (inputs,)) / count_macs(pair, (inputs,))
            rows.append(
                {
                    "layer": name,
                    "macs_ratio": ratio,
                    "speedup": times["dense"] / times["cut"],
                    "dense_ms": 1e3 * times["dense"],
                    "cut_ms": 1e3 * times["cut"],
                }
            )
    for r in rows:
        print(
            f"{r['layer']:<14} MACs {r['macs_ratio']:5.2f} x fewer   {r['speedup']:5.2f} x faster   ({r['speedup'] / r['macs_ratio']:.2f} of it)   {r['dense_ms']:.2f} -> {r['cut_ms']:.2f} ms"
        )
    write("inference", rows)


if __name__ == "__main__":
    main()
