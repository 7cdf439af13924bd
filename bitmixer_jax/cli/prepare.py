"""bitmixer prepare: verifies a published data set and keeps a local copy."""

from __future__ import annotations

import argparse

from bitmixer_jax.cli.common import AddCommand, path


def add(command: AddCommand) -> None:
    """Adds the command."""
    prepare = command(
        "prepare",
        run,
        "verify a data set and keep a local copy for training",
        "bitmixer prepare cifar10 --source cifar-10-python.tar.gz --data_dir data",
    )
    prepare.add_argument("name", help="cifar10, fashion_mnist, mnist or imagenet")
    prepare.add_argument(
        "--source", required=True, type=path, help="archive or folder of the published data"
    )
    prepare.add_argument(
        "--data_dir",
        type=path,
        help="folder for the copy (default: $BITMIXER_DATA, or a cache folder)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prepares the data set and prints where the copy is."""
    from bitmixer_jax.data import default_data_dir
    from bitmixer_jax.preparation import prepare

    data_dir = arguments.data_dir or default_data_dir()
    print(f"ready: {prepare(arguments.name, arguments.source, data_dir)}")
    return 0
