"""Follows a changing budget: a wave with noise, and a drop below the cost of every policy.

    bitmixer front --workdir runs/digits --cost bitops --out runs/front
    python experiments/follow_budget.py --workdir runs/digits --front runs/front/front.json \\
        --out runs/follow

Writes follow_budget.json (budget, cost and accuracy of each call) and follow_budget.png.
"""

import argparse
import json
import logging
import pathlib
import sys

import numpy as np

from bitmixer_jax import data as datasets
from bitmixer_jax.controller import Controller
from bitmixer_jax.errors import UserError
from bitmixer_jax.front import load_front
from bitmixer_jax.plotting import COLORS, new_figure
from bitmixer_jax.runtime import Runtime
from bitmixer_jax.trained import load

WINDOW = 20  # calls over which accuracy is averaged in the plot


def changing_budgets(front, steps, rng):
    """Budgets of ``steps`` calls: two waves over the front's costs, noise, one sudden drop."""
    cheapest, low = front.points[0].cost, 1.1 * front.points[0].cost
    high = 1.1 * front.points[-1].cost
    wave = 0.5 - 0.5 * np.cos(4 * np.pi * np.arange(steps) / steps)
    budgets = low + (high - low) * (wave + rng.normal(0, 0.02, steps))
    budgets[int(0.7 * steps) : int(0.75 * steps)] = 0.8 * cheapest
    return budgets


def follow(runtime, front, budgets, hysteresis, batches=None):
    """Runs the controller over all budgets: its switches, and a record of each call.

    Without ``batches``, pairs of (images, labels), it chooses alone and runs nothing.
    """
    controller = Controller(runtime, front, iter(budgets.tolist()).__next__, hysteresis=hysteresis)
    records = []
    for call, budget in enumerate(budgets.tolist()):
        if batches is None:
            point = controller.choose()
            accuracy = None
        else:
            images, labels = batches[call]
            right = controller.predict(images).argmax(-1) == labels
            point, accuracy = controller.point, float(right.mean())
        records.append(
            {
                "budget": budget,
                "cost": point.cost,
                "fits": point.cost <= budget,
                "accuracy": accuracy,
                "test_top1": point.test_top1,
            }
        )
    return [switch for switch in controller.switches if switch.old], records


def plot(path, front, records, switches):
    """Above: budget and cost; below: accuracy; dotted lines where the policy changes."""
    figure, (top, bottom) = new_figure(9, 6, rows=2)
    calls = np.arange(len(records))
    column = {key: np.asarray([r[key] for r in records], float) for key in records[0]}
    top.plot(calls, column["budget"], color="0.6", lw=1, label="budget")
    top.step(calls, column["cost"], where="post", color=COLORS[0], label="cost of the policy")
    top.plot(
        calls[column["fits"] == 0],
        column["cost"][column["fits"] == 0],
        "x",
        ms=4,
        color=COLORS[2],
        label="no policy fits",
    )
    top.set(ylabel=f"{front.cost} ({front.unit})")
    sums = np.cumsum(np.insert(column["accuracy"], 0, 0.0))
    first = np.maximum(calls + 1 - WINDOW, 0)
    running = (sums[calls + 1] - sums[first]) / (calls + 1 - first)
    bottom.plot(calls, 100 * running, color=COLORS[4], label=f"mean of the last {WINDOW} calls")
    if np.isfinite(column["test_top1"]).any():
        bottom.step(
            calls,
            100 * column["test_top1"],
            where="post",
            color=COLORS[0],
            lw=1,
            label="the policy's on all test data",
        )
    bottom.set(xlabel="call", ylabel="accuracy (%)")
    for axis in (top, bottom):
        for switch in switches:
            axis.axvline(switch.call, color="0.5", ls=":", lw=0.6)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def main():
    """Reads the command line, runs, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, metavar="DIR[@STAGE]")
    parser.add_argument("--front", required=True, type=pathlib.Path, metavar="FILE")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=300, help="calls (default 300)")
    parser.add_argument("--batch_size", type=int, default=64, help="images of a call (default 64)")
    parser.add_argument("--hysteresis", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the images")
    parser.add_argument("--data_dir", help="where the data are, if not where training found them")
    given = parser.parse_args()
    if given.steps < 1:
        raise UserError(f"--steps {given.steps}: give 1 or more")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {given.out}: cannot write there ({error.strerror})") from None
    run = load(given.workdir).run
    data = datasets.load(run.dataset, run.test_split, given.data_dir or run.data_dir or None)
    runtime = Runtime.load(given.workdir, batch_size=given.batch_size)
    front = load_front(given.front, runtime.names, runtime.space, runtime.weights_digest)

    rng = np.random.default_rng(given.seed)
    budgets = changing_budgets(front, given.steps, rng)
    order = np.resize(rng.permutation(len(data)), (given.steps, given.batch_size))
    batches = [(data.images[rows], data.labels[rows]) for rows in order]
    switches, records = follow(runtime, front, budgets, given.hysteresis, batches)
    logging.disable(logging.WARNING)  # the same again
    restless, _ = follow(runtime, front, budgets, 0.0)

    summary = {
        "calls": len(records),
        "switches": len(switches),
        "switches_without_hysteresis": len(restless),
        "hysteresis": given.hysteresis,
        "accuracy": float(np.mean([r["accuracy"] for r in records])),
        "calls_below_every_point": sum(not r["fits"] for r in records),
        "compilations": runtime.traces,
        "cost": front.cost,
        "unit": front.unit,
        "seed": given.seed,
    }
    content = json.dumps({**summary, "records": records}, indent=1)
    (given.out / "follow_budget.json").write_text(content + "\n")
    plot(given.out / "follow_budget.png", front, records, switches)
    print(
        f"{summary['calls']} calls, {summary['compilations']} compilation; "
        f"mean accuracy {100 * summary['accuracy']:.2f}%\n"
        f"switches: {len(switches)} with hysteresis {given.hysteresis:g}, "
        f"{len(restless)} without\n"
        f"below every point: {summary['calls_below_every_point']} calls, run at the cheapest"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"follow_budget: {error}", file=sys.stderr)
        sys.exit(2)
