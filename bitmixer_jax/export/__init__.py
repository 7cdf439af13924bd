"""Exports a trained network to other engines, and verifies each export in its own engine."""

from bitmixer_jax.export.export import FORMATS, ExportSettings, export_network

__all__ = ["FORMATS", "ExportSettings", "export_network"]
