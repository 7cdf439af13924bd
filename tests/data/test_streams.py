"""StreamingDataset images: a pure function of (seed, epoch, image), whoever decodes them."""

import dataclasses
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import bitmixer_jax
from bitmixer_jax.data import Order
from bitmixer_jax.data.workers import min_shared_bytes
from tests.data.streams import CLASSES, TRAIN, VALIDATION, opened, same, training
from tests.refusals import refused


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


@pytest.mark.slow
def test_hosts_take_disjoint_parts_that_make_up_the_batch(form):
    data = opened(form)
    whole = training(data)
    parts = [training(data, local=np.arange(8)[2 * h : 2 * h + 2]) for h in range(4)]
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
    with refused("conflict", "tfds:imagenet2012", "folder:imagenet"):
        opened(("imagenet", tmp_path))
    with refused("no-data", tmp_path / "nowhere" / "imagenet", "imagenet2012"):
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


@pytest.mark.slow
def test_a_worker_that_dies_is_one_clear_error(pristine):
    data = dataclasses.replace(opened(("folder:pictures", pristine)), workers=1)
    loader = data.training(Order(0, len(data), 8), 0, 10_000, flip=True)
    next(loader)
    (worker,) = (p for p in multiprocessing.active_children() if "grain" in p.name)
    worker.kill()
    with refused("processes", -9, "config.workers"):
        for _ in loader:
            pass
    loader.close()


def test_little_shared_memory_is_left_alone(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 * 2**20))
    assert min_shared_bytes(2**20) == 2**16
    assert min_shared_bytes(2**30) > 2**40


def test_one_split_under_two_names_is_refused(pictures):
    (pictures / "pictures" / "validation").mkdir()
    with refused("conflict", pictures / "pictures", "validation"):
        opened(("folder:pictures", pictures))


def test_folders_within_a_class_are_named(pictures, caplog):
    (min((pictures / "pictures" / "train").iterdir()) / "more").mkdir()
    assert len(opened(("folder:pictures", pictures)))
    (record,) = caplog.records
    assert record.getMessage().endswith(": more")
