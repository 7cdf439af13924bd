"""bitmixer front: finds the best policies over the whole range of a cost."""

from __future__ import annotations

import argparse

from bitmixer_jax.cli.common import AddCommand, add_count, add_out, print_markdown, search_bar
from bitmixer_jax.cli.search import add_settings, settings_of


def add(command: AddCommand) -> None:
    """Adds the command."""
    front = command(
        "front",
        run,
        "find the best policies over the whole range of a cost, and plot them",
        "bitmixer front --workdir runs/digits --method evolution --cost bitops --out runs/front",
    )
    add_settings(front)
    front.add_argument(
        "--cost", default="bitops", help="avg_bits, bitops (default), bytes, latency_ms, ..."
    )
    add_count(front, "--random", 100, "random policies to plot beside the front")
    add_out(front, "folder for front.json, front.png and widths.png")


def run(arguments: argparse.Namespace) -> int:
    """Searches, writes front.json and two plots, and prints a table."""
    from bitmixer_jax.files import check_new
    from bitmixer_jax.search import search_front
    from bitmixer_jax.search.describe import describe_front
    from bitmixer_jax.search.plots import write_front

    out = arguments.out
    for name in ("front.json", "front.png", "widths.png"):
        check_new(out / name, "--out", overwrite=arguments.overwrite, parents=True)
    with search_bar() as on_scores:
        front, session = search_front(
            arguments.workdir,
            arguments.cost,
            random=arguments.random,
            on_scores=on_scores,
            **settings_of(arguments),
        )
    write_front(out, front, overwrite=arguments.overwrite)
    print_markdown(describe_front(front, session))
    print(f"front and plots: {out}")
    return 0
