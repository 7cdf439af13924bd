"""Data sets: what `load` gives, which splits it takes, and what it says when it cannot."""

import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from bitmixer_jax.data import Dataset, default_data_dir, load, open_split
from bitmixer_jax.data.in_memory import channel_stats
from bitmixer_jax.errors import Code, shown
from tests.refusals import refused


def test_digits() -> None:
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_shape == (8, 8, 1)
    assert train.num_classes == 10
    assert train.classes == tuple("0123456789")
    assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int32)
    assert (train.images.min(), train.images.max()) == (0, 255)
    shares = np.bincount(train.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    np.testing.assert_allclose(shares, 0.8, atol=0.005)  # stratified
    for data in (train, test):  # the statistics of training, whichever the split
        pixels = train.images.astype(np.float64)
        np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), rtol=1e-6)


def test_digits_are_split_without_overlap_and_always_alike() -> None:
    import sklearn.datasets

    train, test = load("digits", "train"), load("digits", "test")
    both = np.concatenate([train.images, test.images]).reshape(1797, 64)
    original = np.rint(sklearn.datasets.load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, original))
    assert train.labels[:12].tolist() == [8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 6, 6]
    assert test.labels[:12].tolist() == [2, 8, 6, 0, 7, 4, 9, 1, 8, 6, 7, 0]


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "start", "stop"),
    [
        ("train", 0, 1437),
        ("train[:]", 0, 1437),
        ("train[:90%]", 0, 1293),
        ("train[90%:]", 1293, 1437),
        ("train[10%:20%]", 144, 287),
        ("train[1400:]", 1400, 1437),
        ("train[10:20]", 10, 20),
        ("train[:100%]", 0, 1437),
        ("train[:1437]", 0, 1437),
    ],
)
def test_slices(split: str, start: int, stop: int) -> None:
    whole, part = load("digits", "train"), load("digits", split)
    np.testing.assert_array_equal(part.images, whole.images[start:stop])
    np.testing.assert_array_equal(part.labels, whole.labels[start:stop])
    np.testing.assert_array_equal(part.mean, whole.mean)
    assert part.split == split


@pytest.mark.parametrize(
    "split",
    [
        *("", " train", "Train", "validation", "train+", "+test", "train++test", "train\n"),
        *("train[", "train[10]", "train[::2]", "train[--1:]", "train[a:b]", "train[:1.5]"),
        *("train[:90%]x", "train[1 :2]", "train[:1__0]", "train[:_1]", "train[:\u0661]"),
        *("train[:2shard]", "all[:10]", "train[:" + "9" * 5000 + "]", "train+" * 5000 + "test"),
    ],
)
def test_splits_that_cannot_be_read(split: str) -> None:
    with refused("unknown-name", shown(split), "train or test", "train[:90%]"):
        load("digits", split)


@pytest.mark.parametrize(
    ("split", "code", "count"),
    [
        ("train[10:10]", "no-data", 1437),
        ("train[20:10]", "no-data", 1437),
        ("train[:0%]", "no-data", 1437),
        ("train[1437:]", "no-data", 1437),
        ("train[:1438]", "bad-value", 1437),
        ("test[361:]", "bad-value", 360),
        ("test[:101%]", "bad-value", 360),
    ],
)
def test_slices_that_are_empty_or_reach_too_far(split: str, code: Code, count: int) -> None:
    with refused(code, repr(split), count):
        load("digits", split)


# --- names and places -----------------------------------------------------------------------------


def test_unknown_names(tmp_path: pathlib.Path) -> None:
    known = "digits, cifar10, fashion_mnist, mnist"
    with refused("unknown-name", "'CIFAR-10'", "did you mean cifar10", known):
        load("CIFAR-10", "train", tmp_path)
    with refused("unknown-name", "'xyz'", known):
        load("xyz", "train", tmp_path)
    with refused("unknown-name", "'../cifar10'", known):
        load("../cifar10", "train", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist", "mnist"])
def test_missing_data(name: str, tmp_path: pathlib.Path) -> None:
    command = f"`bitmixer prepare {name} --source PATH --data_dir {tmp_path}`"
    with refused("no-data", tmp_path / name / "info.json", command):
        load(name, "train", tmp_path)


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("BITMIXER_DATA", str(tmp_path))
    assert default_data_dir() == tmp_path
    with refused("no-data", tmp_path / "mnist" / "info.json"):
        load("mnist", "train")
    monkeypatch.delenv("BITMIXER_DATA")
    assert default_data_dir() == pathlib.Path.home() / ".cache" / "bitmixer"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(self: pathlib.Path) -> pathlib.Path:
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.delenv("BITMIXER_DATA", raising=False)
    monkeypatch.setattr(pathlib.Path, "expanduser", homeless)
    assert len(open_split("digits", "test")) == 360
    with refused("bad-path", "BITMIXER_DATA"):
        load("mnist", "test")


def test_importing_is_light() -> None:
    heavy = "tensorflow_datasets", "sklearn", "PIL", "array_record"
    script = f"import sys, bitmixer_jax.data; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# --- the class ------------------------------------------------------------------------------------


def _dataset(**changes: Any) -> Dataset:
    fields: dict[str, Any] = {
        "name": "toy",
        "split": "train",
        "images": np.zeros((4, 3, 2, 1), np.uint8),
        "labels": np.array([0, 1, 1, 0], np.int32),
        "classes": ("a", "b"),
        "mean": np.zeros(1, np.float32),
        "std": np.ones(1, np.float32),
    }
    return Dataset(**{**fields, **changes})


def test_dataset() -> None:
    data = _dataset()
    assert (len(data), data.num_classes, data.image_shape) == (4, 2, (3, 2, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((4, 3, 2), np.uint8)}, r"uint8 \[N, H, W, C\], got uint8 \[4, 3, 2\]"),
        ({"images": np.zeros((4, 3, 2, 1))}, "got float64"),
        ({"labels": np.zeros(3, np.int32)}, r"labels must be int32 \[4\], got int32 \[3\]"),
        ({"labels": np.zeros(4, np.int64)}, "got int64"),
        ({"labels": np.array([0, 1, 2, 0], np.int32)}, r"labels must lie in 0\.\.1, got 0\.\.2"),
        ({"mean": np.zeros(3, np.float32)}, r"mean must be float32 \[1\], got float32 \[3\]"),
        ({"std": np.ones(1)}, "std must be float32"),
    ],
)
def test_dataset_refuses_contradictions(changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _dataset(**changes)


def test_channel_stats() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5000, 3, 2, 2), dtype=np.uint8)
    images[..., 1] = 7
    mean, std = channel_stats(images)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, images.astype(np.float64).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, [images[..., 0].astype(np.float64).std(), 1.0], rtol=1e-6)
