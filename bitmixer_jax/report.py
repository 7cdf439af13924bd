"""Writes the report of a run: a summary with accuracies and plots, in WORKDIR/report."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmixer_jax import distributed
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Progress, UncalibratedPairs, evaluate
from bitmixer_jax.files import cannot_write, user_path, write_whole
from bitmixer_jax.models import Network
from bitmixer_jax.pairs import calibrated
from bitmixer_jax.plotting import COLORS, literal, new_figure, short_names
from bitmixer_jax.policy import BitSpace
from bitmixer_jax.trained import Trained, load
from bitmixer_jax.training.config import Run
from bitmixer_jax.training.metrics import number_at, read_metrics


def report(trained: Trained, progress: Progress = iter) -> tuple[pathlib.Path, list[str]]:
    """Evaluates a run on its test split and writes ``WORKDIR/report``.

    The folder gets README.md, evaluation.json and plots. If there are several processes, all must
    call this function: all evaluate, and the primary process writes.

    Args:
      trained: the network.
      progress: wraps the list of calls to make, for example with a progress bar.

    Returns:
      the folder, and the table of accuracies as lines of Markdown.

    Raises:
      UserError: as `evaluation.evaluate`; or the folder cannot be written.

    Examples:
      >>> import bitmixer_jax as bm
      >>> folder, lines = report(bm.load("runs/digits"))  # doctest: +SKIP
      >>> print("\\n".join(lines))  # doctest: +SKIP
      | top-1, 360 images | % |
      |---|---|
      | all layers at 4 bits | 98.06 |
      | all layers at 3 bits | 97.22 |
      | all layers at 2 bits | 92.78 |
      | 100 random policies (3.01 bits on average) | 97.21 +- 0.61, worst 95.56 |
    """
    run = trained.run
    random = run.report_random if run.stages[-1].widths == "layer" else 0
    try:
        result = evaluate(trained, random=random, seed=run.seed, progress=progress)
    except UncalibratedPairs as error:  # a short run has not visited every pair of widths
        if distributed.is_primary():
            print(f"report without accuracies: {error}")
        result = evaluate(trained, uniform=False)
    baseline_top1 = _baseline_top1(run, progress)
    if distributed.is_primary():
        write_report(trained, result, baseline_top1)
    return trained.folder / "report", table(result, baseline_top1)


def _baseline_top1(run: Run, progress: Progress) -> float | None:
    """Returns the accuracy of the full-precision baseline that the run started or learned from.

    None if there is no such baseline, or if it cannot be evaluated any more.
    """
    for source in (run.init_from, run.teacher):
        if not source or user_path(source).is_file():  # a file holds weights, but no settings
            continue
        try:
            baseline = load(source)
            if baseline.is_baseline:
                data_dir = run.data_dir or None
                return float(evaluate(baseline, data_dir=data_dir, progress=progress)["float"])
        except UserError as error:  # such as a workdir that was removed; the report is still useful
            print(f"report without the full-precision baseline: {error}")
    return None


def write_report(
    trained: Trained, result: Mapping[str, Any], baseline_top1: float | None = None
) -> None:
    """Writes ``WORKDIR/report`` from an evaluation that was done before.

    Args:
      trained: the network.
      result: what `evaluation.evaluate` returned.
      baseline_top1: accuracy of the full-precision baseline, 0..1, if it is known.

    Raises:
      UserError: the folder cannot be written.

    Examples:
      >>> trained = bm.load("runs/digits")  # doctest: +SKIP
      >>> write_report(trained, bm.evaluate(trained, random=100))  # doctest: +SKIP
    """
    folder = trained.folder / "report"
    plots = ["curves.png"]
    try:
        folder.mkdir(exist_ok=True)
        write_whole(folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
        plot_curves(folder / "curves.png", trained.folder)
        if "uniform" in result:
            plot_accuracy(folder / "accuracy.png", {"": result}, baseline_top1)
            plot_visits(folder / "pairs.png", trained.model, trained.variables["batch_stats"])
            plots += ["accuracy.png", "pairs.png"]
        lines = _summary(trained, table(result, baseline_top1))
        lines += [f"![{plot.removesuffix('.png')}]({plot})" for plot in plots]
        write_whole(folder / "README.md", "\n".join(lines) + "\n")
    except OSError as error:
        raise cannot_write(folder, error) from None


def _summary(trained: Trained, accuracies: list[str]) -> list[str]:
    """Returns the lines of README.md before the plots."""
    config = trained.config
    return [
        f"# {config['model']['name']} on {config['dataset']}",
        "",
        *accuracies,
        "",
        "| stage | epochs | quantised | widths | learning rate |",
        "|---|---|---|---|---|",
        *(
            f"| {stage.name} | {stage.epochs:g} | {stage.quantize} | {stage.widths} | "
            f"{stage.learning_rate:g} |"
            for stage in trained.run.stages
        ),
        "",
        f"Seed {config['seed']}, batch {config['batch_size']}.",
        "",
    ]


def table(result: Mapping[str, Any], baseline_top1: float | None = None) -> list[str]:
    """Returns a Markdown table of an evaluation, with accuracies in percent.

    Args:
      result: what `evaluation.evaluate` returned.
      baseline_top1: accuracy of the full-precision baseline, 0..1, if it is known.

    Examples:
      >>> result = {"examples": 360, "uniform": {"2": 0.925, "4": 0.975}}
      >>> print("\\n".join(table(result, baseline_top1=0.98)))
      | top-1, 360 images | % |
      |---|---|
      | full-precision baseline | 98.00 |
      | all layers at 4 bits | 97.50 |
      | all layers at 2 bits | 92.50 |
    """
    rows = [f"| top-1, {result['examples']} images | % |", "|---|---|"]
    if "float" in result:
        baseline_top1 = result["float"]
    if baseline_top1 is not None:
        rows.append(f"| full-precision baseline | {100 * baseline_top1:.2f} |")
    for width, top1 in reversed(list(result.get("uniform", {}).items())):
        rows.append(f"| all layers at {width} bits | {100 * top1:.2f} |")
    if "random" in result:
        r = result["random"]
        rows.append(
            f"| {r['policies']} random policies ({r['average_bits']:.2f} bits on average) | "
            f"{100 * r['mean']:.2f} +- {100 * r['std']:.2f}, worst {100 * r['worst']:.2f} |"
        )
    if "policy" in result:
        widths = result["policy"]["widths"]
        rows.append(
            f"| policy {','.join(map(str, widths))} ({np.mean(widths):.2f} bits on average) | "
            f"{100 * result['policy']['top1']:.2f} |"
        )
    return rows


def plot_curves(path: pathlib.Path, workdir: pathlib.Path) -> None:
    """Plots the training loss and the test accuracies over epochs, with the stages shaded.

    Args:
      path: of the PNG file to write.
      workdir: of the run; its metrics are plotted.

    Examples:
      >>> plot_curves("curves.png", pathlib.Path("runs/digits"))  # doctest: +SKIP
    """
    train, test = read_metrics(workdir, "train"), read_metrics(workdir, "evaluate")
    figure, (top, bottom) = new_figure(8, 6, rows=2)
    # A damaged record is left out of the plot.
    train = [r for r in train if None not in (number_at(r, "epoch"), number_at(r, "loss"))]
    epoch_of = {record["step"]: record["epoch"] for record in train}
    per_epoch = max((s / e for s, e in epoch_of.items() if e), default=1.0)
    top.plot([r["epoch"] for r in train], [r["loss"] for r in train], color=COLORS[0])
    top.set(ylabel="training loss (nats)", yscale="log")
    series: dict[str, list[tuple[float, float]]] = {}
    for record in test:
        epoch = record["step"] / per_epoch
        uniform = record.get("uniform")
        widths = list(uniform) if isinstance(uniform, Mapping) else []
        accuracies = {"float": number_at(record, "float")}
        accuracies |= {f"{width} bits": number_at(record, "uniform", width) for width in widths}
        accuracies["random (mean)"] = number_at(record, "random", "mean")
        for name, top1 in accuracies.items():
            if top1 is not None:
                series.setdefault(name, []).append((epoch, top1))
    for color, (name, points) in zip(COLORS * 3, series.items(), strict=False):
        x, y = zip(*points, strict=True)
        bottom.plot(x, [100 * v for v in y], marker="o", ms=3, label=literal(name), color=color)
    bottom.set(xlabel="epoch", ylabel="test accuracy (%)")
    if series:
        bottom.legend()
    starts: dict[str, float] = {}
    for record in train:
        starts.setdefault(str(record.get("stage", "")), record["epoch"])
    edges = [*starts.values(), train[-1]["epoch"] if train else 0]
    for i, (name, begin) in enumerate(starts.items()):
        for axis in (top, bottom):
            axis.axvspan(begin, edges[i + 1], color="0.5", alpha=0.06 if i % 2 else 0.14, lw=0)
        top.text(begin, 1.02, f" {literal(name)}", transform=top.get_xaxis_transform(), fontsize=9)
    figure.savefig(path, dpi=120)


def plot_accuracy(
    path: pathlib.Path, results: Mapping[str, Mapping[str, Any]], baseline_top1: float | None = None
) -> None:
    """Plots the accuracy of each uniform width, and of each random policy beside them.

    Args:
      path: of the PNG file to write.
      results: results of `evaluation.evaluate` to compare, by name. A single one may have the name
        "". Each must have the entry "uniform".
      baseline_top1: accuracy of the full-precision baseline, 0..1, drawn as a line.

    Examples:
      >>> result = {"uniform": {"2": 0.93, "3": 0.97, "4": 0.98}}
      >>> plot_accuracy("accuracy.png", {"": result}, baseline_top1=0.985)
    """
    figure, axis = new_figure(7, 4.2)
    widths = list(next(iter(results.values()))["uniform"])
    rng = np.random.default_rng(0)
    for i, (name, result) in enumerate(results.items()):
        color, shift = COLORS[i % len(COLORS)], 0.8 * ((i + 0.5) / len(results) - 0.5)
        x = np.arange(len(widths)) + shift
        top1 = [100 * result["uniform"][w] for w in widths]
        axis.bar(x, top1, 0.7 / len(results), color=color, alpha=0.8, label=name or None)
        if "random" in result:
            scores = 100 * np.asarray(result["random"]["scores"])
            center = len(widths) + shift
            jitter = rng.uniform(-0.22, 0.22, len(scores)) / len(
                results
            )  # so points do not overlap
            axis.plot(center + jitter, scores, ".", ms=4, color=color, alpha=0.6)
            axis.plot([center - 0.2, center + 0.2], [scores.mean()] * 2, color="black", lw=1.5)
    if baseline_top1 is not None:
        axis.axhline(
            100 * baseline_top1, color="0.3", ls="--", lw=1, label="full-precision baseline"
        )
    ticks = [f"all layers\n{w} bits" for w in widths]
    numbers = [r["random"]["policies"] for r in results.values() if "random" in r]
    if numbers:
        ticks.append(f"{max(numbers)} random\npolicies (bar: mean)")
    axis.set_xticks(range(len(ticks)), ticks)
    top1 = [v for r in results.values() for v in r["uniform"].values()]
    top1 += [r["random"]["worst"] for r in results.values() if "random" in r]
    axis.set_ylim(100 * min(top1) - 2, min(100, 100 * max([*top1, baseline_top1 or 0]) + 2))
    axis.set_ylabel("test accuracy (%)")
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=len(results) + 1)
    figure.savefig(path, dpi=120)


def plot_visits(path: pathlib.Path, model: Network, batch_stats: Mapping[str, Any]) -> None:
    """Plots how many training steps visited each pair of widths, as a heat map.

    Rows are layers, columns are pairs (width of the predecessor, own width).

    Args:
      path: of the PNG file to write.
      model: a switchable network.
      batch_stats: of its variables; the counts are in it.

    Examples:
      >>> trained = bm.load("runs/digits")  # doctest: +SKIP
      >>> stats = trained.variables["batch_stats"]  # doctest: +SKIP
      >>> plot_visits("pairs.png", trained.model, stats)  # doctest: +SKIP
    """
    space: BitSpace = model.space
    pairs = [(p, c) for p in space.choices for c in space.choices]
    counts = np.full((model.num_layers, len(pairs)), np.nan)
    for row, layer in enumerate(model.layers):
        count = np.asarray(batch_stats[layer.name]["conv_norm"]["count"])
        if len(count) == 1:  # no predecessor counts: one number per width, in the columns (c, c)
            for i in range(space.n):
                counts[row, i * (space.n + 1)] = count[0, i]
        else:
            counts[row] = count.ravel()
    figure, axis = new_figure(1.5 + 0.62 * len(pairs), 1.6 + 0.3 * model.num_layers)
    from matplotlib.colors import LogNorm  # `new_figure` imported matplotlib

    axis.set_facecolor("0.9")
    visited = np.where(calibrated(counts), counts, np.nan)
    if np.isfinite(visited).any():
        low, high = np.nanmin(visited), np.nanmax(visited)
        image = axis.imshow(visited, aspect="auto", norm=LogNorm(low, max(high, low + 1)))
        figure.colorbar(image, label="training steps")
    for (row, column), value in np.ndenumerate(counts):
        if not np.isnan(value) and model.num_layers <= 24:
            axis.text(
                column,
                row,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white",
                bbox=dict(boxstyle="round,pad=0.1", fc="black", ec="none", alpha=0.35),
            )
    axis.set_xticks(range(len(pairs)), [f"{p}\u2192{c}" for p, c in pairs])
    axis.set_yticks(range(model.num_layers), short_names(model.names), fontsize=8)
    axis.set_xlabel("width of the predecessor \u2192 own width (bits)")
    figure.savefig(path, dpi=120)
