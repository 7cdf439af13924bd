"""Local copies of data sets: how one is written to a folder, opened, and loaded from there.

A local copy is a folder `data_dir/NAME` with one array per file (`train_images.npy`,
`train_labels.npy`, `test_images.npy`, `test_labels.npy`, all uint8) and `info.json`, which holds
counts, class names, the training split's mean and standard deviation, the form it was made from,
and the size and SHA-256 of each file.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from bitmixer_jax.data._dataset import Dataset, channel_stats, kind, slice_split
from bitmixer_jax.data._specs import SPECS, Spec, array_shapes
from bitmixer_jax.errors import UserError

_INFO_FORMAT = "bitmixer-dataset"
_INFO_VERSION = 1


def load_local(name: str, split: str, data_dir: pathlib.Path) -> Dataset:
    """Loads a split, or a slice of one, of the local copy `data_dir/name`."""
    part, start, stop = slice_split(split, SPECS[name].counts)
    info, arrays = open_local(name, data_dir)
    labels = np.array(arrays[f"{part}_labels"][start:stop], np.int32)
    classes = SPECS[name].classes
    if labels.max() >= len(classes):
        found = f"expected labels in 0..{len(classes) - 1}, found {labels.max()}"
        raise damaged(data_dir / name / f"{part}_labels.npy", found)
    return Dataset(
        name=name,
        split=split,
        images=np.array(arrays[f"{part}_images"][start:stop]),
        labels=labels,
        classes=classes,
        mean=np.asarray(info["mean"], np.float32),
        std=np.asarray(info["std"], np.float32),
    )


def open_local(name: str, data_dir: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Opens a local copy and checks all that can be checked without reading the pixels.

    Args:
      name: one of `SPECS`.
      data_dir: the folder which holds the copy as `data_dir/name`.

    Returns:
      The content of `info.json`, and the arrays by name, uint8, mapped from their files.

    Raises:
      UserError: there is no copy, or it is damaged or incomplete.
    """
    spec, folder = SPECS[name], data_dir / name
    info_path = folder / "info.json"
    if not info_path.is_file():
        raise UserError(
            f"data set {name} is not prepared, there is no {info_path}: run "
            f"`bitmixer prepare {name} --source PATH --data_dir {data_dir}` (PATH: {spec.sources})"
        )
    shapes = array_shapes(spec)
    try:
        info = json.loads(info_path.read_text(encoding="utf-8"))
        stated = (info["format"], info["version"], info["name"], info["counts"], info["classes"])
        sizes = {array: info["files"][f"{array}.npy"]["bytes"] for array in shapes}
        stats = np.asarray([info["mean"], info["std"]], np.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(info_path, f"not the JSON it should be ({error!r})") from error
    wanted = (_INFO_FORMAT, _INFO_VERSION, name, dict(spec.counts), list(spec.classes))
    if stated != wanted:
        raise damaged(info_path, f"expected {wanted}, found {stated}")
    if stats.shape != (2, spec.image_shape[2]) or not (stats[1] > 0).all():
        raise damaged(
            info_path, f"mean and std must be {spec.image_shape[2]} numbers each, std > 0"
        )
    arrays: dict[str, np.ndarray] = {}
    for array, shape in shapes.items():
        path = folder / f"{array}.npy"
        if not path.is_file():
            raise damaged(path, "the file is missing")
        if path.stat().st_size != sizes[array]:
            raise damaged(path, f"expected {sizes[array]} bytes, found {path.stat().st_size}")
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise damaged(path, f"not an .npy file ({error})") from error
        if mapped.shape != shape or mapped.dtype != np.uint8:
            raise damaged(path, f"expected uint8 {list(shape)}, found {kind(mapped)}")
        arrays[array] = mapped
    return info, arrays


def damaged(path: pathlib.Path, what: str) -> UserError:
    """Returns the error for a damaged file `data_dir/NAME/FILE` of a local copy."""
    folder = path.parent
    return UserError(
        f"{path} is damaged: {what}; remove the folder {folder} and run "
        f"`bitmixer prepare {folder.name} --source PATH --data_dir {folder.parent}`"
    )


def write_local(
    folder: pathlib.Path,
    name: str,
    spec: Spec,
    form: str,
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Writes a local copy.

    Args:
      folder: an empty folder.
      name: one of `SPECS`.
      spec: what the arrays have been checked to be.
      form: name of the published form they were read from.
      arrays: by the names in `array_shapes`, uint8.
    """
    files: dict[str, Any] = {}
    for array, values in arrays.items():
        path = folder / f"{array}.npy"
        with _create(path) as file:
            np.save(file, values, allow_pickle=False)
        files[path.name] = {
            "sha256": sha256_file(path),
            "bytes": path.stat().st_size,
            "shape": list(values.shape),
            "dtype": str(values.dtype),
        }
    mean, std = channel_stats(arrays["train_images"])
    info = {
        "format": _INFO_FORMAT,
        "version": _INFO_VERSION,
        "name": name,
        "form": form,
        "image_shape": list(spec.image_shape),
        "counts": dict(spec.counts),
        "classes": list(spec.classes),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "files": files,
    }
    with _create(folder / "info.json") as file:
        file.write((json.dumps(info, indent=2) + "\n").encode())


@contextlib.contextmanager
def _create(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file for writing; what is written is on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sha256_file(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
