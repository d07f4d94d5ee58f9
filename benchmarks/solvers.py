"""Singular value thresholding: our solvers against `torch.linalg.svd`, time and error, in one run.

The error is judged first, against the float64 oracle; a time without it would mean nothing.

    python benchmarks/solvers.py [--device cuda]
"""

from __future__ import annotations

import numpy as np
import torch
import tyro
from common import interleaved, write

import laconic
from laconic import reference

SHAPES = [(64, 576), (128, 1152), (256, 2304), (512, 512), (1024, 1024), (768, 3072)]


def matrix(m: int, n: int) -> torch.Tensor:
    """A spectrum as in training under pressure: a fifth of the values large, the rest a small bulk."""
    k = min(m, n)
    values = torch.cat([torch.linspace(3, 1, k // 5), torch.full((k - k // 5,), 0.02)])
    u, v = torch.linalg.qr(torch.randn(m, k))[0], torch.linalg.qr(torch.randn(n, k))[0]
    return (u * values) @ v.T


def plain(x: torch.Tensor, tau: float) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u * (s - tau).clamp_min(0)) @ vh


def main(device: str = "cpu") -> None:
    torch.manual_seed(0)
    rows = []
    for m, n in SHAPES:
        for tau in (0.01, 0.1):
            x = matrix(m, n)
            exact = reference.svt(x.double().numpy(), tau)
            x = x.to(device)
            functions = {"torch.linalg.svd": lambda x=x, tau=tau: plain(x, tau)}
            functions |= {s: lambda x=x, tau=tau, s=s: laconic.svt(x, tau, solver=s).x for s in ("svd", "gram", "gram-float64", "auto")}
            errors = {
                name: float(np.linalg.norm(f().double().cpu().numpy() - exact) / np.linalg.norm(exact)) for name, f in functions.items()
            }
            times = interleaved(functions, rounds=7)
            chosen = laconic.svt(x, tau).solver
            for name in functions:
                ratio = times["torch.linalg.svd"] / times[name]
                rows.append(
                    {
                        "shape": [m, n],
                        "tau": tau,
                        "solver": name,
                        "auto_chose": chosen,
                        "ms": 1e3 * times[name],
                        "speedup": ratio,
                        "error": errors[name],
                    }
                )
                print(f"{m:>5} x {n:<5} tau {tau:<5} {name:<17} {1e3 * times[name]:9.2f} ms  {ratio:6.2f} x  error {errors[name]:.1e}")
    write("solvers", rows, device)


if __name__ == "__main__":
    tyro.cli(main)
