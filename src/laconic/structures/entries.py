"""Entries of a weight, alone or in slices: the lasso, and the groups of structured sparsity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..checks import check_finite
from ..errors import InvalidValueError
from ..penalties import L1, Penalty
from .base import InUnits, Shrinkage, check_options, root_mean_square


@dataclass(eq=False, slots=True)
class Weight:
    """The entries of one weight under a structure; looked up by its path, since a layer that loses neurons gets another."""

    structure: Entries
    path: str
    model: nn.Module

    @property
    def name(self) -> str:
        over = self.structure.over
        return f"entries of {self.path}" + (f" over {over}" if over else "")

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        return (self.model.get_parameter(self.path),)

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.weights[0]).all())


@dataclass(frozen=True, kw_only=True)
class Entries:
    r"""Drive entries of weights to zero, one by one (`L1()` gives the lasso) or in slices (group lasso): with the norms
    :math:`\|W_g\|_2` of the slices g, which are the magnitudes :math:`|W|` of single entries by default,

    .. math:: W \leftarrow \operatorname{argmin}_X \tfrac12 \|X - W\|_F^2 + \tau u \sum_g u\, h(\|X_g\|_2 / u)

    Zeros among the entries make a model no smaller and no faster. What they are for: with the same matrix under
    `Channels`, entries and then rows are exactly the proximal map of the *sparse group lasso* (`sparse_group_lasso`);
    slices are the groups of *structured sparsity* (`structured_sparsity`), of which columns and whole weights that become zero
    take neurons with them in `compact()`. Needs a strength; not together with a budget.

    Args:
        over: the dimensions of a weight (as PyTorch numbers them: for most layers out, in, kernel) that a slice extends over;
            `()`: single entries, `(0,)`: one place of the filters of all neurons (filter shape), `(0, 2, 3)`: all that
            reads one channel, `range(5)`: the whole weight. A weight that has no such dimension goes without it.
        strength, penalty, scale, include, exclude: as of `LowRank`; the unit u is the root mean square norm.
    """

    strength: float
    penalty: Penalty = field(default_factory=L1)
    scale: str = "relative"
    include: str | tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    over: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_options(self)
        object.__setattr__(self, "over", tuple(self.over))
        if any(isinstance(d, bool) or not isinstance(d, int) or d < 0 for d in self.over):
            raise InvalidValueError(f"over = {self.over}: expected dimensions of a weight, counted from 0, such as (0, 2, 3)")

    def dims(self, weight: Tensor) -> list[int]:
        """Those of `over` that the weight has."""
        return sorted({d for d in self.over if d < weight.ndim})

    def values(self, site: Weight) -> Tensor:
        """Norms of the slices (float64), in the shape of the weight with 1 for each dimension that they extend over."""
        weight = site.weights[0].detach().double()
        dims = self.dims(weight)
        return torch.linalg.vector_norm(weight, dim=dims, keepdim=True) if dims else weight.abs()

    @torch.no_grad()
    def shrink(self, site: Weight, tau: float) -> Shrinkage:
        """The proximal step on all slices, in place."""
        weight, norms = site.weights[0], self.values(site)
        check_finite(norms, site.path)
        unit = root_mean_square(norms) if self.scale == "relative" else 1.0
        shrunk = InUnits(self.penalty, unit).prox(norms.flatten(), tau * unit).reshape(norms.shape)
        weight.mul_((shrunk / norms.clamp_min(math.ulp(0.0))).to(weight.dtype))
        return Shrinkage(shrunk.flatten(), int((shrunk > 0).sum()), "entries", ())
