"""bitmixer cost: what a policy costs."""

from __future__ import annotations

import argparse

from bitmixer_jax.cli.common import (
    AddCommand,
    add_latency,
    add_out,
    add_policy,
    changes_of,
    print_markdown,
)


def add(command: AddCommand) -> None:
    """Adds the command."""
    cost = command(
        "cost",
        run,
        "what a policy costs; change the widths of some layers",
        "bitmixer cost --workdir runs/digits --policy 4 --set 'stage3.*=2' --out policy.json",
    )
    network = cost.add_mutually_exclusive_group(required=True)
    network.add_argument("--workdir", metavar="DIR[@STAGE]", help="folder of a run")
    network.add_argument("--model", help="name of a network for ImageNet or CIFAR, e.g. resnet18")
    add_policy(cost, "as of evaluate (default: the widest width)", default="")
    add_latency(cost)
    add_out(cost, "write the policy there", required=False)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of costs, and writes the policy."""
    from bitmixer_jax.cost import costs, describe
    from bitmixer_jax.files import check_free
    from bitmixer_jax.models import create_model
    from bitmixer_jax.policy import as_policy, save_policy
    from bitmixer_jax.trained import load

    if arguments.out is not None:
        check_free(arguments.out, arguments.overwrite, "--out")
    if arguments.workdir is not None:
        model = load(arguments.workdir).model
    else:  # with the usual number of classes
        model = create_model(arguments.model, num_classes=10)
        if model.image_shape[0] != 32:
            model = create_model(arguments.model, num_classes=1000)
    given = arguments.policy or model.space.widest
    policy = as_policy(given, model.names, model.space, changes_of(arguments))
    print(f"policy {','.join(map(str, policy))}")
    print_markdown(describe(model, policy, costs(model, arguments.latency)))
    if arguments.out is not None:
        save_policy(arguments.out, policy, model.names, model.space, overwrite=arguments.overwrite)
        print(f"written: {arguments.out}")
    return 0
