"""Measures how the time of a training step grows: with devices, batch, width, choices, policies.

    python experiments/growth.py --out experiments/results/growth [--steps 10]

Each point is a process of its own. In it, the quantised step and the step of the full-precision
baseline take turns. On a busy machine, read their ratio. Host devices share the cores of the
machine. So they show what spreading costs, not what it gains.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

FIXED = {"model": "resnet8", "batch": 64, "width": 16, "choices": 3, "policies": 1, "devices": 1}
GROWS = {
    "devices": (1, 2, 4),
    "batch": (16, 32, 64, 128, 256),
    "width": (8, 16, 32, 64),
    "choices": (2, 3, 4, 5, 6, 7),
    "policies": (1, 2, 3, 4),
}
WIDTHS = (2, 3, 4, 5, 6, 7, 8)  # the first n of them: all there are
LABELS = {
    "devices": "host devices, batch 64 shared by them",
    "batch": "images in a batch",
    "width": "channels of the first stage",
    "choices": "choices of width n (tables of $n^2$ pairs)",
    "policies": "policies in a step",
}


def measure(point, steps):
    """Milliseconds and megabytes of a step, quantised and float, in this process."""
    import jax

    from bitmixer_jax.benchmark import KINDS, prepare_step
    from bitmixer_jax.distributed import replicate
    from bitmixer_jax.models import create_model
    from bitmixer_jax.policy import BitSpace

    model = create_model(
        point["model"],
        num_classes=10,
        width=point["width"],
        space=BitSpace(WIDTHS[: point["choices"]]),
    )
    layer = dataclasses.replace(KINDS["layer-wise"], draws=point["policies"])
    devices = jax.devices()
    rng = np.random.default_rng(0)
    data = {
        "image": rng.integers(0, 256, (point["batch"], *model.image_shape), np.uint8),
        "label": rng.integers(0, 10, point["batch"], np.int32),
    }
    data = replicate(data, devices)
    rows = np.arange(point["batch"], dtype=np.int32)[None]
    kinds = {"float": KINDS["float"], "layer": layer}
    running = {k: list(prepare_step(model, s, point["batch"], devices)) for k, s in kinds.items()}
    result = {}
    for kind, (step, state) in running.items():
        running[kind][1], _ = jax.block_until_ready(step(state, data, rows))
        result[f"{kind}_bytes"] = step.memory(running[kind][1], data, rows)
    seconds = {kind: [] for kind in kinds}
    for _ in range(steps):
        for kind, (step, state) in running.items():
            begun = time.perf_counter()
            running[kind][1], _ = jax.block_until_ready(step(state, data, rows))
            seconds[kind].append(time.perf_counter() - begun)
    for kind, each in seconds.items():
        result[f"{kind}_ms"] = 1e3 * float(np.median(each))
        result[f"{kind}_ms_quartiles"] = [1e3 * float(q) for q in np.quantile(each, (0.25, 0.75))]
    return result


def plot(table, path):
    """A panel for each thing that grows: milliseconds a step, quantised and float."""
    from matplotlib.figure import Figure

    from bitmixer_jax.plotting import COLORS

    figure = Figure(figsize=(3.2 * len(table), 3), layout="constrained")
    axes = figure.subplots(1, len(table))
    for axis, (name, rows) in zip(axes, table.items(), strict=True):
        x = [row[name] for row in rows]
        for kind, color in (("layer", COLORS[0]), ("float", COLORS[1])):
            low, high = zip(*(row[f"{kind}_ms_quartiles"] for row in rows), strict=True)
            axis.fill_between(x, low, high, color=color, alpha=0.2)
            label = "layer-wise" if kind == "layer" else "full-precision baseline"
            axis.plot(x, [row[f"{kind}_ms"] for row in rows], "o-", color=color, label=label)
        axis.set_xlabel(LABELS[name])
        if x[-1] > 8:  # each twice the one before
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
        else:
            axis.set_ylim(bottom=0)
        axis.set_xticks(x, [str(value) for value in x])
    axes[0].set_ylabel("ms a step")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main():
    """Reads the command line, measures point after point, plots; goes on where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(measure(json.loads(given.point), given.steps)))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "growth.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    for name, values in GROWS.items():
        rows = table.setdefault(name, [])
        for value in values[len(rows) :]:
            point = FIXED | {name: value}
            flags = f"--xla_force_host_platform_device_count={point['devices']}"
            command = [sys.executable, __file__, "--out", str(given.out)]
            command += ["--steps", str(given.steps), "--point", json.dumps(point)]
            output = subprocess.run(
                command,
                env=os.environ | {"XLA_FLAGS": flags},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            row = json.loads(output.splitlines()[-1])
            rows.append(point | row)
            path.write_text(json.dumps(table, indent=1) + "\n")
            print(
                f"{name} {value}: layer-wise {row['layer_ms']:.1f} ms, "
                f"float {row['float_ms']:.1f} ms, ratio {row['layer_ms'] / row['float_ms']:.2f}",
                flush=True,
            )
    plot(table, given.out / "growth.png")


if __name__ == "__main__":
    main()
