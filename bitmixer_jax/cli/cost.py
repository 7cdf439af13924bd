"""bitmixer cost: computes what a policy costs."""

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
        "compute what a policy costs, and write the policy to a file",
        "bitmixer cost --workdir runs/digits --policy 4 --set 'stage3.*=2' --out policy.json",
    )
    network = cost.add_mutually_exclusive_group(required=True)
    network.add_argument("--workdir", metavar="DIR[@STAGE]", help="folder of a run")
    network.add_argument("--model", help="name of a network, such as resnet18")
    add_policy(cost, default="")
    add_latency(cost)
    add_out(cost, "policy file to write", required=False)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of costs and writes the policy."""
    from bitmixer_jax.cost import costs, describe
    from bitmixer_jax.files import check_new
    from bitmixer_jax.models import create_model
    from bitmixer_jax.policy import as_policy, save_policy
    from bitmixer_jax.trained import load

    if arguments.out is not None:
        check_new(arguments.out, "--out", overwrite=arguments.overwrite)
    if arguments.workdir is not None:
        model = load(arguments.workdir).model
    else:  # images of 32 x 32 pixels are CIFAR-10's, larger ones ImageNet's
        model = create_model(arguments.model, num_classes=10)
        if model.image_shape[0] != 32:
            model = create_model(arguments.model, num_classes=1000)
    policy = arguments.policy or model.space.widest
    policy = as_policy(policy, model.names, model.space, changes_of(arguments))
    print(f"policy {','.join(map(str, policy))}")
    print_markdown(describe(model, policy, costs(model, arguments.latency)))
    if arguments.out is not None:
        save_policy(arguments.out, policy, model.names, model.space, overwrite=arguments.overwrite)
        print(f"written: {arguments.out}")
    return 0
