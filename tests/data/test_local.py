"""Local copies that are there already, are damaged, or whose preparation was interrupted."""

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
    with pytest.raises(UserError, match=r"train_images\.npy is damaged: expected sha256 .* remove"):
        prepare("mnist", "unused", prepared)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train_images.npy", lambda data: data[:-1], "expected 368 bytes, found 367"),
        ("test_images.npy", lambda data: b"x" * len(data), "expected sha256"),
        ("test_images.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "expected sha256"),
        ("test_labels.npy", None, "the file is missing"),
        (
            "test_labels.npy",
            lambda data: data[:-4] + b"\x00\x00\x00\x0b",
            "expected sha256",
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
    with pytest.raises(UserError, match=rf"{file} is damaged: .*{message}"):
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
    with pytest.raises(UserError, match="not prepared"):
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
    with pytest.raises(UserError, match="not prepared"):
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
    with pytest.raises(UserError, match=r"mnist is there without info\.json"):
        prepare("mnist", source, tmp_path / "data")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write to the data folder .*file"):
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
    refused: list[str] = []
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256) if rng.random() < 0.5 else ord("9")
        path.write_bytes(damaged)
        try:
            found = load("mnist", "train", prepared)
        except UserError as error:
            refused.append(str(error))
        else:
            np.testing.assert_array_equal(found.images, good.images)
            np.testing.assert_array_equal(found.labels, good.labels)
            np.testing.assert_allclose([found.mean, found.std], [good.mean, good.std], rtol=2e-5)
    assert len(refused) > 100
    assert all(len(said.splitlines()) == 1 and len(said) < 2000 for said in refused)


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
    with pytest.raises(UserError, match=r"info\.json is damaged: ") as caught:
        load("mnist", "test", prepared)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("file", ["info.json", "test_images.npy"])
def test_a_pipe_in_place_of_a_file_is_refused(prepared: pathlib.Path, file: str) -> None:
    (prepared / "mnist" / file).unlink()
    os.mkfifo(prepared / "mnist" / file)
    with pytest.raises(UserError, match=r"not prepared|the file is missing"):
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
