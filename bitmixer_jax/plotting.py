"""What all plots share: colours, figures that need no screen, short names of layers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2")


def new_figure(width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    """Makes a figure of so many inches and its axes; it needs no screen and no pyplot backend."""
    # Importing matplotlib fails where MPLBACKEND names a backend that is not installed, such as
    # that of a notebook. Figures are drawn to files here, so the backend does not matter.
    backend = os.environ.pop("MPLBACKEND", None)
    first = "matplotlib" not in sys.modules
    try:
        import matplotlib
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if first and backend is not None:  # what this import would have chosen, for plots of the caller
        with contextlib.suppress(ValueError):  # not installed
            matplotlib.rcParams["backend"] = backend

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True)


def literal(text: str) -> str:
    """Escapes dollar signs, so that a plot shows a text and not a formula."""
    return text.replace("$", r"\$")


def short_names(names: Sequence[str]) -> list[str]:
    """Names of layers for an axis: "s2.b1.conv1" of "stage2.block1.conv1"."""
    return [name.replace("stage", "s").replace(".block", ".b") for name in names]
