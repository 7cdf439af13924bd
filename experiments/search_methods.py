"""Compares search methods on trained networks: accuracy, evaluations, time.

    python experiments/search_methods.py --out experiments/results/search_resnet20 \\
        runs/net20-s0 runs/net20-s1 runs/net20-s2

Each network is one seed. A method sees images that training left out. Test data is read once: for
the policies that the methods found, uniform widths, and random policies of the same average width.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import numpy as np

from bitmixer_jax import sample_average
from bitmixer_jax.plotting import COLORS, new_figure
from bitmixer_jax.search import SearchSession, SearchSettings, parse_budget
from bitmixer_jax.trained import load

ARMS = {
    "greedy": SearchSettings(method="greedy"),
    "ilp, measured": SearchSettings(method="ilp"),
    "ilp, Hessian": SearchSettings(method="ilp", sensitivity="hessian"),
    "evolution": SearchSettings(method="evolution", evaluations=256),
    "random search": SearchSettings(method="random", evaluations=256),
}


def run(workdir, average, number, images, data_dir):
    """All arms on one network: a JSON tree."""
    found, trained = {}, load(workdir)
    for name, settings in ARMS.items():
        settings = dataclasses.replace(settings, images=images, data_dir=data_dir)
        session = SearchSession(trained, settings)
        limits = parse_budget([f"avg_bits={average}"], session.costs)
        result = session.search(session.problem(limits[0].cost, limits))
        found[name] = dataclasses.asdict(result.best()) | {
            "evaluations": len(result.policies),
            "seconds": round(session.seconds, 1),
        }
        print(workdir, name, found[name], flush=True)
    model, space = trained.model, trained.model.space
    keys = jax.random.split(jax.random.key(0), number)
    drawn = [sample_average(key, space, model.num_layers, average) for key in keys]
    uniform = [space.uniform(width, model.num_layers) for width in space.choices]
    searched = [np.asarray(entry["widths"]) for entry in found.values()]
    top1, examples = session.top1_on_test(np.stack([*searched, *uniform, *drawn]))
    for entry, accuracy in zip(found.values(), top1, strict=False):
        entry["test_top1"] = float(accuracy)
    after = len(searched) + space.n
    return {
        "images": {"search": len(session.data), "split": session.split, "test": examples},
        "methods": found,
        "uniform": {
            str(w): float(t) for w, t in zip(space.choices, top1[len(searched) :], strict=False)
        },
        "random": {"average_bits": average, "scores": [float(t) for t in top1[after:]]},
    }


def table(results):
    """Markdown: a row per method, mean over networks and each of them."""

    def cell(values, form="{:.2f}"):
        values = list(values)
        return f"{form.format(np.mean(values))} ({', '.join(form.format(v) for v in values)})"

    random = [100 * np.asarray(r["random"]["scores"]) for r in results]
    rows = [
        "| policy | top-1 on test, % (each seed) | above the mean of random | evaluations "
        "| seconds |",
        "|---|---|---|---|---|",
    ]
    for name in ARMS:
        entries = [r["methods"][name] for r in results]
        accuracy = [100 * e["test_top1"] for e in entries]
        gains = [a - r.mean() for a, r in zip(accuracy, random, strict=True)]
        rows.append(
            f"| {name} | {cell(accuracy)} | {cell(gains, '{:+.2f}')} | "
            f"{cell((e['evaluations'] for e in entries), '{:.0f}')} | "
            f"{cell((e['seconds'] for e in entries), '{:.0f}')} |"
        )
    number, average = len(random[0]), results[0]["random"]["average_bits"]
    for what, values in (
        ("mean", [r.mean() for r in random]),
        ("best by test data", [r.max() for r in random]),
        ("worst", [r.min() for r in random]),
    ):
        rows.append(
            f"| {number} random of {average:g} bits on average: {what} | {cell(values)} | | | |"
        )
    for width in reversed(results[0]["uniform"]):
        rows.append(
            f"| all layers at {width} bits | {cell(100 * r['uniform'][width] for r in results)} "
            "| | | |"
        )
    return rows


def plot(path, results):
    """Random policies as dots, methods as marks, a column per network."""
    figure, axis = new_figure(1.8 + 1.9 * len(results), 4.4)
    rng = np.random.default_rng(0)
    for i, result in enumerate(results):
        scores = 100 * np.asarray(result["random"]["scores"])
        axis.plot(i + rng.uniform(-0.3, 0.3, len(scores)), scores, ".", ms=3, color="0.75")
        axis.plot([i - 0.35, i + 0.35], [scores.mean()] * 2, color="black", lw=1.2)
        for k, (name, entry) in enumerate(result["methods"].items()):
            axis.plot(
                i + 0.13 * (k - 2),
                100 * entry["test_top1"],
                "o^vsD"[k % 5],
                color=COLORS[k],
                label=name if i == 0 else None,
            )
    axis.set_xticks(range(len(results)), [f"seed {i}" for i in range(len(results))])
    axis.set_ylabel("top-1 on test (%); bar: mean of random")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)


def main():
    """Reads the command line, runs, writes results.json, README.md and methods.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", help="folders of runs, one for each seed")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--average", type=float, default=3.0)
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--images", type=int, default=2000, help="images that score a policy")
    parser.add_argument("--data_dir", help="where the data are")
    given = parser.parse_args()
    results = [
        run(w, given.average, given.random, given.images, given.data_dir) for w in given.workdirs
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = table(results)
    (given.out / "README.md").write_text("\n".join([*lines, "", "![methods](methods.png)"]) + "\n")
    plot(given.out / "methods.png", results)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
