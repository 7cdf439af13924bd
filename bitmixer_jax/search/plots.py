"""Plots of a front: accuracy against cost, and which width each layer takes at each budget."""

from __future__ import annotations

import contextlib
import pathlib

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.files import cannot_write, user_path
from bitmixer_jax.front import Front
from bitmixer_jax.plotting import COLORS, new_figure, short_names


def write_front(out: str | pathlib.Path, front: Front, *, overwrite: bool = False) -> None:
    """Writes front.json, front.png and widths.png into the folder ``out``; makes the folder.

    Args:
      out: the folder.
      front: the front.
      overwrite: whether to replace a front.json that has other content.

    Raises:
      UserError: front.json exists with other content and ``overwrite`` is false, or the folder
        cannot be written.
    """
    folder = user_path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        front.save(folder / "front.json", overwrite=overwrite)
    except UserError:
        with contextlib.suppress(OSError):  # rmdir fails if the folder holds other files
            folder.rmdir()
        raise
    plot_front(folder / "front.png", front)
    plot_widths(folder / "widths.png", front)


def plot_front(path: pathlib.Path, front: Front) -> None:
    """Plots test accuracy against cost, for the front, uniform widths and random policies."""
    figure, axis = new_figure(7, 4.5)
    for key, mark, size, color, label in (
        ("random", ".", 5, "0.65", "random policies"),
        ("uniform", "s", 7, COLORS[2], "uniform widths"),
    ):
        entries = front.notes.get(key, [])
        if entries:
            x = [entry["cost"] for entry in entries]
            y = [100 * entry["test_top1"] for entry in entries]
            axis.plot(x, y, mark, ms=size, color=color, label=f"{label} ({len(x)})")
    x = [point.cost for point in front.points]
    on_search = [100 * point.top1 for point in front.points]
    on_test = [100 * (np.nan if p.test_top1 is None else p.test_top1) for p in front.points]
    axis.plot(x, on_test, "o-", ms=4, color=COLORS[0], label="front, test images")
    axis.plot(x, on_search, ":", color=COLORS[0], lw=1, label="front, images of the search")
    axis.set(xlabel=f"{front.cost} ({front.unit})", ylabel="top-1 (%)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def plot_widths(path: pathlib.Path, front: Front) -> None:
    """Plots a heat map of widths: a row for each layer, a column for each point of the front."""
    widths = np.asarray([point.widths for point in front.points])
    count, layers = widths.shape
    columns = np.unique(np.linspace(0, count - 1, 40).round().astype(int))
    figure, axis = new_figure(2.2 + 0.26 * len(columns), 1.8 + 0.26 * layers)
    from matplotlib.colors import BoundaryNorm, ListedColormap  # `new_figure` imported matplotlib

    shades = ListedColormap(
        [
            (*np.asarray([0.16, 0.32, 0.62]) ** p, 1.0)
            for p in np.linspace(0.25, 1.4, len(front.choices))
        ]
    )
    edges = np.arange(len(front.choices) + 1) - 0.5
    cells = np.searchsorted(front.choices, widths[columns].T)
    image = axis.imshow(cells, aspect="auto", cmap=shades, norm=BoundaryNorm(edges, shades.N))
    bar = figure.colorbar(image, ticks=range(len(front.choices)), label="bits")
    bar.set_ticklabels([str(width) for width in front.choices])
    ticks = np.unique(np.linspace(0, len(columns) - 1, 8).round().astype(int))
    axis.set_xticks(ticks, [f"{front.points[columns[i]].cost:.3g}" for i in ticks], fontsize=8)
    axis.set_yticks(range(layers), short_names(front.names), fontsize=8)
    axis.set_xlabel(f"{front.cost} of the policy ({front.unit})")
    figure.savefig(path, dpi=120)
