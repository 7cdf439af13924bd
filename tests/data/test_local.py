"""Local copies that are there already, are damaged, or whose preparation was interrupted."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable

import numpy as np
import pytest

from bitmixer_jax.data import load, local
from bitmixer_jax.errors import UserError
from bitmixer_jax.preparation import prepare
from tests.refusals import check_line, refused

Arrays = dict[str, np.ndarray]
Publish = Callable[..., pathlib.Path]
Check = Callable[..., None]


@pytest.fixture
def prepared(mnist: Arrays, tmp_path: pathlib.Path, publish: Publish) -> pathlib.Path:
    """A data folder with a good copy of the tiny MNIST."""
    prepare("mnist", publish("idx", tmp_path / "source", mnist), tmp_path / "data")
    return tmp_path / "data"


def test_a_good_copy_is_verified_and_kept(
    prepared: pathlib.Path, mnist: Arrays, check: Check
) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in (prepared / "mnist").iterdir()}
    assert prepare("mnist", "no/such/source", prepared) == prepared / "mnist"
    assert before == {p.name: p.stat().st_mtime_ns for p in (prepared / "mnist").iterdir()}
    assert [p.name for p in prepared.iterdir()] == ["mnist"]  # nothing left beside it
    check("mnist", prepared, mnist)


def test_a_flipped_bit_in_a_copy(prepared: pathlib.Path) -> None:
    file = prepared / "mnist" / "train_images.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with refused("damaged", file, hashlib.sha256(data).hexdigest()):
        prepare("mnist", "unused", prepared)


@pytest.mark.parametrize(
    ("file", "damage", "mentions"),
    [
        ("train_images.npy", lambda data: data[:-1], (368, 367)),
        ("test_images.npy", lambda data: b"x" * len(data), ("sha256",)),
        ("test_images.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1]), ("sha256",)),
        ("test_labels.npy", None, ()),
        (
            "test_labels.npy",
            lambda data: data[:-4] + b"\x00\x00\x00\x0b",
            ("sha256",),
        ),
        ("info.json", lambda data: data[:50], ()),
        ("info.json", lambda _: b"[]", ()),
        (
            "info.json",
            lambda data: data.replace(b'"train": 12', b'"train": 13'),
            ("'train': 12", "'train': 13"),
        ),
        (
            "info.json",
            lambda data: data.replace(b'"version": 1', b'"version": 2'),
            ("version", 1, 2),
        ),
        ("info.json", lambda data: re.sub(rb'("std": \[)[^]]*', rb"\g<1>0.0", data), ("std",)),
    ],
)
def test_load_refuses_damaged_copies(
    prepared: pathlib.Path, file: str, damage: object, mentions: tuple[object, ...]
) -> None:
    path = prepared / "mnist" / file
    if callable(damage):
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    command = f"`bitmixer prepare mnist --source PATH --data_dir {prepared}`"
    with refused("damaged", path, *mentions, command):
        load("mnist", "test", prepared)
    with refused("damaged", path, *mentions, command):
        prepare("mnist", "unused", prepared)


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_an_interrupted_preparation_leaves_nothing(
    mnist: Arrays,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    publish: Publish,
    check: Check,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    source = publish("idx", tmp_path / "source", mnist)
    with monkeypatch.context() as patch:
        if when == "writing":
            patch.setattr(local, "channel_stats", interrupt)  # after the arrays, before info
        else:
            patch.setattr(pathlib.Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare("mnist", source, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    with refused("no-data", tmp_path / "data" / "mnist" / "info.json"):
        load("mnist", "train", tmp_path / "data")
    prepare("mnist", source, tmp_path / "data")
    check("mnist", tmp_path / "data", mnist)


def test_leftovers_of_a_killed_preparation(
    mnist: Arrays, tmp_path: pathlib.Path, publish: Publish, write_files: Publish
) -> None:
    old = write_files(tmp_path / "data" / ".mnist.partial-old", {"train_images.npy": b"half"})
    recent = write_files(tmp_path / "data" / ".mnist.partial-new", {"train_images.npy": b"half"})
    long_ago = time.time() - 7200
    os.utime(old, (long_ago, long_ago))
    with refused("no-data", tmp_path / "data" / "mnist" / "info.json"):
        load("mnist", "train", tmp_path / "data")
    prepare("mnist", publish("idx", tmp_path / "source", mnist), tmp_path / "data")
    assert not old.exists()
    assert recent.exists()  # may belong to a process at work


def test_another_process_was_faster(
    mnist: Arrays,
    prepared: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    check: Check,
) -> None:
    rename = pathlib.Path.rename

    def race(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        shutil.copytree(prepared / "mnist", target)
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", race)
    prepare("mnist", tmp_path / "source", tmp_path / "shared")
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["mnist"]
    check("mnist", tmp_path / "shared", mnist)


def test_a_folder_in_the_way(
    mnist: Arrays, tmp_path: pathlib.Path, publish: Publish, write_files: Publish
) -> None:
    write_files(tmp_path / "data" / "mnist", {"precious": b""})
    source = publish("idx", tmp_path / "source", mnist)
    with refused("exists", tmp_path / "data" / "mnist"):
        prepare("mnist", source, tmp_path / "data")
    (tmp_path / "file").write_bytes(b"")
    with refused("not-writable", tmp_path / "file"):
        prepare("mnist", source, tmp_path / "file")


@pytest.mark.parametrize("file", ["info.json", "train_images.npy", "train_labels.npy", "old"])
def test_damage_is_refused_or_changes_nothing(
    prepared: pathlib.Path, mnist: Arrays, file: str
) -> None:
    path = prepared / "mnist" / ("info.json" if file == "old" else file)
    if file == "old":  # from before it had a checksum of its own
        info = json.loads(path.read_text())
        del info["sha256"]
        path.write_text(json.dumps(info))
    good, data, rng = load("mnist", "train", prepared), path.read_bytes(), np.random.default_rng(0)
    errors: list[UserError] = []
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256) if rng.random() < 0.5 else ord("9")
        path.write_bytes(damaged)
        try:
            found = load("mnist", "train", prepared)
        except UserError as error:
            errors.append(error)
        else:
            np.testing.assert_array_equal(found.images, good.images)
            np.testing.assert_array_equal(found.labels, good.labels)
            np.testing.assert_allclose([found.mean, found.std], [good.mean, good.std], rtol=2e-5)
    assert len(errors) > 100
    for error in errors:
        assert error.code == "damaged"
        check_line(str(error), prepared / "mnist")
        assert len(str(error)) < 2000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("mean", "1e999"), ("std", "[1e999]"), ("mean", "[null]"), ("mean", '["1"]')),
        *(
            ("files", "[]"),
            ("files", '{"train_images.npy": 3}'),
            ("counts", "[[[]]]"),
            ("mean", "{}"),
        ),
        *(("name", "[" * 5000 + "]" * 5000), ("mean", f"[{'9' * 400}]"), ("std", "[-1]")),
    ],
)
def test_odd_values_in_the_description_are_refused(
    prepared: pathlib.Path, key: str, value: str
) -> None:
    path = prepared / "mnist" / "info.json"
    info = json.loads(path.read_text())
    info[key] = "HERE"
    path.write_text(json.dumps(info).replace('"HERE"', value))
    with refused("damaged", path) as caught:
        load("mnist", "test", prepared)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("file", "code"), [("info.json", "no-data"), ("test_images.npy", "damaged")]
)
def test_a_pipe_in_place_of_a_file_is_refused(prepared: pathlib.Path, file: str, code: str) -> None:
    (prepared / "mnist" / file).unlink()
    os.mkfifo(prepared / "mnist" / file)
    with refused(code, prepared / "mnist" / file):
        load("mnist", "test", prepared)


def test_a_split_does_not_read_the_other(
    prepared: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    digest = local.sha256_file
    monkeypatch.setattr(local, "sha256_file", lambda path: read.append(path.name) or digest(path))
    for _ in range(2):  # the second time nothing has changed
        load("mnist", "test", prepared)
    assert sorted(read) == ["test_images.npy", "test_labels.npy"]
