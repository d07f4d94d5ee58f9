"""Reports are data first (`CompactReport`), then JSON, tables and one HTML page."""

from .data import CompactReport, LayerReport, Snapshot

__all__ = ["CompactReport", "LayerReport", "Snapshot"]
