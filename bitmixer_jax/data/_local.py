"""Local copies of data sets: how one is written to a folder, opened, and loaded from there.

A local copy is a folder `data_dir/NAME` with one array per file (`train_images.npy`,
`train_labels.npy`, `test_images.npy`, `test_labels.npy`, all uint8) and `info.json`, which holds
counts, class names, the training split's mean and standard deviation, the form it was made from,
the size and SHA-256 of each file, and the SHA-256 of all that.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO, cast

import numpy as np

from bitmixer_jax.data._dataset import Dataset, channel_stats
from bitmixer_jax.data._names import one_line
from bitmixer_jax.data._specs import SPECS, Spec, array_shapes
from bitmixer_jax.data._splits import parse_split
from bitmixer_jax.errors import UserError
from bitmixer_jax.files import open_file, read_json

_INFO_FORMAT = "bitmixer-dataset"
_INFO_VERSION = 1
_INFO_LIMIT = 2**20  # bytes; it has some two thousand
_DIGEST = "sha256"


def load_local(name: str, split: str, data_dir: pathlib.Path) -> Dataset:
    """Loads a split, or a slice of one, of the local copy `data_dir/name`, and checks its files."""
    spec = SPECS[name]
    parts = parse_split(split, spec.counts)
    info, arrays = open_local(name, data_dir, {part.name for part in parts})
    images = np.concatenate([arrays[f"{p.name}_images"][p.start : p.stop] for p in parts])
    labels = np.concatenate([arrays[f"{p.name}_labels"][p.start : p.stop] for p in parts])
    if labels.max() >= len(spec.classes):
        found = f"expected labels in 0..{len(spec.classes) - 1}, found {labels.max()}"
        raise damaged(data_dir / name / f"{parts[0].name}_labels.npy", found)
    return Dataset(
        name=name,
        split=split,
        images=images,
        labels=labels.astype(np.int32),
        classes=spec.classes,
        mean=np.asarray(info["mean"], np.float32),
        std=np.asarray(info["std"], np.float32),
    )


def open_local(
    name: str, data_dir: pathlib.Path, splits: Collection[str] = ("train", "test")
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Opens a local copy and checks every byte of some splits, and what describes them.

    A file that this process has checked is read again only if it has changed.

    Args:
      name: one of `SPECS`.
      data_dir: the folder which holds the copy as `data_dir/name`.
      splits: which arrays are wanted.

    Returns:
      The content of `info.json`, and the arrays by name, uint8, mapped from their files.

    Raises:
      UserError: there is no copy, or it is damaged or incomplete.
    """
    spec, folder = SPECS[name], data_dir / name
    info = _read_info(name, data_dir)
    wanted = {*splits} | ({"train"} if _DIGEST not in info else set())
    arrays = {}
    for array, shape in array_shapes(spec).items():
        path, entry = folder / f"{array}.npy", info["files"][f"{array}.npy"]
        if not path.is_file():
            raise damaged(path, "the file is missing")
        if path.stat().st_size != entry["bytes"]:
            raise damaged(path, f"expected {entry['bytes']} bytes, found {path.stat().st_size}")
        if array.partition("_")[0] in wanted:
            arrays[array] = _open_array(path, entry["sha256"], shape)
    if _DIGEST not in info:  # of an older version: its numbers are compared with the images
        _check_stats(folder, (tuple(info["mean"]), tuple(info["std"])), arrays["train_images"])
    return info, arrays


def _read_info(name: str, data_dir: pathlib.Path) -> dict[str, Any]:
    """Reads `info.json` and checks all of it that anything depends on."""
    spec, path = SPECS[name], data_dir / name / "info.json"
    if not path.is_file():
        raise UserError(
            f"data set {name} is not prepared, there is no {path}: run "
            f"`bitmixer prepare {name} --source PATH --data_dir {data_dir}` (PATH: {spec.sources})"
        )
    try:
        info = read_json(path, _INFO_LIMIT)
        if not isinstance(info, dict):
            raise ValueError("not an object")
        for key, wanted in (
            ("format", _INFO_FORMAT),
            ("version", _INFO_VERSION),
            ("name", name),
            ("counts", dict(spec.counts)),
            ("classes", list(spec.classes)),
        ):
            if info[key] != wanted:
                raise damaged(path, f"{key}: expected {wanted}, found {_short(info[key])}")
        for array in array_shapes(spec):
            entry = info["files"][f"{array}.npy"]
            if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"{array}: bytes and sha256 are not a number and a text")
        for key, low, high in (("mean", 0, 255), ("std", 1e-6, 255)):
            numbers, count = info[key], spec.image_shape[2]
            if len(numbers) != count or not all(
                type(x) in (int, float) and low <= x <= high for x in numbers
            ):
                raise damaged(path, f"{key} must be {count} numbers, {key} > 0, at most 255")
        if _DIGEST in info and info[_DIGEST] != _digest(info):
            raise damaged(
                path, f"expected {_DIGEST} {_short(info[_DIGEST])}, found {_digest(info)}"
            )
    except UserError:
        raise
    except Exception as error:  # missing keys, other types, numbers beyond range
        reason = f"no {error}" if isinstance(error, KeyError) else _short(error)
        raise damaged(path, f"not the JSON it should be ({reason})") from None
    return info


def _open_array(path: pathlib.Path, sha256: str, shape: tuple[int, ...]) -> np.ndarray:
    """Maps an array from its file, whose every byte is checked."""
    try:
        status = path.stat()
        found = _known_sha256(path, status.st_ino, status.st_mtime_ns, status.st_size)
        if found != sha256:
            raise damaged(path, f"expected sha256 {_short(sha256)}, found {found}")
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # of its header
        raise damaged(path, f"not an .npy file ({_short(error)})") from None
    if not isinstance(mapped, np.ndarray) or mapped.shape != shape or mapped.dtype != np.uint8:
        raise damaged(path, f"expected uint8 {list(shape)}")
    return mapped


@functools.lru_cache(maxsize=64)
def _known_sha256(path: pathlib.Path, inode: int, changed: int, size: int) -> str:
    """SHA-256 of a file; what else is given says that it is the file that was read before."""
    return sha256_file(path)


_checked_stats: set[tuple[Any, ...]] = set()


def _check_stats(
    folder: pathlib.Path, stated: tuple[tuple[float, ...], tuple[float, ...]], images: np.ndarray
) -> None:
    """Compares stated mean and standard deviation with those of the training images, once."""
    key = (folder, stated)
    if key in _checked_stats:
        return
    found = channel_stats(images)
    if not np.allclose(found, stated, rtol=1e-5):
        told = [values.tolist() for values in found]
        raise damaged(
            folder / "info.json", f"mean and std are not those of the images, which are {told}"
        )
    _checked_stats.add(key)


def _digest(info: Mapping[str, Any]) -> str:
    """SHA-256 of all else that `info.json` says."""
    said = {key: value for key, value in info.items() if key != _DIGEST}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _short(value: object) -> str:
    text = one_line(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


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
    info[_DIGEST] = _digest(info)
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
    with open_file(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
