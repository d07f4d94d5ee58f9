"""Even widths in multiples that hardware likes, beside the largest that fit: milliseconds of a training step and of inference.

The small GPT of the experiments and the small ViT, at several parts of the parameters; both networks of a row have that many, and take turns.

    python benchmarks/widths.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from common import interleaved, write
from torch import Tensor, nn

from laconic import Budget, Channels
from laconic.measure import count_params, evaluating
from laconic.models import GPT, ViT
from laconic.plan import make_plan
from laconic.widths import choose_shapes

MODELS: dict[str, tuple[Callable[[int, int], nn.Module], tuple[int, int], Callable[[], Tensor]]] = {
    "gpt": (lambda width, hidden: GPT(65, 64, 4, width, 4, hidden), (128, 512), lambda: torch.randint(0, 65, (32, 64))),
    "vit": (lambda width, hidden: ViT((3, 32, 32), 36, 4, 4, width, 4, hidden), (96, 384), lambda: torch.randn(32, 3, 32, 32)),
}
SHARES = (0.5, 0.25, 0.125, 0.0625)


def widths(model: nn.Module, x: Tensor, share: float, multiple: int | None) -> tuple[int, int]:
    """Of the stream and of the hidden layers; which channels go makes no difference."""
    plan = make_plan(model, [Channels(even=True, multiple=multiple)], (x[:1],))
    budget = Budget(params=share)
    importances = {group.name: np.full(group.group.units, 1 / group.group.units) for group in plan.neurons}
    units = choose_shapes(plan, {}, importances, budget.currencies, budget.limits(plan)).units
    kept = {not group.norms: units[group.name] for group in plan.neurons if not group.of_heads}
    return kept[False], kept[True]


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for name, (build, dense, inputs) in MODELS.items():
        x = inputs()
        for share in SHARES:
            shapes = {kind: widths(build(*dense), x, share, multiple) for kind, multiple in (("multiples", None), ("largest", 1))}
            models = {kind: build(*shape) for kind, shape in shapes.items()}
            steps = {
                kind: partial(training_step, model, torch.optim.AdamW(model.parameters(), lr=1e-4), x) for kind, model in models.items()
            }
            training = interleaved(steps, rounds=31)
            with torch.no_grad(), evaluating(models["multiples"]), evaluating(models["largest"]):
                inference = interleaved({kind: partial(model, x) for kind, model in models.items()}, rounds=31)
            row = {"model": name, "share": share}
            for kind, model in models.items():
                row[kind] = {
                    "widths": shapes[kind],
                    "params": count_params(model),
                    "step_ms": 1e3 * training[kind],
                    "inference_ms": 1e3 * inference[kind],
                }
            rows.append(row)
            ratios = training["multiples"] / training["largest"], inference["multiples"] / inference["largest"]
            print(
                f"{name} {share:6}: {shapes['multiples']} beside {shapes['largest']}: a step takes {ratios[0]:.2f}, inference {ratios[1]:.2f}"
            )
    write("widths", rows)


if __name__ == "__main__":
    main()
