"""bitmixer train: trains a network, or continues a run that was stopped."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback

from bitmixer_jax.cli.common import AddCommand, count, path, print_markdown, progress_bar


def add(command: AddCommand) -> None:
    """Adds the command."""
    train = command(
        "train",
        run,
        "train a network, or continue a run that was stopped",
        "bitmixer train --config experiments/configs/digits.py --workdir runs/digits "
        "--config.seed=1 --config.stages.mixed.epochs=40",
    )
    train.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="Python file with get_config()"
    )
    train.add_argument("--workdir", required=True, type=path, help="folder of the run")
    train.add_argument("--config.NAME", metavar="VALUE", help="change a setting (repeatable)")
    many = train.add_argument_group(
        "several processes",
        "not needed on TPU pods, SLURM and Open MPI, where JAX finds them; see docs/scaling.md",
    )
    many.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process")
    many.add_argument("--processes", type=count, metavar="N", help="number of processes")
    many.add_argument("--process", type=count, metavar="I", help="number of this process, from 0")
    many.add_argument(
        "--heartbeat_seconds",
        type=count,
        default=60,
        metavar="S",
        help="stop when another process has not answered for S seconds (default 60)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains, evaluates and writes the report."""
    from bitmixer_jax import distributed

    distributed.connect(
        arguments.coordinator,
        arguments.processes,
        arguments.process,
        max(1, arguments.heartbeat_seconds),
    )
    from bitmixer_jax.report import report
    from bitmixer_jax.training import Interrupted, load_config, train

    try:
        config = load_config(arguments.config, arguments.overrides)
        trained = train(config, arguments.workdir)
        folder, lines = report(trained, progress=progress_bar("evaluating"))
    except Interrupted as signal:
        return 128 + int(signal.args[0])
    except Exception as error:
        aborted = (
            error
            if isinstance(error, distributed.ProcessAborted)
            else distributed.as_aborted(error)
        )
        if aborted is None:
            raise
        if aborted.status == 1:
            traceback.print_exception(error)
        print(f"bitmixer: {aborted}", file=sys.stderr, flush=True)
        time.sleep(1)  # other processes that failed for the same reason have time to say so
        os._exit(aborted.status)  # an orderly exit would wait for the other processes
    if distributed.is_primary():
        print_markdown(lines)
        print(f"plots and summary: {folder}")
    return 0
