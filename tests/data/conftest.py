"""Tiny sets that stand in for the known ones, and the files in which they would be published."""

import dataclasses
import gzip
import hashlib
import json
import pathlib
import shutil
import struct
from collections.abc import Callable, Mapping

import numpy as np
import PIL.Image
import pytest

from bitmixer_jax.data import load, local
from bitmixer_jax.preparation import catalog, prepare

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR = dataclasses.replace(
    local.SPECS["cifar10"], image_shape=(4, 5, 3), counts={"train": 10, "test": 3}
)
MNIST = dataclasses.replace(
    local.SPECS["mnist"], image_shape=(4, 5, 1), counts={"train": 12, "test": 4}
)

Arrays = dict[str, np.ndarray]


def _pretend(monkeypatch: pytest.MonkeyPatch, spec: local.Spec, *names: str) -> Arrays:
    """Makes tiny random arrays what the data sets of these names are."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 256 if name.endswith("images") else 10, shape, dtype=np.uint8)
        for name, shape in spec.array_shapes().items()
    }
    sha256 = {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in arrays.items()}
    for name in names:
        published = dataclasses.replace(catalog.PUBLISHED[name], sha256=sha256)
        monkeypatch.setitem(local.SPECS, name, spec)
        monkeypatch.setitem(catalog.PUBLISHED, name, published)
    return arrays


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """Tiny arrays which for this test are what CIFAR-10 is."""
    return _pretend(monkeypatch, CIFAR, "cifar10")


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """The same for MNIST and Fashion-MNIST."""
    return _pretend(monkeypatch, MNIST, "mnist", "fashion_mnist")


def _cifar_batches(arrays: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of three planes, and labels, by batch."""
    planes = {s: arrays[f"{s}_images"].transpose(0, 3, 1, 2).reshape(-1, 60) for s in CIFAR.counts}
    batches = {
        batch: (planes["train"][2 * i : 2 * i + 2], arrays["train_labels"][2 * i : 2 * i + 2])
        for i, batch in enumerate(BATCHES)
    }
    return {**batches, "test_batch": (planes["test"], arrays["test_labels"])}


def _python2_pickle(planes: np.ndarray, labels: np.ndarray) -> bytes:
    """The pickle that Python 2 and an early numpy wrote, opcode by opcode (protocol 2)."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = (
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = integer(planes.shape[0]) + integer(planes.shape[1]) + b"\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01" + shape + dtype + b"\x89" + string(planes.tobytes()) + b"tb"
    )
    listed = b"](" + b"".join(b"K" + bytes([int(label)]) for label in labels) + b"e"
    label_name = string(b"batch_label") + string(b"training batch 1 of 5")
    items = label_name + string(b"labels") + listed + string(b"data") + array
    return b"\x80\x02}(" + items + b"u."


def _write(folder: pathlib.Path, files: Mapping[str, bytes]) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def _python_form(folder: pathlib.Path, arrays: Arrays) -> pathlib.Path:
    batches = _cifar_batches(arrays).items()
    return _write(folder, {batch: _python2_pickle(*content) for batch, content in batches})


def _binary_form(folder: pathlib.Path, arrays: Arrays) -> pathlib.Path:
    return _write(
        folder,
        {
            f"{batch}.bin": np.concatenate([labels[:, None], planes], axis=1).tobytes()
            for batch, (planes, labels) in _cifar_batches(arrays).items()
        },
    )


def _sheets_form(folder: pathlib.Path, arrays: Arrays) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    sheets = dict(zip(BATCHES, np.split(arrays["train_images"], 5), strict=True))
    for batch, images in {**sheets, "test_batch": arrays["test_images"]}.items():
        PIL.Image.fromarray(images.reshape(len(images), 20, 3)).save(folder / f"{batch}.png")
    for split in CIFAR.counts:
        labels = json.dumps(arrays[f"{split}_labels"].tolist())
        (folder / f"{split}_lables.json").write_text(labels)
    return folder


def _idx_form(
    folder: pathlib.Path, arrays: Arrays, *, zipped: bool = False, dotted: bool = False
) -> pathlib.Path:
    files = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        header = struct.pack(">4I", 0x0803, *images.shape[:3])
        files[f"{prefix}-images-idx3-ubyte"] = header + images.tobytes()
        files[f"{prefix}-labels-idx1-ubyte"] = (
            struct.pack(">2I", 0x0801, len(labels)) + labels.tobytes()
        )
    if dotted:
        files = {name.replace("-idx", ".idx"): data for name, data in files.items()}
    if zipped:
        files = {f"{name}.gz": gzip.compress(data) for name, data in files.items()}
    return _write(folder, files)


_FORMS = {
    "python": _python_form,
    "binary": _binary_form,
    "sheets": _sheets_form,
    "idx": _idx_form,
}


@pytest.fixture
def publish() -> Callable[..., pathlib.Path]:
    """`publish(form, folder, arrays)`: writes the files of a form, returns the folder."""
    return lambda form, folder, arrays, **how: _FORMS[form](folder, arrays, **how)


@pytest.fixture
def write_files() -> Callable[..., pathlib.Path]:
    """`write_files(folder, {name: content})`: makes a folder with these files, returns it."""
    return _write


@pytest.fixture
def check() -> Callable[..., None]:
    """`check(name, data_dir, arrays)`: `load` must give these arrays, and their statistics."""
    return _check


def _check(name: str, data_dir: pathlib.Path, arrays: Arrays) -> None:
    for split in ("train", "test"):
        data = load(name, split, data_dir)
        np.testing.assert_array_equal(data.images, arrays[f"{split}_images"])
        np.testing.assert_array_equal(data.labels, arrays[f"{split}_labels"])
        pixels = arrays["train_images"].astype(np.float64)  # of training, for both splits
        np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), rtol=1e-6)


@pytest.fixture(scope="session")
def pristine(jpegs, tmp_path_factory) -> pathlib.Path:
    """A data folder that holds the set ``pictures`` as a folder of classes."""
    folder = tmp_path_factory.mktemp("streams")
    jpegs.make_folder(folder / "pictures", classes=3, train=15, validation=5, longest=40)
    return folder


@pytest.fixture
def pictures(pristine, tmp_path) -> pathlib.Path:
    """A copy of it, to be damaged."""
    shutil.copytree(pristine / "pictures", tmp_path / "pictures")
    return tmp_path


@pytest.fixture(scope="session")
def records(pristine, tmp_path_factory) -> pathlib.Path:
    """A data folder that holds the same set as records."""
    folder = tmp_path_factory.mktemp("records")
    prepare("imagenet", pristine / "pictures", folder)
    return folder


@pytest.fixture(params=["folder", "records"])
def form(request, pristine, records):
    """Name and data folder of the same pictures, in either form."""
    return {
        "folder": ("folder:pictures", pristine),
        "records": ("tfds:imagenet2012", records),
    }[request.param]
