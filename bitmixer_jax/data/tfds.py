"""Data sets that tensorflow-datasets prepared as array_record, read without TensorFlow."""

import bisect
import dataclasses
import functools
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bitmixer_jax.data.in_memory import Dataset, histogram_stats, histograms
from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.data.splits import Part, parse_split
from bitmixer_jax.data.streams import StreamingDataset
from bitmixer_jax.errors import UserError, listed, reason

_log = logging.getLogger(__name__)

_NAME = re.compile(r"(?P<path>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<version>\d+\.\d+\.\d+))?")
CHUNK = 1024  # examples that `load_prepared` decodes at once


def default_dir() -> pathlib.Path:
    """Returns where tensorflow-datasets itself keeps data sets."""
    path = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    try:
        return path.expanduser()
    except RuntimeError:  # a user without a home folder
        return path


def find_prepared(name: str, folders: Sequence[pathlib.Path]) -> pathlib.Path | None:
    """Returns the folder of the newest prepared version of `NAME[/CONFIG][:VERSION]`, if any."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    for folder in folders:
        infos = (folder / match["path"]).glob(f"{match['version'] or '*.*.*'}/dataset_info.json")
        versions = [
            info.parent
            for info in infos
            if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name) and info.is_file()
        ]
        if versions:
            return max(versions, key=lambda path: [int(part) for part in path.name.split(".")])
    return None


def load_prepared(
    name: str, tfds_name: str, split: str, folders: Sequence[pathlib.Path]
) -> Dataset:
    """Loads a split of a prepared data set, as `load` does; `name` is for messages."""
    folder = _prepared(name, tfds_name, folders)
    builder = _builder(folder)
    parts = _parts(builder, split)
    if "train" not in builder.info.splits:
        raise UserError(
            f"{folder} has no split named train, whose mean and standard deviation normalise the "
            f"images; it has {', '.join(builder.info.splits)}",
            "no-data",
        )
    mean, std = _train_stats(folder)
    chunks = [chunk for part in parts for chunk in _chunks(folder, *part)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*chunks, strict=True))
    classes = tuple(builder.info.features["label"].names)
    return Dataset(name, split, images, labels, classes, mean, std)


def stream_prepared(
    name: str,
    tfds_name: str,
    split: str,
    folders: Sequence[pathlib.Path],
    settings: StreamSettings,
    workers: int,
) -> StreamingDataset | None:
    """Opens the same as a stream. Returns None if all images have one size: load those."""
    folder = _prepared(name, tfds_name, folders)
    builder = _builder(folder)
    if None not in builder.info.features["image"].shape[:2]:
        return None
    source, classes = open_records(folder, builder, split, settings.skip_unreadable)
    return StreamingDataset(name, split, classes, source, settings, workers)


def _parts(builder: Any, split: str) -> tuple[Part, ...]:
    splits = builder.info.splits
    return parse_split(split, {key: splits[key].num_examples for key in splits})


def _prepared(name: str, tfds_name: str, folders: Sequence[pathlib.Path]) -> pathlib.Path:
    folder = find_prepared(tfds_name, folders)
    if folder is None:
        raise UserError(
            f"data set {name} is not prepared: looked for NAME[/CONFIG]/VERSION/dataset_info.json "
            f"of {tfds_name!r} under {' and '.join(map(str, folders))}; prepare it with "
            "tensorflow-datasets and file_format='array_record', or give the right data_dir",
            "no-data",
        )
    return folder


def _builder(folder: pathlib.Path) -> Any:
    """Opens a prepared data set, and checks that its examples are labelled uint8 images."""
    try:
        import array_record.python  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"reading {folder} needs tensorflow-datasets and array_record ({error}): "
            "pip install tensorflow-datasets array_record",
            "not-installed",
        ) from error
    try:
        for path in folder.iterdir():  # a pipe among them would be waited for
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path.name} is not a regular file")
        builder = tfds.builder_from_directory(folder)
        file_format = builder.info.file_format.value
        sizes = {key: split.num_examples for key, split in builder.info.splits.items()}
        if not sizes or min(sizes.values()) < 0:
            raise ValueError(f"splits of {sizes} examples")
    except Exception as error:  # a damaged description raises nearly anything
        raise UserError(
            f"{folder} is damaged: its description cannot be read ({reason(error)}); prepare it "
            "again",
            "damaged",
        ) from None
    if file_format != "array_record":
        raise UserError(
            f"{folder} is stored as {file_format}, which cannot be read without TensorFlow: "
            "prepare it again with file_format='array_record'",
            "wrong-format",
        )
    features = builder.info.features
    is_dict = isinstance(features, tfds.features.FeaturesDict)
    found = sorted(features.keys()) if is_dict else [type(features).__name__]
    if not {"image", "label"} <= set(found):
        raise UserError(
            f"{folder} needs the features 'image' and 'label', it has {found}", "wrong-format"
        )
    image, label = features["image"], features["label"]
    if image.np_dtype != np.uint8 or len(image.shape) != 3:
        given = f"{np.dtype(image.np_dtype)} {list(image.shape)}"
        raise UserError(
            f"{folder}: the feature 'image' must be uint8 [H, W, C], it is {given}", "wrong-format"
        )
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        given = type(label).__name__
        raise UserError(
            f"{folder}: the feature 'label' must be a ClassLabel, it is a {given}", "wrong-format"
        )
    return builder


def _chunks(
    folder: pathlib.Path, part: str, start: int, stop: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields examples `start .. stop - 1`: images `[n, H, W, C]` uint8 and labels `[n]` int32."""
    source = _builder(folder).as_data_source(split=part)
    shape: tuple[int, ...] | None = None
    for first in range(start, stop, CHUNK):
        try:
            examples = source.__getitems__(list(range(first, min(first + CHUNK, stop))))
        except Exception as error:  # a damaged record, too
            last = min(first + CHUNK, stop) - 1
            raise UserError(
                f"{folder} {part}: examples {first} to {last} cannot be read ({reason(error)}); "
                "prepare it again",
                "damaged",
            ) from None
        shapes = {example["image"].shape for example in examples}
        shape = shape or next(iter(shapes))
        if shapes != {shape}:
            raise UserError(
                f"{folder} has images of several sizes ({', '.join(map(str, shapes | {shape}))}): "
                "only sets whose feature 'image' has no fixed size are streamed; this one declares "
                f"{list(_builder(folder).info.features['image'].shape)}",
                "wrong-format",
            )
        yield (
            np.stack([example["image"] for example in examples]),
            np.array([example["label"] for example in examples], np.int32),
        )


@functools.lru_cache(maxsize=8)
def _train_stats(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns `channel_stats` of the training split; one chunk at a time is in memory."""
    count = _builder(folder).info.splits["train"].num_examples
    counts = sum(histograms(images) for images, _ in _chunks(folder, "train", 0, count))
    return histogram_stats(np.asarray(counts))


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource:
    """Encoded images of a prepared data set.

    Attributes:
      where: what to call the data set in messages.
      records: gives ``{"image": bytes, "label": int, ...}`` by index, without TensorFlow.
      starts: index of the first example of each shard, which is a file of records.
      unreadable: why a shard cannot be read, by the number of the shard.
      classes: number of classes.
    """

    where: str
    records: Any
    starts: tuple[int, ...]
    unreadable: dict[int, str]
    classes: int

    def __len__(self) -> int:
        """Number of examples, in all shards."""
        return len(self.records)

    def name(self, index: int) -> str:
        """Returns the index of an example, with the name of its image file if that is known."""
        try:
            file = self.records[index].get("file_name", b"").decode(errors="replace")
        except Exception:
            file = ""
        return f"{self.where} example {index}" + (f" ({file})" if file else "")

    def read(self, index: int) -> tuple[bytes, int]:
        """See Source."""
        shard = bisect.bisect_right(self.starts, index) - 1
        if shard in self.unreadable:
            raise OSError(self.unreadable[shard])
        record = self.records[index]
        label = int(record["label"])
        if not 0 <= label < self.classes:
            raise ValueError(f"label {label}, where 0..{self.classes - 1} is allowed")
        return bytes(record["image"]), label


def open_records(
    folder: pathlib.Path, builder: Any, split: str, skip_unreadable: bool
) -> tuple[RecordSource, tuple[str, ...]]:
    """Opens the records of a split, or of a slice of it; also returns the classes.

    This opens every shard once and counts its examples, so that an unreadable one is known before
    the work begins. It is an error, or with `skip_unreadable` a warning.
    """
    import tensorflow_datasets as tfds

    parts = _parts(builder, split)
    absolute = "+".join(f"{name}[{start}:{stop}]" for name, start, stop in parts)
    records = builder.as_data_source(split=absolute, decoders={"image": tfds.decode.SkipDecoding()})
    shards = builder.info.splits[absolute].file_instructions
    starts = tuple(int(n) for n in np.cumsum([0, *(s.take for s in shards)])[:-1])
    faults = [_fault(shard.filename, shard.examples_in_shard) for shard in shards]
    unreadable = {i: fault for i, fault in enumerate(faults) if fault}
    if unreadable:
        images = sum(shards[i].take for i in unreadable)
        text = (
            f"{folder} {split}: {len(unreadable)} of {len(shards)} files of records cannot be "
            f"read, with {images} of {len(records)} images: {listed(list(unreadable.values()))}"
        )
        if not skip_unreadable or len(unreadable) == len(shards):
            raise UserError(
                f"{text}; get them again, or set config.stream.skip_unreadable=True", "no-data"
            )
        _log.warning("%s", text)
    names = tuple(builder.info.features["label"].names)
    where = f"{builder.info.name} {split}"
    return RecordSource(where, records, starts, unreadable, len(names)), names


def _fault(path: str, expected: int) -> str:
    """Returns why a file of records cannot be used, or "" if it can."""
    from array_record.python.array_record_module import ArrayRecordReader

    name = pathlib.Path(path).name
    if os.path.exists(path) and not os.path.isfile(path):
        return f"{name} (not a regular file)"
    try:
        reader = ArrayRecordReader(os.fspath(path))
        found = reader.num_records()
        reader.close()
    except Exception as error:
        # The library says what is wrong before the first semicolon, and where after it.
        return f"{name} ({reason(error).partition(';')[0]})"
    return "" if found == expected else f"{name} ({found} examples, {expected} expected)"
