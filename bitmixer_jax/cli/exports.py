"""bitmixer export | predict."""

from __future__ import annotations

import argparse

from bitmixer_jax.cli.common import (
    AddCommand,
    add_out,
    add_set,
    few,
    path,
    print_markdown,
    seed,
)


def add(command: AddCommand) -> None:
    """Adds the commands."""
    export = command(
        "export",
        _export,
        "write a trained network for other software, and verify what was written",
        "bitmixer export --workdir runs/digits --format packed --out digits.packed",
    )
    export.add_argument(
        "--workdir", required=True, metavar="DIR[@STAGE]", help="folder of a trained run"
    )
    export.add_argument(
        "--format", required=True, help="packed, onnx, pytorch, safetensors or stablehlo"
    )
    export.add_argument(
        "--policy",
        default="",
        help="onnx: this policy alone, in integers (default: all, the policy is an input)",
    )
    add_set(export)
    export.add_argument(
        "--storage_dtype", default="int8", help="onnx, one policy: weights in int8, int4 or int2"
    )
    export.add_argument(
        "--fast",
        action="store_true",
        help="onnx, one policy: 8 bits throughout, over twice as fast; answers differ somewhat",
    )
    export.add_argument(
        "--norm_dtype",
        default="float32",
        help="packed: norms as float32 (exact) or float16 (small)",
    )
    export.add_argument(
        "--images", type=few, default=500, metavar="N", help="test images to verify on"
    )
    export.add_argument(
        "--random", type=few, default=10, metavar="N", help="random policies to verify"
    )
    export.add_argument("--seed", type=seed, default=0, help="of these (default 0)")
    export.add_argument("--data_dir", help="where the data are, if not where training found them")
    add_out(export, "file to write; a folder for pytorch")

    predict = command(
        "predict",
        _predict,
        "classify image files with a packed or ONNX export, or a workdir",
        "bitmixer predict --model digits.packed --policy 3 photo.png",
    )
    predict.add_argument(
        "--model", required=True, help="a packed file, an .onnx file, or the folder of a run"
    )
    predict.add_argument("--policy", default="", help="as of evaluate (default: the widest width)")
    add_set(predict)
    predict.add_argument(
        "--top", type=few, default=5, metavar="K", help="classes to print (default 5)"
    )
    predict.add_argument("images", nargs="+", type=path, metavar="IMAGE")


def _export(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.export.workdir import Settings, export_workdir

    settings = Settings(
        format=arguments.format,
        policy=arguments.policy,
        changes=tuple(arguments.set),
        storage_dtype=arguments.storage_dtype,
        fast=arguments.fast,
        norm_dtype=arguments.norm_dtype,
        images=arguments.images,
        random=arguments.random,
        seed=arguments.seed,
        data_dir=arguments.data_dir,
    )
    lines = export_workdir(arguments.workdir, arguments.out, settings, arguments.overwrite)
    table = [line for line in lines if line.startswith("|")]
    if table:
        print_markdown(table)
    for line in lines:
        if line not in table:
            print(line)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.errors import one_line
    from bitmixer_jax.export.predict import predict_files

    found = predict_files(
        arguments.model, arguments.images, arguments.policy, arguments.set, arguments.top
    )
    for file, classes in found:
        named = ", ".join(f"{name} {100 * share:.1f}%" for name, share in classes)
        print(f"{one_line(file)}: {named}")
    return 0
