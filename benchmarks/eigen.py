"""Eigenvectors of a symmetric float64 matrix by LAPACK's drivers, one thread: time beside `torch.linalg.eigh`, and how orthogonal they come out.

OMP_NUM_THREADS=1 python benchmarks/eigen.py
"""

from __future__ import annotations

from typing import Any

import torch
from common import interleaved, write
from scipy.linalg import eigh
from scipy.linalg.lapack import dsyev

from laconic.solvers.gram import small_gram

SIZES = (16, 64, 320, 512, 1024)


def measure(n: int) -> dict[str, Any]:
    gram = small_gram(torch.randn(1, n, n, generator=torch.Generator().manual_seed(0)), torch.float64)[0]
    ways = {
        "syevd (torch)": lambda: torch.linalg.eigh(gram)[1],
        "syevr": lambda: torch.from_numpy(eigh(gram.clone().numpy().T, driver="evr", overwrite_a=True, check_finite=False)[1]),
        "syev": lambda: torch.from_numpy(dsyev(gram.clone().numpy().T, overwrite_a=1)[1]),
    }
    seconds = interleaved(ways, rounds=5, seconds=0.02)
    vectors = {name: way() for name, way in ways.items()}
    return {
        "n": n,
        "seconds": seconds,
        "of_torch": {name: s / seconds["syevd (torch)"] for name, s in seconds.items()},
        "off_orthogonal": {name: float((u.T @ u - torch.eye(n)).abs().max()) for name, u in vectors.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    write("eigen", [measure(n) for n in SIZES])
