"""Cut without training: what fitting the layers to what they put out before is worth, on the photographs and on a GPT.

laconic train scene-tenth-rate --method dense     # and shakespeare-rate
python benchmarks/refit.py runs
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from common import write

import laconic
from laconic.data import load_dataset
from laconic.methods.base import network, sample
from laconic.recipe import load_recipe
from laconic.structures import Structure
from laconic.training import accuracy, bits

FITTED = 1024  # training images, or passages of 64 characters
EVEN: list[Structure] = [laconic.Channels(even=True)]
RANKS: list[Structure] = [laconic.LowRank()]


def main(runs: Path) -> None:
    rows = []
    for name, shares, kinds in (
        ("scene-tenth-rate", (0.5, 0.25, 0.1), {"ranks": RANKS, "even widths": EVEN}),
        ("shakespeare-rate", (0.5, 0.25), {"ranks": RANKS, "even widths": EVEN}),
    ):
        recipe = load_recipe(name)
        data = load_dataset(recipe.task, None, recipe.train_limit or None, recipe.size)
        batches = list(data.train_x[sample(data, FITTED)].split(128))
        for share in (1.0, *shares):
            for kind, structures in kinds.items() if share < 1 else [("dense", RANKS)]:
                for refit in (False, True) if share < 1 else (False,):
                    model = laconic.load(runs / name / "dense-seed0" / "model", network(data, recipe, recipe.widths)).eval()
                    start = time.perf_counter()
                    if share < 1:
                        budget = laconic.Budget(params=share)
                        laconic.compress(model, structures, budget, example_inputs=(data.train_x[:1],), calibration=batches, refit=refit)
                    row = {"task": recipe.task, "share": share, "what": kind, "refit": refit, "seconds": time.perf_counter() - start}
                    right, entropy = accuracy(model, data.test_x, data.test_y), bits(model, data.test_x, data.test_y)
                    rows.append(row | {"accuracy": 100 * right, "bits": entropy})
                    print(rows[-1], flush=True)
    write("refit", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
