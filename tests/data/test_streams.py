"""Streamed images: a pure function of (seed, epoch, image), and honest about what is unreadable."""

import dataclasses
import io
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

import bitmixer_jax
from bitmixer_jax.data import Order, Streamed, StreamSettings, open_split, prepare
from bitmixer_jax.data.crops import DECODERS, centre_box, random_box, read_crop
from bitmixer_jax.errors import UserError

SMALL = StreamSettings(size=16, resize=20)
SKIP = dataclasses.replace(SMALL, skip_unreadable=True)
CLASSES, TRAIN, VALIDATION = 3, 15, 5


@pytest.fixture(scope="module")
def pristine(jpegs, tmp_path_factory) -> pathlib.Path:
    """A data folder that holds the set ``pictures`` as a folder of classes."""
    folder = tmp_path_factory.mktemp("streams")
    jpegs.make_folder(
        folder / "pictures", classes=CLASSES, train=TRAIN, validation=VALIDATION, longest=40
    )
    return folder


@pytest.fixture
def pictures(pristine, tmp_path) -> pathlib.Path:
    """A copy of it, to be damaged."""
    shutil.copytree(pristine / "pictures", tmp_path / "pictures")
    return tmp_path


@pytest.fixture(scope="module")
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


def opened(form, split="train", settings=SMALL, workers=0) -> Streamed:
    data = open_split(form[0], split, form[1], stream=settings, workers=workers)
    assert isinstance(data, Streamed)
    return data


def training(data, start=0, stop=8, seed=1, batch=8, take=None):
    """Images and labels ``[steps, b, ...]`` of some steps of training."""
    order = Order(seed, len(data), batch)
    batches = list(data.training(order, start, stop, flip=True, take=take))
    return np.stack([b.images for b in batches]), np.stack([b.labels for b in batches])


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_stream_is_a_function_of_the_seed_and_the_epoch(form):
    data = opened(form)
    first = training(data)
    assert same(first, training(data))
    assert not same(first, training(data, seed=2))
    order = Order(1, len(data), 8)
    epochs = [np.concatenate([order.rows(s) for s in range(5 * e, 5 * e + 5)]) for e in range(2)]
    assert all(len(set(rows.tolist())) == 40 for rows in epochs)
    assert not np.array_equal(*epochs)
    images, labels = first
    wanted = [data.source.read(int(row))[1] for row in epochs[0]]
    assert labels[:5].ravel().tolist() == wanted
    assert images.dtype == np.uint8
    assert images.shape == (8, 8, 16, 16, 3)


def test_crops_of_an_image_differ_between_epochs(pristine):
    data = opened(("folder:pictures", pristine), "train[:8]")
    images, _ = training(data, 0, 2)
    orders = [Order(1, 8, 8).rows(step).tolist() for step in range(2)]
    pairs = [(images[0, orders[0].index(i)], images[1, orders[1].index(i)]) for i in range(8)]
    assert sum(not np.array_equal(a, b) for a, b in pairs) >= 7


@pytest.mark.slow
def test_the_number_of_workers_does_not_show(form):
    data = opened(form)
    reference = training(data, batch=40)  # two chunks a batch
    for workers in (1, 2):
        assert same(reference, training(dataclasses.replace(data, workers=workers), batch=40))


def test_a_stream_goes_on_from_the_middle_of_an_epoch(form):
    data = opened(form)
    whole = training(data, 0, 9)
    for start in (3, 5, 7):
        assert same([x[start:] for x in whole], training(data, start, 9))


def test_hosts_take_disjoint_parts_that_make_up_the_batch(form):
    data = opened(form)
    whole = training(data)
    parts = [training(data, take=np.arange(8)[2 * h : 2 * h + 2]) for h in range(4)]
    assert same(whole, [np.concatenate(x, axis=1) for x in zip(*parts, strict=True)])


def test_mirroring_does_not_move_the_crops(pristine):
    data = opened(("folder:pictures", pristine))
    order = Order(0, len(data), 8)
    plain, mirrored = (
        np.concatenate([b.images for b in data.training(order, 0, 5, flip=flip)])
        for flip in (False, True)
    )
    turned = [np.array_equal(a[:, ::-1], b) for a, b in zip(plain, mirrored, strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
    assert all(a or b for a, b in zip(turned, kept, strict=True))
    assert 10 <= sum(turned) <= 30


def test_evaluation_is_complete_and_padded(form):
    batches = list(opened(form, "validation").evaluation(4))
    assert [len(batch.labels) for batch in batches] == [4] * 4
    labels = np.concatenate([batch.labels for batch in batches])
    assert labels[-1] == -1
    assert not batches[-1].images[-1].any()
    assert np.bincount(labels[:15]).tolist() == [VALIDATION] * CLASSES


def test_records_and_folder_give_equal_pixels(pristine, records):
    found = []
    for form in (("folder:pictures", pristine), ("tfds:imagenet2012", records)):
        data = opened(form, "validation")
        images, labels = (np.concatenate(x) for x in zip(*data.evaluation(5), strict=True))
        found.append(sorted((int(y), x.tobytes()) for x, y in zip(images, labels, strict=True)))
        assert data.classes == ("n0000", "n0001", "n0002")
    assert found[0] == found[1]


def test_imagenet_is_whichever_form_is_there(pristine, records, tmp_path):
    assert len(opened(("imagenet", records))) == TRAIN * CLASSES
    shutil.copytree(pristine / "pictures", tmp_path / "imagenet")
    assert len(opened(("imagenet", tmp_path))) == TRAIN * CLASSES
    shutil.copytree(records / "imagenet2012", tmp_path / "imagenet2012")
    with pytest.raises(UserError, match="is there twice"):
        opened(("imagenet", tmp_path))
    with pytest.raises(UserError, match=r"neither .*imagenet .*nor imagenet2012"):
        opened(("imagenet", tmp_path / "nowhere"))


def test_slices_have_images_of_every_class_and_do_not_overlap(form):
    parts = [opened(form, split) for split in ("train[:60%]", "train[60%:]")]
    assert [len(part) for part in parts] == [27, 18]
    names = [{part.source.name(i).split("_", 1)[1] for i in range(len(part))} for part in parts]
    if form[0] == "folder:pictures":
        files = [{part.source.name(i) for i in range(len(part))} for part in parts]
        assert not files[0] & files[1]
        names = files
    assert all(names)
    for part in parts:
        assert {part.source.read(i)[1] for i in range(len(part))} == {0, 1, 2}


def test_subset_is_in_memory_and_in_order(form):
    data = opened(form)
    some = data.subset(np.asarray([5, 2, 2]))
    assert some.images.shape == (3, 16, 16, 3)
    assert np.array_equal(some.images[1], some.images[2])
    assert some.labels.tolist() == [data.source.read(i)[1] for i in (5, 2, 2)]
    assert np.array_equal(some.mean, data.mean)


# Crops.


def test_random_boxes_lie_inside_and_keep_to_area_and_aspect():
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = rng.integers(20, 400, 2)
        left, upper, w, h = random_box(rng, int(width), int(height), 0.25)
        assert left >= 0
        assert upper >= 0
        assert left + w <= width
        assert upper + h <= height
        if max(width, height) < 1.3 * min(width, height):
            assert 0.24 < w * h / (width * height) <= 1
            assert 0.7 < w / h < 1.4


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1)])
def test_odd_shapes_get_the_largest_part_of_allowed_aspect(width, height):
    left, upper, w, h = random_box(np.random.default_rng(0), width, height, 0.5)
    assert 0 <= left <= width - w
    assert 0 <= upper <= height - h
    assert 0.7 < w / h < 1.4


def test_centre_box_takes_its_share_of_the_shorter_side():
    assert centre_box(500, 256, 224, 256) == (138, 16, 224, 224)
    assert centre_box(512, 1000, 224, 256) == (32, 276, 448, 448)


def _file(image, form="jpeg", **how):
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return stream.getvalue()


def _whole(width, height):
    return 0, 0, width, height


@pytest.fixture(params=DECODERS)
def decoder(request):
    if request.param == "turbo":
        pytest.importorskip("simplejpeg")
        pytest.importorskip("cv2")
    return request.param


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "PNG", "PNG with palette"])
def test_every_kind_of_file_becomes_rgb(jpegs, mode, decoder):
    pixels = jpegs.picture(np.random.default_rng(3), 64, 48, 1, 3)
    image = PIL.Image.fromarray(pixels)
    if mode.startswith("PNG"):
        data = _file(image.convert("P") if "palette" in mode else image, "png")
    else:
        data = _file(image.convert(mode), quality=95)
    crop = read_crop(data, _whole, 32, decoder)
    assert crop.shape == (32, 32, 3)
    assert crop.dtype == np.uint8
    found, wanted = (
        np.asarray(x.convert("L"), float)
        for x in (PIL.Image.fromarray(crop), image.resize((32, 32), PIL.Image.Resampling.BILINEAR))
    )
    assert np.abs(found - wanted).mean() < 12  # the palette is coarse


def test_decoders_agree_but_for_interpolation(jpegs):
    pytest.importorskip("simplejpeg")
    pytest.importorskip("cv2")
    data = jpegs.jpeg(jpegs.picture(np.random.default_rng(0), 100, 80))
    one, other = (read_crop(data, _whole, 32, name).astype(float) for name in DECODERS)
    assert np.abs(one - other).mean() < 8


def test_truncated_files_are_refused(jpegs, decoder):
    data = jpegs.jpeg(jpegs.picture(np.random.default_rng(0), 100, 80))
    for length in (0, 10, len(data) // 2):
        with pytest.raises(Exception):  # noqa: B017 -- whatever the library raises
            read_crop(data[:length], _whole, 32, decoder)


# What is unreadable.


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
    with pytest.raises(UserError, match="3 of the 45 images of a batch cannot be read") as caught:
        training(data, 0, 1, batch=45)
    assert all(name in str(caught.value) for name in names)
    assert "skip_unreadable=True" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_is_named(pictures):
    data = opened(("folder:pictures", pictures), "validation")
    gone = pathlib.Path(data.source.name(2))
    gone.unlink()
    with pytest.raises(UserError, match=f"1 of the 4 .*{gone.name} .No such file"):
        list(data.evaluation(4))


def test_skipped_images_are_replaced_the_same_way_each_time(pictures, caplog):
    names = damage(pictures)
    data = opened(("folder:pictures", pictures), settings=SKIP)
    with caplog.at_level(logging.WARNING):
        found = training(data, batch=9)
    assert sum("unreadable image left out" in text for text in caplog.messages) == 3
    assert all(any(name in text for text in caplog.messages) for name in names)
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
    with pytest.raises(UserError, match="100 images in a row cannot be read"):
        training(data)


def test_empty_classes_are_named_and_counted(pictures, caplog):
    for name in ("n0001", "n0002"):
        for file in (pictures / "pictures/val" / name).iterdir():
            file.unlink()
    (pictures / "pictures/val/n0002").rmdir()
    form = ("folder:pictures", pictures)
    with pytest.raises(UserError, match="2 of 3 classes without images: n0001, n0002; complete"):
        opened(form, "validation")
    data = opened(form, "validation", SKIP)
    assert "2 of 3 classes without images: n0001, n0002" in caplog.text
    assert len(data) == VALIDATION
    assert data.num_classes == 3


def test_classes_that_train_does_not_have_are_refused(pictures):
    (pictures / "pictures/val/n9999").mkdir()
    with pytest.raises(UserError, match="1 classes that .*train does not have: n9999"):
        opened(("folder:pictures", pictures), "validation", SKIP)


def test_a_flat_folder_says_what_to_do(pictures):
    val = pictures / "pictures/val"
    for file in list(val.rglob("*.JPEG")):
        file.rename(val / file.name)
    for folder in list(val.iterdir()):
        if folder.is_dir():
            folder.rmdir()
    with pytest.raises(UserError, match="15 images outside of any: move each image into the"):
        opened(("folder:pictures", pictures), "validation")


def test_no_folder_of_classes_and_unknown_splits_are_refused(pristine):
    with pytest.raises(UserError, match="no folder of classes: give one with train/CLASS"):
        opened(("folder:elsewhere", pristine))
    with pytest.raises(UserError, match="unknown split 'tset': .* has train, validation"):
        opened(("folder:pictures", pristine), "tset")
    with pytest.raises(UserError, match="reaches beyond the 45 examples"):
        opened(("folder:pictures", pristine), "train[:50]")


def shards(records, tmp_path, number):
    """A copy of the records with the training examples in ``number`` files."""
    import tensorflow_datasets as tfds

    from bitmixer_jax.data import _imagenet
    from bitmixer_jax.data._encoded import open_folder

    source, classes = open_folder(records, "train", False)
    builder = _imagenet._builder({"train": source}, classes)(
        data_dir=tmp_path, file_format="array_record"
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=number)
    )
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
    with pytest.raises(UserError, match=r"1 of 3 files of records .* 15 of 45 images") as caught:
        opened(form)
    assert files[1].name in str(caught.value)
    assert "\n" not in str(caught.value)
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
    with pytest.raises(UserError, match=r"label 2, where 0\.\.1 is allowed"):
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
        with pytest.raises(UserError, match=f"config.stream.{hint}"):
            StreamSettings(**how)


def test_a_decoder_that_is_not_installed_says_how_to_get_it(pristine, monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    settings = dataclasses.replace(SMALL, decoder="turbo")
    with pytest.raises(UserError, match=r"needs simplejpeg .* pip install simplejpeg opencv"):
        opened(("folder:pictures", pristine), settings=settings)
    with pytest.raises(UserError, match="'fast'; choose from pil, turbo"):
        opened(("folder:pictures", pristine), settings=dataclasses.replace(SMALL, decoder="fast"))


# Workers.

_SCRIPT = """
import multiprocessing, sys, time
from bitmixer_jax.data import Order, StreamSettings, open_split

if __name__ == "__main__":
    settings = StreamSettings(size=16, resize=20)
    data = open_split("folder:pictures", "train", sys.argv[1], stream=settings, workers=2)
    loader = data.training(Order(0, 45, 8), 0, 10_000, flip=True)
    next(loader)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


def _alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.fixture
def streaming(pristine, tmp_path):
    """A process that streams with two workers, and the workers' ids."""
    (tmp_path / "stream.py").write_text(_SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "stream.py", pristine],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(bitmixer_jax.__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = [int(word) for word in process.stdout.readline().split()]
    yield process, workers
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="needs /proc")
def test_workers_end_with_a_killed_parent(streaming):
    process, workers = streaming
    assert len(workers) == 2
    assert all(map(_alive, workers))
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(100):
        if not any(map(_alive, workers)):
            return
        time.sleep(0.1)
    pytest.fail("workers are still there")
