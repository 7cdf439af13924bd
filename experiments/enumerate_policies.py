"""Compares search methods with the best policy there is, on networks of 3^6 = 729 policies.

    python experiments/enumerate_policies.py --out experiments/results/enumeration \\
        runs/net6-s0 runs/net6-s1 runs/net6-s2

Scores all policies on the images of the search and on test images. Under each budget, the gap
compares the policy of a method with the policy of least search loss. It is given in loss on the
images of the search, which methods minimise, and in test accuracy.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib

import numpy as np
from scipy.stats import spearmanr

from bitmixer_jax.evaluation import make_evaluator
from bitmixer_jax.search import EvaluationCache, SearchSession, SearchSettings, parse_budget
from bitmixer_jax.trained import load

AVERAGES = (2.5, 3.0, 3.5)
ARMS = {
    "greedy": SearchSettings(method="greedy"),
    "ilp, measured": SearchSettings(method="ilp"),
    "ilp, Hessian": SearchSettings(method="ilp", sensitivity="hessian"),
    "evolution, 64": SearchSettings(method="evolution", evaluations=64),
    "random search, 64": SearchSettings(method="random", evaluations=64),
}


def run(workdir, images, data_dir):
    """One network: a JSON tree."""
    trained = load(workdir)
    session = SearchSession(trained, SearchSettings(images=images, data_dir=data_dir))
    space, layers = trained.model.space, trained.model.num_layers
    everything = np.asarray(list(itertools.product(space.choices, repeat=layers)), np.int32)
    scores = session.cache(everything)
    evaluator = make_evaluator(trained, data_dir)
    examples = evaluator.examples
    cache = EvaluationCache(
        lambda policies: evaluator.scores(trained.variables, policies),
        pathlib.Path(workdir) / "search" / "all-on-test.jsonl",
        {"network": trained.weights_digest, "test": examples},
    )
    test = cache(everything).top1
    place = {tuple(p): i for i, p in enumerate(everything.tolist())}
    result = {
        "policies": len(everything),
        "images": {"search": len(session.data), "split": session.split, "test": examples},
        "rank correlation with test accuracy": {
            "search loss": float(spearmanr(-scores.loss, test).statistic),
            "search accuracy": float(spearmanr(scores.top1, test).statistic),
        },
        "budgets": {},
    }
    for average in AVERAGES:
        limits = parse_budget([f"avg_bits={average}"], session.costs)
        problem = session.problem(limits[0].cost, limits)
        fits = problem.fits_policy(everything)
        truth = int(np.argmin(np.where(fits, scores.loss, np.inf)))
        same = np.isclose(problem.objective(everything), average)
        entry = {
            "fitting": int(fits.sum()),
            "optimum": everything[truth].tolist(),
            "optimum_loss": float(scores.loss[truth]),
            "optimum_test_top1": float(test[truth]),
            "random_loss": float(scores.loss[same].mean()),
            "random_test_top1": float(test[same].mean()),
            "best_test_top1": float(test[fits].max()),
            "methods": {},
        }
        for name, settings in ARMS.items():
            session.settings = dataclasses.replace(settings, images=images, data_dir=data_dir)
            found = session.search(problem)
            best = place[found.best().widths]
            entry["methods"][name] = {
                "widths": everything[best].tolist(),
                "evaluations": len(found.policies),
                "rank": int((scores.loss[fits] < scores.loss[best]).sum()) + 1,
                "loss_gap": float(scores.loss[best] - scores.loss[truth]),
                "test_gap": float(test[truth] - test[best]),
            }
        result["budgets"][str(average)] = entry
        print(workdir, average, entry, flush=True)
    return result


def table(results):
    """Markdown: a row per budget and method, mean over networks and each of them."""

    def cell(values, form):
        values = list(values)
        return f"{form.format(np.mean(values))} ({', '.join(form.format(v) for v in values)})"

    rows = [
        "| avg_bits at most | method | evaluations | rank by loss (each seed) | loss above the "
        "optimum, nats | test top-1 below the optimum's, points |",
        "|---|---|---|---|---|---|",
    ]
    for average in map(str, AVERAGES):
        budgets = [r["budgets"][average] for r in results]
        for name in ARMS:
            entries = [b["methods"][name] for b in budgets]
            rows.append(
                f"| {average} | {name} | {cell((e['evaluations'] for e in entries), '{:.0f}')} | "
                f"{cell((e['rank'] for e in entries), '{:.0f}')} of {budgets[0]['fitting']} | "
                f"{cell((e['loss_gap'] for e in entries), '{:.4f}')} | "
                f"{cell((100 * e['test_gap'] for e in entries), '{:+.2f}')} |"
            )
        gaps = [b["random_loss"] - b["optimum_loss"] for b in budgets]
        below = [100 * (b["optimum_test_top1"] - b["random_test_top1"]) for b in budgets]
        rows.append(
            f"| {average} | mean of all of this average | | | {cell(gaps, '{:.4f}')} | "
            f"{cell(below, '{:+.2f}')} |"
        )
    rows.append("")
    for what in ("search loss", "search accuracy"):
        values = (r["rank correlation with test accuracy"][what] for r in results)
        rows.append(
            f"Rank correlation (Spearman) of {what} with test accuracy over all "
            f"{results[0]['policies']} policies: {cell(values, '{:.3f}')}."
        )
    return rows


def main():
    """Reads the command line, runs, writes results.json and README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", help="folders of runs, one for each seed")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--images", type=int, default=2000, help="images that score a policy")
    parser.add_argument("--data_dir", help="where the data are")
    given = parser.parse_args()
    results = [run(w, given.images, given.data_dir) for w in given.workdirs]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = table(results)
    (given.out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
