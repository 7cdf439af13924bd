"""bitmixer search: the best policy within a budget."""

from __future__ import annotations

import argparse
from typing import Any

from bitmixer_jax.cli.common import (
    AddCommand,
    add_data_dir,
    add_latency,
    add_out,
    add_workdir,
    count,
    print_markdown,
    search_bar,
    seed,
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
        help="avg_bits=3, bitops=60%% (of the widest), bytes=40000, ...; repeat to combine",
    )
    add_out(search, "the policy file to write")


def add_settings(command: argparse.ArgumentParser) -> None:
    """Adds the flags of `search.SearchSettings`."""
    add_workdir(command)
    command.add_argument(
        "--method", default="greedy", help="greedy (default), ilp, evolution or random"
    )
    command.add_argument(
        "--seed", type=seed, default=0, help="of the images and of the method (default 0)"
    )
    command.add_argument(
        "--evaluations",
        type=count,
        default=512,
        metavar="N",
        help="policies that evolution and random evaluate (default 512)",
    )
    command.add_argument(
        "--sensitivity",
        default="measured",
        help="for ilp: measured (default), or hessian: from second derivatives",
    )
    command.add_argument(
        "--images",
        type=count,
        default=2000,
        metavar="N",
        help="images that score a policy (default 2000)",
    )
    command.add_argument(
        "--split", default="", help="their split (default: what training left out, if anything)"
    )
    add_data_dir(command)
    add_latency(command)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what `add_settings` read, by the names of `SearchSettings`."""
    names = [
        "method",
        "seed",
        "evaluations",
        "sensitivity",
        "images",
        "split",
        "data_dir",
        "latency",
    ]
    return {name: getattr(arguments, name) for name in names}


def run(arguments: argparse.Namespace) -> int:
    """Searches, writes the policy file, prints a table."""
    from bitmixer_jax.files import check_free
    from bitmixer_jax.search import search_policy
    from bitmixer_jax.search.describe import describe_policy

    check_free(arguments.out, arguments.overwrite, "--out")
    with search_bar() as on_scores:
        found = search_policy(
            arguments.workdir, arguments.budget, on_scores=on_scores, **settings_of(arguments)
        )
    found.save(arguments.out, overwrite=arguments.overwrite)
    print_markdown(describe_policy(found))
    print(f"policy: {arguments.out}")
    return 0
