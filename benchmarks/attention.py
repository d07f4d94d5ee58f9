"""What `laconic.unfuse` costs and gains: four usual encoder layers (256 wide, 8 heads, 64 tokens, a batch of 8), as PyTorch builds them, unfused, and cut.

python benchmarks/attention.py
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from common import interleaved, write
from torch import nn

import laconic


def infer(model: nn.Module, x: torch.Tensor) -> None:
    model.eval()
    with torch.inference_mode():
        model(x)


def train(model: nn.Module, x: torch.Tensor) -> None:
    model.train()
    model(x).square().mean().backward()


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64, 256)
    fused = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True), 4)
    unfused = laconic.unfuse(copy.deepcopy(fused))
    cut = copy.deepcopy(unfused)
    laconic.compress(cut, [laconic.LowRank()], laconic.Budget(params=0.25))
    models = {"as built": fused, "unfused": unfused, "a quarter of its parameters": cut}
    rows = []
    for what, step in {"inference": infer, "training step": train}.items():
        times = interleaved({name: partial(step, model, x) for name, model in models.items()}, rounds=21)
        rows += [{"what": what, "model": name, "ms": 1e3 * times[name], "ratio": times[name] / times["as built"]} for name in models]
    for row in rows:
        print(f"{row['what']:<14} {row['model']:<28} {row['ms']:6.2f} ms   {row['ratio']:.2f}")
    write("attention", rows)


if __name__ == "__main__":
    main()
