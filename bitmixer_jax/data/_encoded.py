"""Where encoded images come from: a folder of classes, or records of tensorflow-datasets.

A source is small and pickles well, as every decoding process gets a copy.
"""

import bisect
import dataclasses
import logging
import os
import pathlib
from typing import Any, Protocol

import numpy as np

from bitmixer_jax.data._names import listed
from bitmixer_jax.data._splits import parse_split, split_names
from bitmixer_jax.data.decode import MOST_BYTES, SUFFIXES
from bitmixer_jax.errors import UserError
from bitmixer_jax.files import read_bytes

_log = logging.getLogger(__name__)

_VALIDATION = ("val", "validation")  # folders of the split "validation"


class Source(Protocol):
    """Encoded images of one split, by position."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> tuple[bytes, int]:
        """The file of an image and its label; raises whatever goes wrong."""

    def name(self, index: int) -> str:
        """What to call an image in messages."""


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Files ``root/SPLIT/CLASS/FILE``, in an order that is fixed and mixes the classes.

    Attributes:
      root: folder of all splits.
      names: the names ``SPLIT/CLASS/FILE`` of all files, one after the other.
      ends: ``[N + 1]`` int64, where each of them ends: a million strings would take ten times the
        memory, in each process.
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
        """Path of a file."""
        return os.path.join(self.root, os.fsdecode(self._name(index)))

    def read(self, index: int) -> tuple[bytes, int]:
        """See Source."""
        return read_bytes(self.name(index), MOST_BYTES), int(self.labels[index])

    def _name(self, index: int) -> bytes:
        return self.names[self.ends[index] : self.ends[index + 1]]


def open_folder(
    folder: pathlib.Path, split: str, skip_unreadable: bool
) -> tuple[FolderSource, tuple[str, ...]]:
    """Lists a split of a folder of classes, or a slice of it, and the names of the classes.

    Args:
      folder: holds ``train``, and ``val`` (or ``validation``) and the like, each with one folder
        for each class.
      split: as `load` takes it.
      skip_unreadable: go on without the images of empty classes, with a warning.

    Raises:
      UserError: nothing there, unknown split, classes without images, or other classes than train.
    """
    try:
        found = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name[0] != "."]
    except OSError as error:
        if folder.is_dir():
            raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
        found = []
    several = [path.name for path in found if path.name in _VALIDATION]
    if len(several) > 1:
        raise UserError(f"{folder}: {' and '.join(several)} are the same split; keep one of them")
    places = {"validation" if p.name in _VALIDATION else p.name: p for p in found}
    if "train" not in places:
        raise UserError(
            f"{folder}: no folder of classes: give one with train/CLASS/*.JPEG and val/CLASS/*.JPEG"
        )
    try:
        chosen = split_names(split, places)
    except UserError as error:
        raise UserError(f"{folder}: {error} (the folder val is the split validation)") from None
    classes = _classes(places["train"])
    of_splits = {
        name: _list_split(places[name], classes, places["train"], skip_unreadable)
        for name in chosen
    }
    counts = {name: len(names) for name, (names, _) in of_splits.items()}
    # Mixed, so that a slice such as train[:90%] has images of every class; `RandomState` because
    # numpy promises that its streams never change.
    orders = {name: np.random.RandomState(0).permutation(count) for name, count in counts.items()}
    names, labels = [], []
    for part, start, stop in parse_split(split, {**dict.fromkeys(places, 0), **counts}):
        all_names, all_labels = of_splits[part]
        names += [all_names[i] for i in orders[part][start:stop]]
        labels.append(all_labels[orders[part][start:stop]])
    ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
    source = FolderSource(str(folder), b"".join(names), ends, np.concatenate(labels))
    return source, tuple(classes)


def _list_split(
    place: pathlib.Path, classes: list[str], train: pathlib.Path, skip_unreadable: bool
) -> tuple[list[bytes], np.ndarray]:
    """The names ``SPLIT/CLASS/FILE`` of a split, by class, and their labels int32 ``[N]``."""
    of_split = _classes(place)
    unknown = sorted({*of_split} - {*classes})
    if unknown:
        raise UserError(
            f"{place}: {len(unknown)} classes that {train} does not have: {listed(unknown)}"
        )
    files = [_files(place / name) if name in of_split else [] for name in classes]
    empty = [name for name, found in zip(classes, files, strict=True) if not found]
    if len(empty) == len(classes):
        raise UserError(f"{place}: no images in any class; files end with {_suffixes()}")
    if empty:
        text = f"{place}: {len(empty)} of {len(classes)} classes without images: "
        if not skip_unreadable:
            raise UserError(
                f"{text}{listed(empty)}; complete them, or set config.stream.skip_unreadable=True"
            )
        _log.warning("%s%s", text, listed(empty))
    names = [
        os.fsencode(f"{place.name}/{name}/{file}")
        for name, of_class in zip(classes, files, strict=True)
        for file in of_class
    ]
    counts = [len(of_class) for of_class in files]
    return names, np.repeat(np.arange(len(classes), dtype=np.int32), counts)


def _classes(folder: pathlib.Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = [(e.name, e.is_dir()) for e in entries if e.name[0] != "."]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    classes = sorted(name for name, is_dir in found if is_dir)
    if not classes:
        loose = sum(name.lower().endswith(SUFFIXES) for name, _ in found)
        raise UserError(
            f"{folder}: no folders of classes, and {loose} images outside of any: move each image "
            "into the folder of its class"
        )
    return classes


def _files(folder: pathlib.Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = sorted((e.name, e.is_dir()) for e in entries if e.name[0] != ".")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    images = [name for name, is_dir in found if not is_dir and name.lower().endswith(SUFFIXES)]
    within = [name for name, is_dir in found if is_dir]
    if images and within:
        _log.warning("%s: images in folders within it are not read: %s", folder, listed(within))
    return images


def _suffixes() -> str:
    return ", ".join(SUFFIXES)


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource:
    """Examples of a set that tensorflow-datasets prepared as ArrayRecord.

    Attributes:
      where: what to call the set in messages.
      records: gives ``{"image": bytes, "label": int, ...}`` by position, without TensorFlow.
      starts: first position of each file of records.
      lost: by such a file that cannot be read, why not; by its place in ``starts``.
      classes: how many labels there are.
    """

    where: str
    records: Any
    starts: tuple[int, ...]
    lost: dict[int, str]
    classes: int

    def __len__(self) -> int:
        """Number of examples, in all files."""
        return len(self.records)

    def name(self, index: int) -> str:
        """Place of an example, and the name of its file where that is known."""
        try:
            file = self.records[index].get("file_name", b"").decode(errors="replace")
        except Exception:
            file = ""
        return f"{self.where} example {index}" + (f" ({file})" if file else "")

    def read(self, index: int) -> tuple[bytes, int]:
        """See Source."""
        shard = bisect.bisect_right(self.starts, index) - 1
        if shard in self.lost:
            raise OSError(self.lost[shard])
        record = self.records[index]
        label = int(record["label"])
        if not 0 <= label < self.classes:
            raise ValueError(f"label {label}, where 0..{self.classes - 1} is allowed")
        return bytes(record["image"]), label


def open_records(
    folder: pathlib.Path, builder: Any, split: str, skip_unreadable: bool
) -> tuple[RecordSource, tuple[str, ...]]:
    """Opens a split of a prepared set, or a slice of it; also gives the names of the classes.

    Every file of records is opened once and its examples are counted, so that an unreadable one is
    known before the work begins.

    Raises:
      UserError: unknown split, or files that cannot be read.
    """
    import tensorflow_datasets as tfds

    splits = builder.info.splits
    parts = parse_split(split, {key: splits[key].num_examples for key in splits})
    taken = "+".join(f"{name}[{start}:{stop}]" for name, start, stop in parts)
    records = builder.as_data_source(split=taken, decoders={"image": tfds.decode.SkipDecoding()})
    shards = splits[taken].file_instructions
    starts = tuple(int(n) for n in np.cumsum([0, *(s.take for s in shards)])[:-1])
    faults = [_fault(shard.filename, shard.examples_in_shard) for shard in shards]
    lost = {i: fault for i, fault in enumerate(faults) if fault}
    if lost:
        images = sum(shards[i].take for i in lost)
        text = (
            f"{folder} {split}: {len(lost)} of {len(shards)} files of records cannot be read, with "
            f"{images} of {len(records)} images: {listed(list(lost.values()))}"
        )
        if not skip_unreadable or len(lost) == len(shards):
            raise UserError(f"{text}; get them again, or set config.stream.skip_unreadable=True")
        _log.warning("%s", text)
    names = tuple(builder.info.features["label"].names)
    where = f"{builder.info.name} {split}"
    return RecordSource(where, records, starts, lost, len(names)), names


def _fault(path: str, expected: int) -> str:
    """Why a file of records cannot be used; empty where it can."""
    from array_record.python.array_record_module import ArrayRecordReader

    name = pathlib.Path(path).name
    if os.path.exists(path) and not os.path.isfile(path):
        return f"{name} (not a regular file)"
    try:
        reader = ArrayRecordReader(os.fspath(path))
        found = reader.num_records()
        reader.close()
    except Exception as error:
        # The library repeats the path and the place behind semicolons: the first says what it is.
        return f"{name} ({str(error).splitlines()[0].partition(';')[0]})"
    return "" if found == expected else f"{name} ({found} examples, {expected} expected)"
