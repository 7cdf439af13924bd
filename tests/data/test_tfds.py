"""Data sets of tensorflow-datasets: a tiny one is prepared and loaded, without TensorFlow."""

import io
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest

from bitmixer_jax.data import load
from bitmixer_jax.data.tfds import find_prepared
from bitmixer_jax.errors import Code
from tests.refusals import refused


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
    monkeypatch.setattr("bitmixer_jax.data.tfds.CHUNK", 7)
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
    with refused("unknown-name", "'validation'", "train or test"):
        load("toy_set", "validation", tmp_path)


def test_tfds_default_folder_and_newest_version(
    prepare_tfds: Prepare, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_tfds("9.0.0")
    newest = prepare_tfds("10.0.0")
    assert find_prepared("toy_set", [tmp_path]) == newest
    monkeypatch.setenv("BITMIXER_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(load("toy_set", "test")) == 6
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with refused("no-data", "toy_set", tmp_path / "elsewhere", "array_record"):
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

    def check(code: Code, mentions: tuple[str, ...], version: str, **how: Any) -> None:
        folder = prepare_tfds(version, **how)
        with refused(code, folder, *mentions):
            load(f"toy_set:{version}", "test", tmp_path)

    check(
        "wrong-format",
        ("'image'", "'label'", "['picture']"),
        "1.0.1",
        features={"picture": image},
        example=lambda image, i: {"picture": _png(image)},
    )
    check(
        "wrong-format",
        ("'image'", "uint8 [H, W, C]", "float32 [6, 5, 3]"),
        "1.0.2",
        features={"image": tensor(shape=(6, 5, 3), dtype=np.float32), "label": label},
        example=lambda image, i: {"image": image.astype(np.float32), "label": 0},
    )
    check(
        "wrong-format",
        ("'label'", "ClassLabel", "Scalar"),
        "1.0.3",
        features={"image": image, "label": tfds.features.Scalar(np.int64)},
        example=lambda image, i: {"image": _png(image), "label": 0},
    )
    check(
        "wrong-format",
        ("(3, 5, 3)", "(4, 5, 3)", "[None, 5, 3]"),
        "1.0.4",
        features={"image": tfds.features.Image(shape=(None, 5, 3)), "label": label},
        example=lambda image, i: {"image": _png(image[: 3 + i % 2]), "label": 0},
    )
    check("no-data", ("train", "test"), "1.0.5", splits=("test",))

    folder = prepare_tfds("1.0.6")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with refused("wrong-format", folder, "tfrecord", "file_format='array_record'"):
        load("toy_set:1.0.6", "test", tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"name": 3}', b"\xff\xfe"])
def test_a_damaged_description_is_one_line(
    prepare_tfds: Prepare, tmp_path: pathlib.Path, content: bytes
) -> None:
    folder = prepare_tfds()
    (folder / "dataset_info.json").write_bytes(content)
    with refused("damaged", folder):
        load("tfds:toy_set", "train", tmp_path)


def test_damaged_records_are_one_line(prepare_tfds: Prepare, tmp_path: pathlib.Path) -> None:
    folder = prepare_tfds()
    file = next(folder.glob("*train*"))
    data = bytearray(file.read_bytes())
    data[65536 + 100 : 65536 + 200] = bytes(100)
    file.write_bytes(data[:-100])
    with refused("damaged", folder, "train"):
        load("tfds:toy_set", "train", tmp_path)


def test_a_pipe_in_place_of_the_description_is_no_data_set(
    prepare_tfds: Prepare, tmp_path: pathlib.Path
) -> None:
    info = prepare_tfds() / "dataset_info.json"
    info.unlink()
    os.mkfifo(info)
    with refused("no-data", "toy_set", tmp_path):
        load("tfds:toy_set", "train", tmp_path)


def test_a_pipe_among_the_files_is_refused(prepare_tfds: Prepare, tmp_path: pathlib.Path) -> None:
    file = prepare_tfds() / "features.json"
    file.unlink()
    os.mkfifo(file)
    with refused("damaged", file.parent, "features.json"):
        load("tfds:toy_set", "train", tmp_path)
