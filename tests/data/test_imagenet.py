"""ImageNet from its archives, or from a folder, as records."""

import io
import pathlib
import tarfile

import numpy as np
import pytest

from bitmixer_jax.data import StreamingDataset, StreamSettings, open_split
from bitmixer_jax.preparation import imagenet, prepare
from tests.refusals import refused

CLASSES = ("n0000", "n0001", "n0002")
# In the order of the names of the validation images, as it is published.
VALIDATION = ("n0002", "n0000", "n0001", "n0000")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def archives(jpegs, tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with two archives like those of ImageNet, of 2 images a class."""
    monkeypatch.setattr(imagenet, "published_labels", lambda: (CLASSES, VALIDATION))
    folder = tmp_path / "archives"
    folder.mkdir()

    def image(seed: int, label: int) -> bytes:
        return jpegs.jpeg(jpegs.picture(np.random.default_rng(seed), 32, 24, label, 3))

    with tarfile.open(folder / imagenet.TRAIN_TAR, "w") as outer:
        for label, name in enumerate(CLASSES):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for i in range(2):
                    _add(inner, f"{name}_{i}.JPEG", image(i, label))
            _add(outer, f"{name}.tar", stream.getvalue())
    with tarfile.open(folder / imagenet.VALIDATION_TAR, "w") as archive:
        for i in (3, 1, 0, 2):  # an archive need not be in the order of the names
            label = CLASSES.index(VALIDATION[i])
            _add(archive, f"ILSVRC2012_val_{i + 1:08d}.JPEG", image(10 + i, label))
    return folder


def opened(folder: pathlib.Path, split: str) -> StreamingDataset:
    settings = StreamSettings(size=16, resize=20)
    data = open_split("imagenet", split, folder, stream=settings, workers=0)
    assert isinstance(data, StreamingDataset)
    return data


def test_archives_become_records_with_the_right_labels(archives, tmp_path):
    folder = prepare("imagenet", archives, tmp_path / "data")
    assert folder == tmp_path / "data" / "imagenet2012" / "5.1.0"
    train, test = (opened(tmp_path / "data", split) for split in ("train", "validation"))
    assert train.classes == test.classes == CLASSES
    assert sorted(train.source.read(i)[1] for i in range(6)) == [0, 0, 1, 1, 2, 2]
    for i in range(4):
        name = test.source.name(i)
        number = int(name.partition("val_")[2][:8])
        assert test.source.read(i)[1] == CLASSES.index(VALIDATION[number - 1])
    some = train.subset(np.arange(6))
    assert some.images.std() > 10


def test_archives_that_are_incomplete_are_refused(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "published_labels", lambda: ((*CLASSES, "n0003"), VALIDATION))
    with refused("damaged", archives / imagenet.TRAIN_TAR, 1, 4, "n0003.tar"):
        prepare("imagenet", archives, tmp_path / "data")
    monkeypatch.setattr(imagenet, "published_labels", lambda: (CLASSES, VALIDATION[:3]))
    with refused("damaged", archives / imagenet.VALIDATION_TAR, 3, 4):
        prepare("imagenet", archives, tmp_path / "data")
    (archives / imagenet.VALIDATION_TAR).unlink()
    with refused("no-data", archives, "ILSVRC2012_img_val.tar"):
        prepare("imagenet", archives, tmp_path / "data")
    assert not (tmp_path / "data" / "imagenet2012").exists()


def test_a_truncated_archive_leaves_nothing_that_looks_whole(archives, tmp_path):
    path = archives / imagenet.TRAIN_TAR
    path.write_bytes(path.read_bytes()[:9000])
    with refused("damaged", archives):
        prepare("imagenet", archives, tmp_path / "data")
    with refused("no-data", tmp_path / "data" / "imagenet", "imagenet2012"):
        opened(tmp_path / "data", "train")


def test_a_folder_that_holds_neither_is_refused(tmp_path):
    with refused("no-data", tmp_path, "train/CLASS"):
        prepare("imagenet", tmp_path, tmp_path / "data")


def test_tensorflow_datasets_lists_the_labels_of_imagenet():
    classes, validation = imagenet.published_labels()
    assert len(classes) == 1000
    assert classes == tuple(sorted(classes))
    assert len(validation) == 50_000
    assert np.unique(validation, return_counts=True)[1].tolist() == [50] * 1000
