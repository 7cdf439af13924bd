"""bitmixer train | evaluate | prepare | benchmark."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback

from bitmixer_jax.cli.common import (
    AddCommand,
    add_set,
    check_json,
    few,
    path,
    print_markdown,
    seed,
    write_json,
)


def add(command: AddCommand) -> None:
    """Adds the commands."""
    train = command(
        "train",
        _train,
        "train a network, or go on where a run was stopped",
        "bitmixer train --config experiments/configs/digits.py --workdir runs/digits "
        "--config.seed=1 --config.stages.mixed.epochs=40",
    )
    train.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="Python file with get_config()"
    )
    train.add_argument("--workdir", required=True, type=path, help="folder of the run")
    train.add_argument("--config.NAME", metavar="VALUE", help="change a setting (repeatable)")
    many = train.add_argument_group(
        "many processes", "on TPU pods, SLURM and Open MPI the environment tells; docs/scaling.md"
    )
    many.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process")
    many.add_argument("--processes", type=few, metavar="N", help="how many there are")
    many.add_argument("--process", type=few, metavar="I", help="which one this is, from 0")
    many.add_argument(
        "--heartbeat_seconds",
        type=few,
        default=60,
        metavar="S",
        help="end when another process was silent for so long (default 60)",
    )

    evaluate = command(
        "evaluate",
        _evaluate,
        "test accuracy by uniform width, of random policies, of one policy",
        "bitmixer evaluate --workdir runs/digits --random 100 --policy 4,3,2,2,3,4 --json out.json",
    )
    evaluate.add_argument(
        "--workdir",
        required=True,
        metavar="DIR[@STAGE]",
        help="folder of a run; @STAGE: as it was at the end of that stage",
    )
    evaluate.add_argument(
        "--policy", help="a width (3), one per layer (4,3,2,...), or a policy file"
    )
    add_set(evaluate)
    evaluate.add_argument(
        "--random", type=few, default=0, metavar="N", help="number of random policies"
    )
    evaluate.add_argument("--seed", type=seed, default=0, help="of the random policies (default 0)")
    evaluate.add_argument(
        "--no-uniform", action="store_true", help="aborted the uniform widths out"
    )
    evaluate.add_argument(
        "--levels", action="store_true", help="also count the levels each layer uses"
    )
    evaluate.add_argument(
        "--recalibrate",
        action="store_true",
        help="estimate BN statistics of pairs of widths never visited in training",
    )
    evaluate.add_argument("--data_dir", help="where the data are, if not where training found them")
    evaluate.add_argument("--json", type=path, metavar="FILE", help="write the result there")

    prepare = command(
        "prepare",
        _prepare,
        "verify a data set and keep a local copy for training",
        "bitmixer prepare cifar10 --source cifar-10-python.tar.gz --data_dir data",
    )
    prepare.add_argument("name", help="cifar10, fashion_mnist, mnist or imagenet")
    prepare.add_argument("--source", required=True, type=path, help="archive or folder")
    prepare.add_argument(
        "--data_dir",
        type=path,
        help="where the copy goes (default: $BITMIXER_DATA or a cache folder)",
    )

    benchmark = command(
        "benchmark",
        _benchmark,
        "time of a training step against that of the float twin, in one run",
        "bitmixer benchmark --model resnet20 --batch_size 128 --json speed.json",
    )
    benchmark.add_argument(
        "--model", default="resnet20", help="name of the network (default resnet20)"
    )
    benchmark.add_argument(
        "--batch_size", type=few, default=128, help="over all devices (default 128)"
    )
    benchmark.add_argument(
        "--steps", type=few, default=20, help="timed steps of each kind (default 20)"
    )
    benchmark.add_argument("--compute_dtype", default="float32", help="float32 or bfloat16")
    benchmark.add_argument("--json", type=path, metavar="FILE", help="write the result there")


def _train(arguments: argparse.Namespace) -> int:
    from bitmixer_jax import distributed as hosts

    hosts.connect(
        arguments.coordinator,
        arguments.processes,
        arguments.process,
        max(1, arguments.heartbeat_seconds),
    )
    from bitmixer_jax.runs import train_and_report
    from bitmixer_jax.training import Interrupted, load_config

    try:
        config = load_config(arguments.config, arguments.overrides)
        folder, summary = train_and_report(config, arguments.workdir)
    except Interrupted as signal:
        return 128 + int(signal.args[0])
    except Exception as error:
        aborted = error if isinstance(error, hosts.ProcessAborted) else hosts.as_aborted(error)
        if aborted is None:
            raise
        if aborted.status == 1:
            traceback.print_exception(error)
        print(f"bitmixer: {aborted}", file=sys.stderr, flush=True)
        time.sleep(1)  # so that the others, if they fail alike, can say so
        os._exit(aborted.status)  # an orderly end would wait for them
    if hosts.is_primary():
        print_markdown(summary)
        print(f"plots and summary: {folder}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.report import table
    from bitmixer_jax.runs import evaluate_workdir

    check_json(arguments.json, "examples")
    result = evaluate_workdir(
        arguments.workdir,
        policy=arguments.policy,
        changes=arguments.set,
        random=arguments.random,
        seed=arguments.seed,
        uniform=not arguments.no_uniform,
        data_dir=arguments.data_dir,
        recalibrate_missing=arguments.recalibrate,
        count_levels=arguments.levels,
    )
    levels = result.pop("levels", None)
    print_markdown(table(result))
    if levels:
        print("layer, bits: levels used by weights, by activations (share at the top level)")
        for row in levels:
            print(
                f"{row.layer}, {row.bits}: {row.weights}/{2**row.bits}, "
                f"{row.activations}/{2**row.bits} ({100 * row.saturated:.1f}%)"
            )
    write_json(arguments.json, result)
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.data import default_data_dir, prepare

    data_dir = arguments.data_dir or default_data_dir()
    print(f"ready: {prepare(arguments.name, arguments.source, data_dir)}")
    return 0


def _benchmark(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.benchmark import benchmark, describe

    check_json(arguments.json, "model")
    result = benchmark(
        arguments.model,
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        compute_dtype=arguments.compute_dtype,
    )
    print(describe(result))
    write_json(arguments.json, result)
    return 0
