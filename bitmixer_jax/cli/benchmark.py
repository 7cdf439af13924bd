"""bitmixer benchmark: measures time and memory of training and evaluation."""

from __future__ import annotations

import argparse

from bitmixer_jax.cli.common import AddCommand, add_count, add_json, check_json, write_json


def add(command: AddCommand) -> None:
    """Adds the command."""
    benchmark = command(
        "benchmark",
        run,
        "measure time and memory of training and evaluation against the full-precision baseline",
        "bitmixer benchmark --model resnet20 --batch_size 128 --json speed.json",
    )
    benchmark.add_argument(
        "--model", default="resnet20", help="name of the network (default resnet20)"
    )
    add_count(benchmark, "--batch_size", 128, "images in a batch, over all devices")
    add_count(benchmark, "--steps", 20, "timed steps of each kind")
    benchmark.add_argument(
        "--compute_dtype", default="float32", help="float32 (default) or bfloat16"
    )
    add_json(benchmark)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table and writes the result."""
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
