"""bitmixer evaluate: measures the test accuracy at uniform widths, random policies, one policy."""

from __future__ import annotations

import argparse
from typing import Any

from bitmixer_jax.cli.common import (
    AddCommand,
    add_count,
    add_data_dir,
    add_json,
    add_policy,
    add_seed,
    add_workdir,
    changes_of,
    check_json,
    print_markdown,
    progress_bar,
    write_json,
)


def add(command: AddCommand) -> None:
    """Adds the command."""
    evaluate = command(
        "evaluate",
        run,
        "measure the test accuracy at each uniform width, at random policies and at one policy",
        "bitmixer evaluate --workdir runs/digits --random 100 --policy 4,3,2,2,3,4 --json out.json",
    )
    add_workdir(evaluate)
    add_policy(evaluate)
    add_count(evaluate, "--random", 0, "number of random policies")
    add_seed(evaluate, "the random policies")
    evaluate.add_argument("--no-uniform", action="store_true", help="skip the uniform widths")
    evaluate.add_argument(
        "--levels", action="store_true", help="count the quantisation levels that each layer uses"
    )
    evaluate.add_argument(
        "--recalibrate",
        action="store_true",
        help="estimate BN statistics of pairs of widths that training never visited",
    )
    add_data_dir(evaluate)
    add_json(evaluate)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, prints tables and writes the result."""
    from bitmixer_jax.evaluation import evaluate, recalibrate_missing
    from bitmixer_jax.levels import levels_of
    from bitmixer_jax.report import table
    from bitmixer_jax.trained import load

    check_json(arguments.json, "examples")
    changes = changes_of(arguments)
    trained = load(arguments.workdir)
    if arguments.levels:
        trained.require_widths("count")
    recalibrated: list[tuple[str, int, int]] = []
    if arguments.recalibrate:
        trained, recalibrated = recalibrate_missing(trained, arguments.data_dir)
        print(_recalibration(recalibrated))
    result = evaluate(
        trained,
        policy=arguments.policy,
        changes=changes,
        random=arguments.random,
        seed=arguments.seed,
        uniform=not arguments.no_uniform,
        data_dir=arguments.data_dir,
        progress=progress_bar("evaluating"),
    )
    if recalibrated:
        result["recalibrated"] = [_pair(pair) for pair in recalibrated]
    print_markdown(table(result))
    if arguments.levels:
        print("layer, bits: levels used by weights, by activations (share at the top level)")
        for row in levels_of(trained, arguments.data_dir):
            print(
                f"{row.layer}, {row.bits}: {row.weights}/{2**row.bits}, "
                f"{row.activations}/{2**row.bits} ({100 * row.saturated:.1f}%)"
            )
    write_json(arguments.json, result)
    return 0


def _pair(pair: tuple[str, int, int]) -> str:
    layer, predecessor, width = pair
    return f"{layer} {predecessor or 'any'}->{width}"


def _recalibration(pairs: list[Any]) -> str:
    if not pairs:
        return "recalibration: training visited every pair of widths; nothing to do"
    names = ", ".join(map(_pair, pairs[:6])) + (", ..." if len(pairs) > 6 else "")
    return f"recalibrated {len(pairs)} pairs of widths that training never visited: {names}"
