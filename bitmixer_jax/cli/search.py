"""bitmixer search: finds the best policy within a budget."""

from __future__ import annotations

import argparse
from typing import Any

from bitmixer_jax.cli.common import (
    AddCommand,
    add_count,
    add_data_dir,
    add_latency,
    add_out,
    add_seed,
    add_workdir,
    print_markdown,
    search_bar,
)


def add(command: AddCommand) -> None:
    """Adds the command."""
    search = command(
        "search",
        run,
        "find the best policy within a budget",
        "bitmixer search --workdir runs/digits --method greedy --budget avg_bits=3 "
        "--out policy.json",
    )
    add_settings(search)
    search.add_argument(
        "--budget",
        required=True,
        action="append",
        metavar="COST=MOST",
        help="highest cost: avg_bits=3, bitops=60%% (of the widest policy), bytes=40000, ... "
        "(repeat to combine)",
    )
    add_out(search, "policy file to write")


def add_settings(command: argparse.ArgumentParser) -> None:
    """Adds the flags of `search.SearchSettings`."""
    add_workdir(command)
    command.add_argument(
        "--method", default="greedy", help="greedy (default), ilp, evolution or random"
    )
    add_seed(command, "the images and of the method")
    add_count(command, "--evaluations", 512, "policies that evolution and random evaluate")
    command.add_argument(
        "--sensitivity",
        default="measured",
        help="for ilp: measured (default), or hessian (from second derivatives)",
    )
    add_count(command, "--images", 2000, "images that a policy is scored on")
    command.add_argument(
        "--split",
        default="",
        help="split of these images (default: the part that training did not use, if any)",
    )
    add_data_dir(command)
    add_latency(command)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of the flags of `add_settings`, by their names in `SearchSettings`."""
    names = ["method", "seed", "evaluations", "sensitivity", "images", "split"]
    names += ["data_dir", "latency"]
    return {name: getattr(arguments, name) for name in names}


def run(arguments: argparse.Namespace) -> int:
    """Searches, writes the policy file and prints a table."""
    from bitmixer_jax.files import check_new
    from bitmixer_jax.search import search_policy
    from bitmixer_jax.search.describe import describe_policy

    check_new(arguments.out, "--out", overwrite=arguments.overwrite)
    with search_bar() as on_scores:
        result = search_policy(
            arguments.workdir, arguments.budget, on_scores=on_scores, **settings_of(arguments)
        )
    result.save(arguments.out, overwrite=arguments.overwrite)
    print_markdown(describe_policy(result))
    print(f"policy: {arguments.out}")
    return 0
