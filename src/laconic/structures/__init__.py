"""Structures: what a regularizer acts on, what one of its units costs, and how a unit is cut out. One file each.

A structure is the data of a regularizer; what it acts on is a `Site` (one weight), a `Neurons` (a group of tied layers), or
a `Weight` (its entries).
"""

from typing import Any

from .base import InUnits, Shrinkage
from .channels import Channels, Neurons, WideLayer
from .entries import Entries, Weight
from .low_rank import LowRank, Site, inner_site
from .sums import sparse_group_lasso, structured_sparsity

Structure = LowRank | Channels | Entries


def shrink(site: Site | Neurons | Weight, tau: float) -> Shrinkage:
    """The proximal step of whatever structure acts there."""
    structure: Any = site.structure
    result: Shrinkage = structure.shrink(site, tau)
    return result


__all__ = [
    "Channels",
    "Entries",
    "InUnits",
    "LowRank",
    "Neurons",
    "Shrinkage",
    "Site",
    "Structure",
    "Weight",
    "WideLayer",
    "inner_site",
    "shrink",
    "sparse_group_lasso",
    "structured_sparsity",
]
