"""Data sets: what `load` gives, which splits it takes, and what it says when it cannot."""

import io
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest

from bitmixer_jax.data import Dataset, datasets, default_data_dir, load
from bitmixer_jax.errors import UserError


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
        *("", " train", "Train", "validation", "train+test", "train\n"),
        *("train[", "train[10]", "train[::2]", "train[-10:]", "train[a:b]", "train[:1.5%]"),
        *("train[:90%]x", "train[1 :2]"),
    ],
)
def test_splits_that_cannot_be_read(split: str) -> None:
    with pytest.raises(UserError, match=r"unknown split .*: give train or test, .*train\[:90%\]"):
        load("digits", split)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[10:10]", "'train[10:10]' is empty: train has 1437"),
        ("train[20:10]", "is empty"),
        ("train[:0%]", "is empty"),
        ("train[1437:]", "is empty"),
        ("train[:1438]", "reaches beyond the 1437 examples of train"),
        ("test[361:]", "reaches beyond the 360 examples of test"),
        ("test[:101%]", "reaches beyond"),
    ],
)
def test_slices_that_are_empty_or_reach_too_far(split: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load("digits", split)
    assert message in str(error.value)


# --- names and places -----------------------------------------------------------------------------


def test_unknown_names(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        UserError, match=r"'CIFAR-10': did you mean cifar10.* known are digits, cifar10"
    ):
        load("CIFAR-10", "train", tmp_path)
    with pytest.raises(UserError, match=r"'xyz': known are digits, cifar10, fashion_mnist, mnist"):
        load("xyz", "train", tmp_path)
    with pytest.raises(UserError, match=r"unknown data set '\.\./cifar10'"):
        load("../cifar10", "train", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist", "mnist"])
def test_missing_data(name: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError) as error:
        load(name, "train", tmp_path)
    assert str(tmp_path / name / "info.json") in str(error.value)
    command = f"`bitmixer prepare {name} --source PATH --data_dir {tmp_path}`"
    assert command in str(error.value)
    assert "\n" not in str(error.value)


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("BITMIXER_DATA", str(tmp_path))
    assert default_data_dir() == tmp_path
    with pytest.raises(UserError, match=str(tmp_path)):
        load("mnist", "train")
    monkeypatch.delenv("BITMIXER_DATA")
    assert default_data_dir() == pathlib.Path.home() / ".cache" / "bitmixer"


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
    mean, std = datasets.channel_stats(images)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, images.astype(np.float64).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, [images[..., 0].astype(np.float64).std(), 1.0], rtol=1e-6)


# --- tensorflow-datasets --------------------------------------------------------------------------


def _pixels(split: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(len(split))
    return rng.integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, "png")
    return stream.getvalue()


Prepare = Callable[..., pathlib.Path]


@pytest.fixture
def prepare_tfds(tmp_path: pathlib.Path) -> Prepare:
    """Prepares a tiny data set named `toy_set` in tmp_path, without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record.python")

    def prepare(
        version: str = "1.0.0",
        features: Any = None,
        example: Callable[[np.ndarray, int], Any] | None = None,
        splits: tuple[str, ...] = ("train", "test"),
    ) -> pathlib.Path:
        features = features or {
            "image": tfds.features.Image(shape=(6, 5, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
        make = example or (lambda image, i: {"image": _png(image), "label": i % 2})

        class ToySet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            # With a dotted module, tensorflow-datasets 4.9.10 looks for the builder's code through
            # importlib_resources, which nothing installs.
            __module__ = "toy_set"
            VERSION = tfds.core.Version(version)

            def _info(self) -> Any:
                info = tfds.features.FeaturesDict(features) if type(features) is dict else features
                return tfds.core.DatasetInfo(builder=self, features=info)

            def _split_generators(self, _: Any) -> dict[str, Any]:
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split: str) -> Iterator[tuple[int, Any]]:
                for i, image in enumerate(_pixels(split, 20 if split == "train" else 6)):
                    yield i, make(image, i)

        builder = ToySet(data_dir=tmp_path, file_format="array_record")
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=config)
        return tmp_path / "toy_set" / version

    return prepare


def _sorted(images: np.ndarray) -> list[bytes]:
    return sorted(image.tobytes() for image in images)


def test_tfds(
    prepare_tfds: Prepare, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_tfds()
    monkeypatch.setattr(datasets, "_TFDS_CHUNK", 7)
    train = load("tfds:toy_set", "train", tmp_path)
    assert train.classes == ("cat", "dog")
    assert train.image_shape == (6, 5, 3)
    expected = _pixels("train", 20)
    assert _sorted(train.images) == _sorted(expected)  # shuffled when it was prepared
    for image, label in zip(train.images, train.labels, strict=True):
        index = next(i for i, other in enumerate(expected) if np.array_equal(image, other))
        assert label == index % 2

    part = load("toy_set", "train[25%:15]", tmp_path)  # the plain name does as well
    np.testing.assert_array_equal(part.images, train.images[5:15])
    np.testing.assert_array_equal(part.labels, train.labels[5:15])
    test = load("tfds:toy_set:1.0.0", "test", tmp_path)
    assert _sorted(test.images) == _sorted(_pixels("test", 6))
    for data in (train, part, test):
        pixels = expected.astype(np.float64)
        np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), rtol=1e-6)
    with pytest.raises(UserError, match="unknown split 'validation': give train or test"):
        load("toy_set", "validation", tmp_path)


def test_tfds_default_folder_and_newest_version(
    prepare_tfds: Prepare, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_tfds("9.0.0")
    newest = prepare_tfds("10.0.0")
    assert datasets._find_tfds("toy_set", [tmp_path]) == newest
    monkeypatch.setenv("BITMIXER_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(load("toy_set", "test")) == 6
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"toy_set is not prepared: .*elsewhere and .*array_record"):
        load("tfds:toy_set", "test")


def test_tfds_tensor_images(prepare_tfds: Prepare, tmp_path: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    prepare_tfds(
        features={
            "image": tfds.features.Tensor(shape=(6, 5, 3), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=2),
        },
        example=lambda image, i: {"image": image, "label": i % 2},
    )
    assert _sorted(load("toy_set", "train", tmp_path).images) == _sorted(_pixels("train", 20))


def test_tfds_that_cannot_be_used(prepare_tfds: Prepare, tmp_path: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    image = tfds.features.Image(shape=(6, 5, 3))
    label = tfds.features.ClassLabel(num_classes=2)
    tensor = tfds.features.Tensor

    def refused(message: str, version: str, **how: Any) -> None:
        prepare_tfds(version, **how)
        with pytest.raises(UserError, match=message):
            load(f"toy_set:{version}", "test", tmp_path)

    refused(
        r"needs the features 'image' and 'label', it has \['picture'\]",
        "1.0.1",
        features={"picture": image},
        example=lambda image, i: {"picture": _png(image)},
    )
    refused(
        r"'image' must be uint8 \[H, W, C\], it is float32 \[6, 5, 3\]",
        "1.0.2",
        features={"image": tensor(shape=(6, 5, 3), dtype=np.float32), "label": label},
        example=lambda image, i: {"image": image.astype(np.float32), "label": 0},
    )
    refused(
        "'label' must be a ClassLabel, it is a Scalar",
        "1.0.3",
        features={"image": image, "label": tfds.features.Scalar(np.int64)},
        example=lambda image, i: {"image": _png(image), "label": 0},
    )
    refused(
        "has images of several sizes",
        "1.0.4",
        features={"image": tfds.features.Image(shape=(None, 5, 3)), "label": label},
        example=lambda image, i: {"image": _png(image[: 3 + i % 2]), "label": 0},
    )
    refused("has no split named train", "1.0.5", splits=("test",))

    folder = prepare_tfds("1.0.6")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"stored as tfrecord, .* file_format='array_record'"):
        load("toy_set:1.0.6", "test", tmp_path)
