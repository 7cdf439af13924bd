"""Data sets of tensorflow-datasets, already prepared as array_record: read without TensorFlow."""

import functools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bitmixer_jax.data._dataset import Dataset, histogram_stats, histograms
from bitmixer_jax.data._encoded import open_records
from bitmixer_jax.data._names import reason_of
from bitmixer_jax.data._splits import parse_split
from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.data.streams import Streamed
from bitmixer_jax.errors import UserError

_NAME = re.compile(r"(?P<path>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<version>\d+\.\d+\.\d+))?")
_CHUNK = 1024


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
    """Loads from array_record files; `name` is for messages and for the result."""
    folder = _prepared(name, tfds_name, folders)
    builder = _builder(folder)
    features, splits = builder.info.features, builder.info.splits
    parts = parse_split(split, {key: splits[key].num_examples for key in splits})
    if "train" not in splits:
        raise UserError(
            f"{folder} has no split named train, whose mean and standard deviation normalise the "
            f"images; it has {', '.join(splits)}"
        )
    mean, std = _train_stats(folder)
    chunks = [chunk for part in parts for chunk in _chunks(folder, *part)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*chunks, strict=True))
    return Dataset(name, split, images, labels, tuple(features["label"].names), mean, std)


def stream_prepared(
    name: str,
    tfds_name: str,
    split: str,
    folders: Sequence[pathlib.Path],
    settings: StreamSettings,
    workers: int,
) -> Streamed | None:
    """The same, streamed; None where all images have one size, so that `load_prepared` serves."""
    folder = _prepared(name, tfds_name, folders)
    builder = _builder(folder)
    if None not in builder.info.features["image"].shape[:2]:
        return None
    source, classes = open_records(folder, builder, split, settings.skip_unreadable)
    return Streamed(name, split, classes, source, settings, workers)


def _prepared(name: str, tfds_name: str, folders: Sequence[pathlib.Path]) -> pathlib.Path:
    folder = find_prepared(tfds_name, folders)
    if folder is None:
        raise UserError(
            f"data set {name} is not prepared: looked for NAME[/CONFIG]/VERSION/dataset_info.json "
            f"of {tfds_name!r} under {' and '.join(map(str, folders))}; prepare it with "
            "tensorflow-datasets and file_format='array_record', or give the right data_dir"
        )
    return folder


def _builder(folder: pathlib.Path) -> Any:
    """Opens a prepared data set, and checks that its examples can be read and are ours to use."""
    try:
        import array_record.python  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"reading {folder} needs tensorflow-datasets and array_record ({error}): "
            "pip install tensorflow-datasets array_record"
        ) from error
    try:
        for path in folder.iterdir():  # a pipe among them would be waited for
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path.name} is not a regular file")
        builder = tfds.builder_from_directory(folder)
        form = builder.info.file_format.value
        sizes = {key: split.num_examples for key, split in builder.info.splits.items()}
        if not sizes or min(sizes.values()) < 0:
            raise ValueError(f"splits of {sizes} examples")
    except Exception as error:  # a damaged description raises nearly anything
        raise UserError(
            f"{folder} is damaged: its description cannot be read ({reason_of(error)}); prepare it "
            "again"
        ) from None
    if form != "array_record":
        raise UserError(
            f"{folder} is stored as {form}, which cannot be read without TensorFlow: prepare it "
            "again with file_format='array_record'"
        )
    features = builder.info.features
    is_dict = isinstance(features, tfds.features.FeaturesDict)
    found = sorted(features.keys()) if is_dict else [type(features).__name__]
    if not {"image", "label"} <= set(found):
        raise UserError(f"{folder} needs the features 'image' and 'label', it has {found}")
    image, label = features["image"], features["label"]
    if image.np_dtype != np.uint8 or len(image.shape) != 3:
        given = f"{np.dtype(image.np_dtype)} {list(image.shape)}"
        raise UserError(f"{folder}: the feature 'image' must be uint8 [H, W, C], it is {given}")
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        given = type(label).__name__
        raise UserError(f"{folder}: the feature 'label' must be a ClassLabel, it is a {given}")
    return builder


def _chunks(
    folder: pathlib.Path, part: str, start: int, stop: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields examples `start .. stop - 1`: images `[n, H, W, C]` uint8 and labels `[n]` int32."""
    source = _builder(folder).as_data_source(split=part)
    shape: tuple[int, ...] | None = None
    for first in range(start, stop, _CHUNK):
        try:
            examples = source.__getitems__(list(range(first, min(first + _CHUNK, stop))))
        except Exception as error:  # a damaged record, too
            last = min(first + _CHUNK, stop) - 1
            raise UserError(
                f"{folder} {part}: examples {first} to {last} cannot be read ({reason_of(error)}); "
                "prepare it again"
            ) from None
        shapes = {example["image"].shape for example in examples}
        shape = shape or next(iter(shapes))
        if shapes != {shape}:
            raise UserError(
                f"{folder} has images of several sizes ({', '.join(map(str, shapes | {shape}))}): "
                "only sets whose feature 'image' has no fixed size are streamed; this one declares "
                f"{list(_builder(folder).info.features['image'].shape)}"
            )
        yield (
            np.stack([example["image"] for example in examples]),
            np.array([example["label"] for example in examples], np.int32),
        )


@functools.lru_cache(maxsize=8)
def _train_stats(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns `channel_stats` of the training split, in memory only a chunk at a time."""
    count = _builder(folder).info.splits["train"].num_examples
    counts = sum(histograms(images) for images, _ in _chunks(folder, "train", 0, count))
    return histogram_stats(np.asarray(counts))
