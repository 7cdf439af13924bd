"""bitmixer predict: classifies image files."""

from __future__ import annotations

import argparse

from bitmixer_jax.cli.common import AddCommand, add_policy, changes_of, count, path


def add(command: AddCommand) -> None:
    """Adds the command."""
    predict = command(
        "predict",
        run,
        "classify image files with a packed or ONNX export, or a workdir",
        "bitmixer predict --model digits.packed --policy 3 photo.png",
    )
    predict.add_argument(
        "--model", required=True, help="a packed file, an .onnx file, or the folder of a run"
    )
    add_policy(predict, "as of evaluate (default: the widest width)", default="")
    predict.add_argument(
        "--top", type=count, default=5, metavar="K", help="classes to print (default 5)"
    )
    predict.add_argument("images", nargs="+", type=path, metavar="IMAGE")


def run(arguments: argparse.Namespace) -> int:
    """Prints the best classes of each image file."""
    from bitmixer_jax.errors import one_line
    from bitmixer_jax.predict import predict_files

    found = predict_files(
        arguments.model,
        arguments.images,
        arguments.policy or None,
        changes_of(arguments),
        arguments.top,
    )
    for file, classes in found:
        named = ", ".join(f"{name} {100 * share:.1f}%" for name, share in classes)
        print(f"{one_line(file)}: {named}")
    return 0
