"""bitmixer predict: classifies image files."""

from __future__ import annotations

import argparse

from bitmixer_jax.cli.common import AddCommand, add_count, add_policy, changes_of, path


def add(command: AddCommand) -> None:
    """Adds the command."""
    predict = command(
        "predict",
        run,
        "classify image files with a packed or ONNX export, or a workdir",
        "bitmixer predict --model digits.packed --policy 3 photo.png",
    )
    predict.add_argument(
        "--model", required=True, help="packed file, ONNX file (.onnx), or folder of a run"
    )
    add_policy(predict, default="")
    add_count(predict, "--top", 5, "number of classes to print")
    predict.add_argument("images", nargs="+", type=path, metavar="IMAGE")


def run(arguments: argparse.Namespace) -> int:
    """Prints the best classes of each image file."""
    from bitmixer_jax.errors import one_line
    from bitmixer_jax.predict import predict_files

    predictions = predict_files(
        arguments.model,
        arguments.images,
        arguments.policy or None,
        changes_of(arguments),
        arguments.top,
    )
    for file, classes in predictions:
        text = ", ".join(f"{name} {100 * probability:.1f}%" for name, probability in classes)
        print(f"{one_line(file)}: {text}")
    return 0
