"""bitmixer search: the best policy within a budget."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from bitmixer_jax.search.session import FoundPolicy, SearchSession


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

    check_free(arguments.out, arguments.overwrite, "--out")
    with search_bar() as on_scores:
        found = search_policy(
            arguments.workdir, arguments.budget, on_scores=on_scores, **settings_of(arguments)
        )
    found.save(arguments.out, overwrite=arguments.overwrite)
    print_markdown(_table(found))
    print(f"policy: {arguments.out}")
    return 0


def _table(found: FoundPolicy) -> list[str]:
    constraints, space = found.constraints, found.session.trained.model.space
    rows = ["| policy | top-1 on test, % |" + "".join(f" {c.cost.name} |" for c in constraints)]
    rows.append("|---|---|" + "---|" * len(constraints))
    policies = [("found", found.point.widths, found.point.test_top1)]
    for width, top1 in found.uniform.items():
        uniform = space.uniform(width, len(found.point.widths))
        policies.append((f"all {width} bits", tuple(uniform.tolist()), top1))
    for name, policy, accuracy in policies:
        cells = "".join(f" {float(c.cost(policy)):,.6g} |" for c in constraints)
        rows.append(f"| {name} | {100 * (accuracy or 0):.2f} |{cells}")
    evaluations = len(found.result.policies)
    return [*rows, "", *what_was_read(found.session, evaluations, found.examples)]


def what_was_read(session: SearchSession, evaluations: int, examples: int) -> list[str]:
    """Lines that say which images a search and its test read."""
    seen = ""
    if session.seen_in_training:
        seen = (
            "; the network was trained on them: train with config.train_split=train[:90%] to keep "
            "some"
        )
    return [
        f"{session.settings.method}: {evaluations} policies evaluated on {len(session.data)} "
        f"images of {session.split}{seen}; {session.seconds:.1f} s.",
        f"Test data: {examples} images, read once, after the search.",
    ]
