"""Reports are data first (`CompactReport`), then JSON, tables and one HTML page."""

from .data import CompactReport, GroupReport, LayerReport, Snapshot
from .html import render
from .pictures import comparison_picture, params_picture, ranks_picture, spectra_picture
from .tables import comparison_table, layer_table

__all__ = [
    "CompactReport",
    "GroupReport",
    "LayerReport",
    "Snapshot",
    "comparison_picture",
    "comparison_table",
    "layer_table",
    "params_picture",
    "ranks_picture",
    "render",
    "spectra_picture",
]
