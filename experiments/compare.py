"""Compares finished runs: a table and a plot of their three protocols.

Runs are grouped by name. Several workdirs of one name are its seeds.

    python experiments/compare.py --out experiments/results/cifar10_cpu \
        TBN=runs/tbn-s0 TBN=runs/tbn-s1 "BN per width"=runs/bn-s0 float=runs/float-s0
"""

import argparse
import json
import pathlib

import numpy as np

from bitmixer_jax.report import plot_accuracy
from bitmixer_jax.training.metrics import read_metrics


def spread(values):
    """Mean of the seeds, and their range if there are several, in percent."""
    values = 100 * np.asarray(values)
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{values.mean():.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def pooled(results):
    """One evaluation from those of several seeds: means, and all random scores together."""
    scores = np.concatenate([r["random"]["scores"] for r in results])
    widths = results[0]["uniform"]
    return {
        "uniform": {w: float(np.mean([r["uniform"][w] for r in results])) for w in widths},
        "random": {
            "scores": scores.tolist(),
            "worst": float(scores.min()),
            "policies": len(scores),
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
    arguments = parser.parse_args()
    groups, minutes = {}, {}
    for item in arguments.runs:
        name, _, workdir = item.partition("=")
        workdir = pathlib.Path(workdir)
        result = json.loads((workdir / "report" / "evaluation.json").read_text())
        groups.setdefault(name, []).append(result)
        records = read_metrics(workdir, "train")
        rates = [r["images_per_second"] for r in records if "images_per_second" in r]
        minutes.setdefault(name, []).append(np.median(rates))
        target = arguments.out / workdir.name
        target.mkdir(parents=True, exist_ok=True)
        for file in (workdir / "report").iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        config = json.loads((workdir / "config.json").read_text())
        for setting in ("data_dir", "init_from", "teacher"):  # without one machine's folders
            config[setting] = pathlib.PurePath(config[setting]).name
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    switchable = {n: r for n, r in groups.items() if "uniform" in r[0]}
    floats = [r["float"] for rs in groups.values() for r in rs if "float" in r]
    widths = list(reversed(next(iter(switchable.values()))[0]["uniform"]))
    rows = [
        "| top-1, % | "
        + " | ".join(f"{w} bits" for w in widths)
        + " | random policies: mean | std | worst | images/s (median) |",
        "|---|" + "---|" * (len(widths) + 4),
    ]
    if floats:
        blank = " | ".join([""] * (len(widths) + 2))
        rows.append(f"| full-precision baseline: {spread(floats)} | {blank} | |")
    for name, results in switchable.items():
        cells = [spread([r["uniform"][w] for r in results]) for w in widths]
        cells += [spread([r["random"][key] for r in results]) for key in ("mean", "std", "worst")]
        rows.append(f"| {name} | {' | '.join(cells)} | {np.mean(minutes[name]):.0f} |")
    (arguments.out / "table.md").write_text("\n".join(rows) + "\n")
    plot_accuracy(
        arguments.out / "accuracy.png",
        {name: pooled(results) for name, results in switchable.items()},
        float(np.mean(floats)) if floats else None,
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
