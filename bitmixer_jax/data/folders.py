"""Folders of classes: the images of `ROOT/SPLIT/CLASS/FILE`.

A source is small and pickles well, because every decoding process gets a copy.
"""

import dataclasses
import logging
import os
import pathlib

import numpy as np

from bitmixer_jax.data.decode import MAX_IMAGE_BYTES, SUFFIXES
from bitmixer_jax.data.splits import parse_split, split_names
from bitmixer_jax.errors import UserError, listed, reason
from bitmixer_jax.files import read_bytes

_log = logging.getLogger(__name__)

_VALIDATION = ("val", "validation")  # folders of the split "validation"


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files ``root/SPLIT/CLASS/FILE``, in a fixed order that mixes the classes.

    Attributes:
      root: folder of all splits.
      names: the names ``SPLIT/CLASS/FILE`` of all files, one after the other.
      ends: ``[N + 1]`` int64, where each name ends. A list of a million strings would take ten
        times the memory, in each process.
      labels: ``[N]`` int32.
    """

    root: str
    names: bytes
    ends: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns the path of a file."""
        name = self.names[self.ends[index] : self.ends[index + 1]]
        return os.path.join(self.root, os.fsdecode(name))

    def read(self, index: int) -> tuple[bytes, int]:
        """See Source."""
        return read_bytes(self.name(index), MAX_IMAGE_BYTES), int(self.labels[index])


def open_folder(
    folder: pathlib.Path, split: str, skip_unreadable: bool
) -> tuple[FolderSource, tuple[str, ...]]:
    """Lists the images of a split, or of a slice of it, and the classes.

    Args:
      folder: holds ``train``, and ``val`` (or ``validation``) and the like, each with one folder
        for each class.
      split: as `load` takes it.
      skip_unreadable: warn of classes without images, and go on without them.

    Raises:
      UserError: there is no such folder or split, a class has no images, or the classes are not
        those of train.
    """
    try:
        found = [folder / name for name, is_dir in _entries(folder) if is_dir]
    except UserError:
        if folder.is_dir():
            raise
        found = []
    several = [path.name for path in found if path.name in _VALIDATION]
    if len(several) > 1:
        raise UserError(
            f"{folder}: {' and '.join(several)} are the same split; keep one of them", "conflict"
        )
    folders = {"validation" if p.name in _VALIDATION else p.name: p for p in found}
    if "train" not in folders:
        raise UserError(
            f"{folder}: no folder of classes: give one with train/CLASS/*.JPEG and "
            "val/CLASS/*.JPEG",
            "no-data",
        )
    try:
        chosen = split_names(split, folders)
    except UserError as error:
        raise UserError(
            f"{folder}: {error} (the folder val is the split validation)", error.code
        ) from None
    classes = _classes(folders["train"])
    of_splits = {
        name: _list_split(folders[name], classes, folders["train"], skip_unreadable)
        for name in chosen
    }
    counts = {name: len(names) for name, (names, _) in of_splits.items()}
    # Shuffled, so that a slice such as train[:90%] has images of every class; by `RandomState`
    # because numpy promises that its streams never change.
    orders = {name: np.random.RandomState(0).permutation(count) for name, count in counts.items()}
    names, labels = [], []
    for part, start, stop in parse_split(split, {**dict.fromkeys(folders, 0), **counts}):
        all_names, all_labels = of_splits[part]
        names += [all_names[i] for i in orders[part][start:stop]]
        labels.append(all_labels[orders[part][start:stop]])
    ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
    source = FolderSource(str(folder), b"".join(names), ends, np.concatenate(labels))
    return source, tuple(classes)


def _list_split(
    folder: pathlib.Path, classes: list[str], train: pathlib.Path, skip_unreadable: bool
) -> tuple[list[bytes], np.ndarray]:
    """Returns the names ``SPLIT/CLASS/FILE`` of a split, by class, and labels int32 ``[N]``."""
    of_split = _classes(folder)
    unknown = sorted({*of_split} - {*classes})
    if unknown:
        raise UserError(
            f"{folder}: {len(unknown)} classes that {train} does not have: {listed(unknown)}",
            "other-data",
        )
    files = [_images(folder / name) if name in of_split else [] for name in classes]
    empty = [name for name, found in zip(classes, files, strict=True) if not found]
    if len(empty) == len(classes):
        raise UserError(
            f"{folder}: no images in any class; files end with {', '.join(SUFFIXES)}", "no-data"
        )
    if empty:
        text = f"{folder}: {len(empty)} of {len(classes)} classes without images: {listed(empty)}"
        if not skip_unreadable:
            raise UserError(
                f"{text}; complete them, or set config.stream.skip_unreadable=True", "no-data"
            )
        _log.warning("%s", text)
    names = [
        os.fsencode(f"{folder.name}/{name}/{file}")
        for name, of_class in zip(classes, files, strict=True)
        for file in of_class
    ]
    counts = [len(of_class) for of_class in files]
    return names, np.repeat(np.arange(len(classes), dtype=np.int32), counts)


def _classes(folder: pathlib.Path) -> list[str]:
    """Returns the names of the folders in a folder: the classes of a split."""
    found = _entries(folder)
    classes = [name for name, is_dir in found if is_dir]
    if not classes:
        loose = sum(name.lower().endswith(SUFFIXES) for name, _ in found)
        raise UserError(
            f"{folder}: no folders of classes, and {loose} images outside of any: move each image "
            "into the folder of its class",
            "no-data",
        )
    return classes


def _images(folder: pathlib.Path) -> list[str]:
    """Returns the names of the image files in a folder."""
    found = _entries(folder)
    images = [name for name, is_dir in found if not is_dir and name.lower().endswith(SUFFIXES)]
    within = [name for name, is_dir in found if is_dir]
    if images and within:
        _log.warning("%s: images in folders within it are not read: %s", folder, listed(within))
    return images


def _entries(folder: pathlib.Path) -> list[tuple[str, bool]]:
    """Returns the names in a folder, sorted, without hidden ones, and which of them are folders."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e.name, e.is_dir()) for e in entries if e.name[0] != ".")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason(error)})", "not-readable") from None
