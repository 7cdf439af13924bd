"""bitmixer cost | search | front."""

from __future__ import annotations

import argparse
from typing import Any

from bitmixer_jax.cli.common import (
    AddCommand,
    add_latency,
    add_out,
    add_set,
    few,
    print_markdown,
    seed,
)


def add(command: AddCommand) -> None:
    """Adds the commands."""
    cost = command(
        "cost",
        _cost,
        "what a policy costs; change the widths of some layers",
        "bitmixer cost --workdir runs/digits --policy 4 --set 'stage3.*=2' --out policy.json",
    )
    whose = cost.add_mutually_exclusive_group(required=True)
    whose.add_argument("--workdir", metavar="DIR", help="folder of a run")
    whose.add_argument("--model", help="name of a network for ImageNet or CIFAR, such as resnet18")
    cost.add_argument("--policy", help="as of evaluate (default: the widest width)")
    add_set(cost)
    add_latency(cost)
    add_out(cost, "write the policy there", required=False)

    search = command(
        "search",
        _search,
        "find the best policy within a budget",
        "bitmixer search --workdir runs/digits --method greedy --budget avg_bits=3 "
        "--out policy.json",
    )
    _add_search(search)
    search.add_argument(
        "--budget",
        required=True,
        action="append",
        metavar="COST=MOST",
        help="avg_bits=3, bitops=60%% (of the widest), bytes=40000, ...; repeat to combine",
    )
    add_out(search, "the policy file to write")

    front = command(
        "front",
        _front,
        "find the best policies over the whole range of a cost, and plot them",
        "bitmixer front --workdir runs/digits --method evolution --cost bitops --out runs/front",
    )
    _add_search(front)
    front.add_argument(
        "--cost", default="bitops", help="avg_bits, bitops (default), bytes, latency_ms, ..."
    )
    front.add_argument(
        "--random",
        type=few,
        default=100,
        metavar="N",
        help="random policies to draw beside it (default 100)",
    )
    add_out(front, "folder for front.json, front.png and widths.png")


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workdir", required=True, metavar="DIR[@STAGE]", help="folder of a trained run"
    )
    command.add_argument(
        "--method", default="greedy", help="greedy (default), ilp, evolution or random"
    )
    command.add_argument(
        "--seed", type=seed, default=0, help="of the images and of the method (default 0)"
    )
    command.add_argument(
        "--evaluations",
        type=few,
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
        type=few,
        default=2000,
        metavar="N",
        help="images that score a policy (default 2000)",
    )
    command.add_argument(
        "--split", default="", help="their split (default: what training left out, if anything)"
    )
    command.add_argument("--data_dir", help="where the data are, if not where training found them")
    add_latency(command)


def _cost(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.cost import costs, describe
    from bitmixer_jax.runs import choose_policy, network_of

    if arguments.out is not None:
        from bitmixer_jax.files import check_free

        check_free(arguments.out, arguments.overwrite)
    model = network_of(arguments.workdir, arguments.model)
    text = arguments.policy or str(model.space.widest)
    policy = choose_policy(model, text, arguments.set)
    print(f"policy {','.join(map(str, policy))}")
    print_markdown(describe(model, policy, costs(model, arguments.latency)))
    if arguments.out is not None:
        from bitmixer_jax.policy import save_policy

        save_policy(arguments.out, policy, model.names, model.space, overwrite=arguments.overwrite)
        print(f"written: {arguments.out}")
    return 0


def _settings(arguments: argparse.Namespace) -> Any:
    from bitmixer_jax.search.workdir import Settings

    return Settings(
        method=arguments.method,
        seed=arguments.seed,
        evaluations=arguments.evaluations,
        sensitivity=arguments.sensitivity,
        images=arguments.images,
        split=arguments.split,
        data_dir=arguments.data_dir,
        latency=arguments.latency,
    )


def _search(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.search.workdir import search_workdir

    lines = search_workdir(
        arguments.workdir,
        arguments.budget,
        arguments.out,
        _settings(arguments),
        overwrite=arguments.overwrite,
    )
    print_markdown(lines)
    print(f"policy: {arguments.out}")
    return 0


def _front(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.search.workdir import front_workdir

    lines = front_workdir(
        arguments.workdir,
        arguments.cost,
        arguments.out,
        _settings(arguments),
        random=arguments.random,
        overwrite=arguments.overwrite,
    )
    print_markdown(lines)
    print(f"front and plots: {arguments.out}")
    return 0
