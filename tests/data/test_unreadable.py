"""Damaged images, empty classes, unreadable records: named, counted, and fatal or skipped."""

import dataclasses
import errno
import logging
import os
import pathlib
import sys

import numpy as np
import pytest

from bitmixer_jax.data import Order, StreamSettings
from bitmixer_jax.preparation import imagenet, prepare
from tests.data.streams import SKIP, SMALL, VALIDATION, opened, same, training
from tests.refusals import refused


def damage(folder: pathlib.Path, split: str = "train") -> list[str]:
    """Truncates, empties and replaces one file of each class; returns their names."""
    files = [sorted((folder / "pictures" / split / f"n{c:04d}").iterdir())[1] for c in range(3)]
    files[0].write_bytes(files[0].read_bytes()[:300])
    files[1].write_bytes(b"")
    files[2].write_bytes(b"no image at all")
    return [str(file) for file in files]


def test_damaged_images_are_named_and_counted(pictures):
    names = damage(pictures)
    data = opened(("folder:pictures", pictures))
    assert len(names) == 3
    with refused("bad-image", 3, 45, *names, "config.stream.skip_unreadable=True"):
        training(data, 0, 1, batch=45)


def test_a_file_that_is_gone_is_named(pictures):
    data = opened(("folder:pictures", pictures), "validation")
    gone = pathlib.Path(data.source.name(2))
    gone.unlink()
    with refused("bad-image", 1, 4, gone, os.strerror(errno.ENOENT)):
        list(data.evaluation(4))


def test_skipped_images_are_replaced_the_same_way_each_time(pictures, caplog):
    names = damage(pictures)
    data = opened(("folder:pictures", pictures), settings=SKIP)
    with caplog.at_level(logging.WARNING):
        found = training(data, batch=9)
    assert [sum(name in text for text in caplog.messages) for name in names] == [1, 1, 1]
    assert (found[1] >= 0).all()
    assert found[0].any(axis=(2, 3, 4)).all()
    assert same(found, training(data, batch=9))
    assert same([x[3:] for x in found], training(data, 3, batch=9))


def test_skipping_leaves_readable_images_as_they_were(pristine, pictures):
    before = training(opened(("folder:pictures", pristine), settings=SKIP), batch=9)
    names = damage(pictures)
    data = opened(("folder:pictures", pictures), settings=SKIP)
    after = training(data, batch=9)
    order = Order(1, len(data), 9)
    bad = [[data.source.name(int(r)) in names for r in order.rows(step)] for step in range(8)]
    changed = (before[0] != after[0]).any(axis=(2, 3, 4))
    assert np.array_equal(changed, bad)


def test_evaluation_leaves_skipped_images_out(pictures):
    damage(pictures, "val")
    loader = opened(("folder:pictures", pictures), "validation", SKIP).evaluation(4)
    labels = np.concatenate([batch.labels for batch in loader])
    assert (labels >= 0).sum() == 12
    assert len(loader.unreadable) == 3


def test_a_set_in_which_nothing_is_readable_is_refused(pictures):
    for file in (pictures / "pictures/train").rglob("*.JPEG"):
        file.write_bytes(b"")
    data = opened(("folder:pictures", pictures), settings=SKIP)
    with refused("bad-image", 100):
        training(data)


def test_empty_classes_are_named_and_counted(pictures, caplog):
    for name in ("n0001", "n0002"):
        for file in (pictures / "pictures/val" / name).iterdir():
            file.unlink()
    (pictures / "pictures/val/n0002").rmdir()
    form = ("folder:pictures", pictures)
    with refused("no-data", 2, 3, "n0001, n0002", "config.stream.skip_unreadable=True"):
        opened(form, "validation")
    data = opened(form, "validation", SKIP)
    assert "n0001, n0002" in caplog.text
    assert len(data) == VALIDATION
    assert data.num_classes == 3


def test_classes_that_train_does_not_have_are_refused(pictures):
    (pictures / "pictures/val/n9999").mkdir()
    with refused("other-data", 1, pictures / "pictures/train", "n9999"):
        opened(("folder:pictures", pictures), "validation", SKIP)


def test_a_flat_folder_says_what_to_do(pictures):
    val = pictures / "pictures/val"
    for file in list(val.rglob("*.JPEG")):
        file.rename(val / file.name)
    for folder in list(val.iterdir()):
        if folder.is_dir():
            folder.rmdir()
    with refused("no-data", val, 15):
        opened(("folder:pictures", pictures), "validation")


def test_no_folder_of_classes_and_unknown_splits_are_refused(pristine):
    with refused("no-data", pristine / "elsewhere", "train/CLASS"):
        opened(("folder:elsewhere", pristine))
    with refused("unknown-name", "'tset'", "train or validation"):
        opened(("folder:pictures", pristine), "tset")
    with refused("bad-value", "'train[:50]'", 45):
        opened(("folder:pictures", pristine), "train[:50]")


def shards(pictures, tmp_path, number):
    """Records of the pictures, with the training examples in ``number`` files."""
    classes, splits = imagenet.images_of_folders(pictures)
    imagenet.write_splits(classes, {"train": splits["train"]}, tmp_path, num_shards=number)
    return sorted((tmp_path / "imagenet2012/5.1.0").glob("*train*"))


@pytest.mark.parametrize("fault", ["missing", "truncated", "garbage"])
def test_unreadable_files_of_records_are_named_and_counted(pristine, tmp_path, fault, caplog):
    files = shards(pristine / "pictures", tmp_path, 3)
    form = ("tfds:imagenet2012", tmp_path)
    whole = training(opened(form, settings=SKIP), batch=9)
    if fault == "missing":
        files[1].unlink()
    else:
        data = files[1].read_bytes()
        files[1].write_bytes(data[:5000] if fault == "truncated" else b"x" * len(data))
    with refused("no-data", 1, 3, 15, 45, files[1].name):
        opened(form)
    data = opened(form, settings=SKIP)
    assert files[1].name in caplog.text
    found = training(data, batch=9)
    assert same(found, training(data, batch=9))
    kept = np.concatenate([(r < 15) | (r >= 30) for r in map(Order(1, 45, 9).rows, range(8))])
    equal = (whole[0] == found[0]).all(axis=(2, 3, 4)).ravel()
    assert equal[kept].all()
    assert set(found[1].ravel().tolist()) == {0, 1, 2}


def test_a_label_that_no_class_has_is_unreadable(records):
    data = opened(("tfds:imagenet2012", records))
    narrow = dataclasses.replace(data.source, classes=2)
    with refused("bad-image", 2, "0..1"):
        training(dataclasses.replace(data, source=narrow))


def test_preparing_again_leaves_what_is_there(records, pristine):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in records.rglob("*"))
    folder = prepare("imagenet", pristine / "pictures", records)
    assert folder == records / "imagenet2012/5.1.0"
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in records.rglob("*"))


def test_settings_that_make_no_sense_are_refused():
    for how, hint in (
        (dict(size=0), "size"),
        (dict(size=300), "resize"),
        (dict(min_area=0.0), "min_area"),
    ):
        with refused("bad-value", f"config.stream.{hint} = {how.get(hint, 256)}"):
            StreamSettings(**how)


def test_a_decoder_that_is_not_installed_says_how_to_get_it(pristine, monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    settings = dataclasses.replace(SMALL, decoder="turbo")
    with refused("not-installed", "'turbo'", "pip install simplejpeg opencv"):
        opened(("folder:pictures", pristine), settings=settings)
    with refused("bad-value", "'fast'", "pil, turbo"):
        opened(("folder:pictures", pristine), settings=dataclasses.replace(SMALL, decoder="fast"))
