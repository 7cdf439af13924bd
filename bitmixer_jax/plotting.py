"""Shared parts of plots: colours, figures that need no screen, short names of layers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2")


def new_figure(width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    """Makes a figure that needs no screen and no pyplot backend.

    Args:
      width: in inches.
      height: in inches.
      rows: number of axes, one below the other; they share the x axis.

    Returns:
      the figure, and its axis (an array of axes if there are several rows).

    Examples:
      >>> figure, axis = new_figure(4, 3)
      >>> axis.set_ylabel("accuracy (%)")
      Text(0, 0.5, 'accuracy (%)')
      >>> figure.savefig("accuracy.png")
    """
    # MPLBACKEND may name a backend that is not installed, such as that of a notebook. Then the
    # import of matplotlib fails. These figures go to files, so they need no backend.
    backend = os.environ.pop("MPLBACKEND", None)
    first = "matplotlib" not in sys.modules
    try:
        import matplotlib
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if first and backend is not None:  # plots of the caller use the backend of MPLBACKEND
        with contextlib.suppress(ValueError):  # it is not installed
            matplotlib.rcParams["backend"] = backend

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True)


def literal(text: str) -> str:
    r"""Escapes dollar signs, so that a plot shows a text and not a formula.

    >>> print(literal("a$b$"))
    a\$b\$
    """
    return text.replace("$", r"\$")


def short_names(names: Sequence[str]) -> list[str]:
    """Returns short names of layers for an axis.

    >>> short_names(["stage2.block1.conv1"])
    ['s2.b1.conv1']
    """
    return [name.replace("stage", "s").replace(".block", ".b") for name in names]
