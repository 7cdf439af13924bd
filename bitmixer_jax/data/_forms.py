"""The forms in which data sets are published: the files of each, and what reads them as arrays."""

import dataclasses
import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bitmixer_jax.data._pickles import read_batch
from bitmixer_jax.data._specs import Spec, array_shapes
from bitmixer_jax.errors import UserError
from bitmixer_jax.files import parse_json


@dataclasses.dataclass(frozen=True)
class Files:
    """The wanted files of an archive or folder: `read(name)` gives the bytes of one."""

    where: str
    read: Callable[[str], bytes]


_Reader = Callable[[Files, Spec], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Form:
    """A form in which a data set is published.

    Attributes:
      name: its name, kept in `info.json`.
      files: the names of its files; of alternatives for one file, the first is the usual one.
      folders: names of sub-folders in which an archive of this form holds them.
      read: turns the files into arrays by name, uint8.
    """

    name: str
    files: tuple[tuple[str, ...], ...]
    folders: tuple[str, ...]
    read: _Reader


def _check_size(data: bytes, size: int, where: str) -> None:
    if len(data) != size:
        raise UserError(f"{where} is truncated or wrong: expected {size} bytes, found {len(data)}")


# --- CIFAR-10: five batches for training, one for testing -----------------------------------------

_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
_TEST_BATCH = "test_batch"


def _batch_counts(spec: Spec) -> dict[str, int]:
    """Returns how many images each batch holds."""
    size = spec.counts["train"] // len(_BATCHES)
    return {**dict.fromkeys(_BATCHES, size), _TEST_BATCH: spec.counts["test"]}


def _from_batches(
    batches: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, np.ndarray]:
    images, labels = zip(*(batches[batch] for batch in _BATCHES), strict=True)
    return {
        "train_images": np.concatenate(images),
        "train_labels": np.concatenate(labels),
        "test_images": batches[_TEST_BATCH][0],
        "test_labels": batches[_TEST_BATCH][1],
    }


def _interleave(planes: np.ndarray, spec: Spec) -> np.ndarray:
    """Turns rows of channel planes `[N, C * H * W]` into images `[N, H, W, C]`."""
    height, width, channels = spec.image_shape
    images = planes.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images)


def _read_cifar_binary(files: Files, spec: Spec) -> dict[str, np.ndarray]:
    """Reads records of a label byte and three planes of bytes."""
    record = 1 + int(np.prod(spec.image_shape))
    batches = {}
    for batch, count in _batch_counts(spec).items():
        data = files.read(f"{batch}.bin")
        _check_size(data, count * record, f"{files.where}/{batch}.bin")
        records = np.frombuffer(data, np.uint8).reshape(count, record)
        batches[batch] = _interleave(records[:, 1:], spec), records[:, 0]
    return _from_batches(batches)


def _read_cifar_python(files: Files, spec: Spec) -> dict[str, np.ndarray]:
    """Reads pickled dictionaries with a list `labels` and an array `data` of planes."""
    batches = {}
    for batch, count in _batch_counts(spec).items():
        where = f"{files.where}/{batch}"
        content = read_batch(files.read(batch), where)
        try:
            planes = content[b"data"].rows(count, int(np.prod(spec.image_shape)))
            labels = content[b"labels"]
            batches[batch] = _interleave(planes, spec), _as_labels(labels, count, where)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{where} is not a batch of CIFAR-10: {str(error)[:200]}") from error
    return _from_batches(batches)


def _read_cifar_sheets(files: Files, spec: Spec) -> dict[str, np.ndarray]:
    """Reads PNG sheets, one image per row of pixels, and labels in JSON (their spelling)."""
    import PIL.Image

    height, width, _ = spec.image_shape
    labels: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        where = f"{files.where}/{split}_lables.json"
        try:
            values = parse_json(files.read(f"{split}_lables.json"))
        except ValueError as error:
            raise UserError(f"{where} is truncated or not JSON: {error}") from error
        labels[split] = _as_labels(values, spec.counts[split], where)
    batches = {}
    first = 0
    for batch, count in _batch_counts(spec).items():
        where = f"{files.where}/{batch}.png"
        try:
            content = io.BytesIO(files.read(f"{batch}.png"))
            with PIL.Image.open(content, formats=("PNG",)) as sheet:
                if (sheet.mode, sheet.size) != ("RGB", (height * width, count)):
                    raise UserError(
                        f"{where}: expected an RGB sheet of {height * width} x {count} pixels, "
                        f"found {sheet.mode} {sheet.width} x {sheet.height}"
                    )
                pixels = np.array(sheet)
        except (OSError, SyntaxError, zlib.error, PIL.Image.DecompressionBombError) as error:
            raise UserError(f"{where} is truncated or not a PNG image: {error}") from error
        images = pixels.reshape(count, *spec.image_shape)
        if batch == _TEST_BATCH:
            batches[batch] = images, labels["test"]
        else:
            batches[batch] = images, labels["train"][first : first + count]
            first += count
    return _from_batches(batches)


def _as_labels(values: Any, count: int, where: str) -> np.ndarray:
    """Turns a list of ints into `[count]` uint8."""
    good = isinstance(values, list) and all(type(v) is int and 0 <= v < 256 for v in values)
    if not good or len(values) != count:
        found = f"{len(values)} items" if isinstance(values, list) else type(values).__name__
        raise UserError(f"{where}: expected a list of {count} labels in 0..255, found {found}")
    return np.array(values, np.uint8)


# --- MNIST and Fashion-MNIST: four idx files ------------------------------------------------------

_IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def _read_idx(files: Files, spec: Spec) -> dict[str, np.ndarray]:
    """Reads idx files: two zero bytes, type 8 (byte), rank, big-endian sizes, data."""
    arrays = {}
    for array, shape in array_shapes(spec).items():
        file = _IDX_FILES[array]
        sizes = shape[:3]  # images have no axis of channels there
        header = struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes)
        data = files.read(file)
        if not data.startswith(header):
            raise UserError(
                f"{files.where}/{file} is not the idx file of {list(sizes)} bytes it should be: "
                f"expected the header {header.hex()}, found {data[: len(header)].hex()}"
            )
        _check_size(data, len(header) + int(np.prod(sizes)), f"{files.where}/{file}")
        arrays[array] = np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)
    return arrays


def _idx_names(file: str) -> tuple[str, ...]:
    """The file's usual names: gzipped or not, with a hyphen or a dot before `idx`."""
    dotted = file.replace("-idx", ".idx")
    return file, f"{file}.gz", dotted, f"{dotted}.gz"


# --- the forms ------------------------------------------------------------------------------------


def _cifar_form(name: str, files: Sequence[str], folder: str, read: _Reader) -> Form:
    return Form(name, tuple((file,) for file in files), (folder,), read)


_ALL_BATCHES = (*_BATCHES, _TEST_BATCH)
_BINARY_FILES = [f"{batch}.bin" for batch in _ALL_BATCHES]
_SHEET_FILES = [f"{batch}.png" for batch in _ALL_BATCHES]
_LABEL_FILES = ["train_lables.json", "test_lables.json"]
_IDX_FORM = Form(
    "idx",
    tuple(_idx_names(file) for file in _IDX_FILES.values()),
    ("data", "package/data"),
    _read_idx,
)

# By data set; of forms that fit a folder equally well, the earlier one is taken.
FORMS: dict[str, tuple[Form, ...]] = {
    "cifar10": (
        _cifar_form("python", _ALL_BATCHES, "cifar-10-batches-py", _read_cifar_python),
        _cifar_form("binary", _BINARY_FILES, "cifar-10-batches-bin", _read_cifar_binary),
        _cifar_form("sheets", [*_SHEET_FILES, *_LABEL_FILES], "package", _read_cifar_sheets),
    ),
    "fashion_mnist": (_IDX_FORM,),
    "mnist": (_IDX_FORM,),
}
