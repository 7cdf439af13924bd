"""bitmixer export: writes a trained network for other software, and verifies it."""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING

from bitmixer_jax.cli.common import (
    AddCommand,
    RenamedFlag,
    add_count,
    add_data_dir,
    add_out,
    add_policy,
    add_seed,
    add_workdir,
    changes_of,
    print_markdown,
)

if TYPE_CHECKING:
    from bitmixer_jax.export.integer_model import IntegerModel


def add(command: AddCommand) -> None:
    """Adds the command."""
    export = command(
        "export",
        run,
        "write a trained network for other software, and verify what was written",
        "bitmixer export --workdir runs/digits --format packed --out digits.packed",
    )
    add_workdir(export)
    export.add_argument(
        "--format", required=True, help="packed, onnx, pytorch, safetensors or stablehlo"
    )
    add_policy(
        export, "onnx: export this policy alone (default: all policies; the policy is an input)"
    )
    export.add_argument(
        "--storage_dtype",
        default="int8",
        help="onnx, one policy: weights in int8 (default), int4 or int2",
    )
    export.add_argument(
        "--fast",
        action="store_true",
        help="onnx, one policy: compute everything in 8 bits: over twice as fast, but some answers "
        "differ",
    )
    export.add_argument(
        "--norm_dtype",
        default="float32",
        help="packed: norms in float32 (default, exact) or float16 (smaller file)",
    )
    export.add_argument("--carrier", action=RenamedFlag, new="--storage_dtype")
    export.add_argument("--tables", action=RenamedFlag, new="--norm_dtype")
    add_count(export, "--images", 500, "test images to verify on")
    add_count(export, "--random", 10, "random policies to verify")
    add_seed(export, "the random policies")
    add_data_dir(export)
    add_out(export, "file to write; for pytorch a folder")


def run(arguments: argparse.Namespace) -> int:
    """Exports, prints the result of the check and, for a packed file, a table of sizes."""
    from bitmixer_jax.export import export_network
    from bitmixer_jax.export.verify import summary

    report = export_network(
        arguments.workdir,
        arguments.out,
        overwrite=arguments.overwrite,
        format=arguments.format,
        policy=arguments.policy or None,
        changes=changes_of(arguments),
        storage_dtype=arguments.storage_dtype,
        fast=arguments.fast,
        norm_dtype=arguments.norm_dtype,
        images=arguments.images,
        random=arguments.random,
        seed=arguments.seed,
        data_dir=arguments.data_dir,
    )
    if arguments.format == "packed":
        from bitmixer_jax.export.packed import load_packed

        network = load_packed(arguments.out)
        print_markdown(_sizes(network, arguments.out, arguments.norm_dtype))
    print(summary(report))
    print(f"written: {arguments.out} ({report['bytes']:,} bytes), {arguments.out.name}.report.json")
    return 0


def _sizes(network: IntegerModel, path: pathlib.Path, norm_dtype: str) -> list[str]:
    """Returns a Markdown table with the size of this file, and of bare weights at other widths."""
    from bitmixer_jax.export.integer_model import FloatStem

    weights = sum(layer.info.params for layer in network.layers)
    stem, head = network.stem, network.head
    first = stem.kernel if isinstance(stem, FloatStem) else stem.kernels[0].codes
    others = first.nbytes + head.kernel.nbytes + head.bias.nbytes
    size = path.stat().st_size
    norms = sum(2 * k.multiplier.size for layer in network.layers for k in layer.kernels)
    norms *= 4 if norm_dtype == "float32" else 2
    widest = network.space.widest
    bare = weights * widest / 8 + others
    rows = ["| | bytes |", "|---|---|", f"| float32 weights | {4 * weights + others:,.0f} |"]
    for width in sorted({8, 4, 3, 2, *network.space.choices}, reverse=True):
        bytes_ = weights * width / 8 + others
        rows.append(f"| {width}-bit weights, first and last layer, bare | {bytes_:,.0f} |")
    rows += [
        f"| this file: all widths up to {widest} bits | {size:,} "
        f"({100 * (size / bare - 1):+.1f}% over bare {widest}-bit) |",
        f"| of it norms of all pairs of widths, {norm_dtype} | {norms:,} |",
    ]
    for planes, end, width in _cuts(path):
        rows.append(f"| cut to {width} bits ({planes} planes) | {end:,} |")
    return rows


def _cuts(path: pathlib.Path) -> list[tuple[int, int, int]]:
    """Returns (planes, bytes, widest width) of each narrower file that this one can be cut to."""
    from bitmixer_jax.errors import UserError
    from bitmixer_jax.export.packed import load_packed, plane_ends

    by_width: dict[int, tuple[int, int]] = {}
    for planes, end in plane_ends(path):
        try:
            width = load_packed(path, planes).space.widest
        except UserError:  # too few planes for any width
            continue
        by_width.setdefault(width, (planes, end))  # the fewest planes of each width
    narrower = sorted(by_width, reverse=True)[1:]
    return [(*by_width[width], width) for width in narrower]
