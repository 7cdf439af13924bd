"""Reads MNIST and Fashion-MNIST from their four idx files."""

import struct

import numpy as np

from bitmixer_jax.data.local import Spec
from bitmixer_jax.errors import UserError
from bitmixer_jax.preparation.archives import Files, Format, check_size

_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def _names(file: str) -> tuple[str, ...]:
    """Returns the names in use for a file: gzipped or not, with a hyphen or a dot before `idx`."""
    dotted = file.replace("-idx", ".idx")
    return file, f"{file}.gz", dotted, f"{dotted}.gz"


def read(files: Files, spec: Spec) -> dict[str, np.ndarray]:
    """Reads idx files: two zero bytes, type 8 (byte), rank, big-endian sizes, data."""
    arrays = {}
    for array, shape in spec.array_shapes().items():
        file = _FILES[array]
        sizes = shape[:3]  # the images in idx files have no axis of channels
        header = struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes)
        data = files.read(file)
        if not data.startswith(header):
            raise UserError(
                f"{files.where}/{file} is not the idx file of {list(sizes)} bytes it should be: "
                f"expected the header {header.hex()}, found {data[: len(header)].hex()}",
                "damaged",
            )
        check_size(data, len(header) + int(np.prod(sizes)), f"{files.where}/{file}")
        arrays[array] = np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)
    return arrays


FORMAT = Format("idx", tuple(map(_names, _FILES.values())), ("data", "package/data"), read)
