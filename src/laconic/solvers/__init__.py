"""Spectral shrinkage: one file per solver, one entry point.

`spectral_prox` is what the rest of the package calls, `svt` its nuclear-norm case for users.
"""

from .base import Shrunk, Solver
from .factored import factored_prox, factored_svd
from .gram import Gram
from .prox import SOLVERS, Auto, SVTResult, spectral_prox, svt
from .svd import SVD

__all__ = ["SOLVERS", "SVD", "Auto", "Gram", "SVTResult", "Shrunk", "Solver", "factored_prox", "factored_svd", "spectral_prox", "svt"]
