"""Splits as tensorflow-datasets writes them: the same examples as there, sums, what is left."""

import random

import numpy as np
import pytest

from bitmixer_jax.data import load
from bitmixer_jax.data.splits import complement, left_out, overlap, parse_split, split_names
from bitmixer_jax.errors import UserError
from bitmixer_jax.preparation import prepare
from tests.data.streams import opened
from tests.refusals import refused

COUNTS = {"train": 1437, "test": 360}


def theirs(split, counts):
    """The examples that tensorflow-datasets takes, as (split, number); None where it refuses."""
    tfds = pytest.importorskip("tensorflow_datasets")
    template = tfds.core.ShardedFileTemplate(
        dataset_name="toy", data_dir="/nowhere", filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=name, shard_lengths=[count], num_bytes=1, filename_template=template
        )
        for name, count in counts.items()
    ]
    try:
        absolute = tfds.core.splits._make_absolute_instructions(infos, split)
    except Exception:
        return None
    found = []
    for each in absolute:
        count = counts[each.splitname]
        stop = count if each.to is None else each.to
        found += [(each.splitname, i) for i in range(each.from_ or 0, stop)]
    return found


def ours(split, counts):
    try:
        parts = parse_split(split, counts)
    except UserError:
        return None
    return [(part.name, i) for part in parts for i in range(part.start, part.stop)]


@pytest.mark.parametrize(
    "split",
    [
        *("train", "train[:90%]", "train[-10:]", "train[:-10]", "train[-20:-10]", "train[-5%:]"),
        *("train[:20%]+train[50%:]", "train+test", "train + test[:5]", "train[:1_0]", "all"),
        *("train[5%:]", "train[:33%]", "train[33%:66%]", "train[-33%:-1%]", "test[:12.5%]"),
        *("train[:5]+train[:5]", "test[-100%:]", "train[-1437:]", "train[:1437]", "test[:0]+train"),
    ],
)
def test_the_same_examples_as_tensorflow_datasets(split):
    assert ours(split, COUNTS) == theirs(split, COUNTS)


def test_random_slices_are_those_of_tensorflow_datasets():
    draw = random.Random(0)
    compared = 0
    for _ in range(600):
        unit = draw.choice(["", "%"])
        most = 110 if unit else 60
        ends = [draw.choice(["", f"{draw.randint(-most, most)}{unit}"]) for _ in range(2)]
        if not any(ends):
            continue
        split = f"train[{':'.join(ends)}]"
        counts = {"train": draw.randint(1, 57)}
        found, wanted = ours(split, counts), theirs(split, counts)
        assert found == (wanted or None), (split, counts)
        compared += bool(wanted)
    assert compared > 150


def test_sums_are_read_one_part_after_the_other():
    train, test = load("digits", "train"), load("digits", "test")
    both = load("digits", "test[:3]+train[-2:]")
    np.testing.assert_array_equal(both.images, [*test.images[:3], *train.images[-2:]])
    np.testing.assert_array_equal(both.labels, [*test.labels[:3], *train.labels[-2:]])
    np.testing.assert_array_equal(both.mean, train.mean)


def test_sums_of_streamed_sets(form):
    parts = ("train[:4]", "validation[-3:]", "train[40:]")
    wanted = [
        opened(form, part).source.read(i) for part in parts for i in range(len(opened(form, part)))
    ]
    whole = opened(form, "+".join(parts))
    assert [whole.source.read(i) for i in range(len(whole))] == wanted
    assert len(whole) == 4 + 3 + 5


def test_sums_of_prepared_sets_in_memory(mnist, publish, tmp_path):
    prepare("mnist", publish("idx", tmp_path / "source", mnist), tmp_path / "data")
    data = load("mnist", "train[-2:]+test[:25%]", tmp_path / "data")
    wanted = [*mnist["train_images"][-2:], *mnist["test_images"][:1]]
    np.testing.assert_array_equal(data.images, wanted)


@pytest.mark.parametrize(
    ("split", "code", "mentions"),
    [
        ("train[-1438:]", "bad-value", (1437,)),
        ("train[:-101%]", "bad-value", (1437,)),
        ("train[:101%]+test", "bad-value", (1437,)),
        ("train[-5:-10]+test", "no-data", (1437, 1432, 1427)),
        ("train[5:5]+test[:0]", "no-data", (1437, 360)),
    ],
)
def test_what_is_refused(split, code, mentions):
    with refused(code, repr(split), *mentions):
        parse_split(split, COUNTS)


def test_names_overlap_and_complement():
    assert split_names("train[:5]+test+train") == ("train", "test")

    def meet(one, other):
        return overlap(parse_split(one, COUNTS), parse_split(other, COUNTS))

    assert meet("train[:10]+train[20:30]", "test+train[29:]")
    assert not meet("train[:10]+train[20:30]", "test+train[10:20]")
    assert meet("all", "test[-1:]")
    assert complement("train[:10]+train[20:30]", COUNTS) == "train[10:20]+train[30:]"
    assert complement("train[5:]+train[:7]+test[:-1]", COUNTS) == "test[359:]"
    assert complement("train+test", COUNTS) == ""


@pytest.mark.parametrize(
    ("split", "rest"),
    [
        ("train[:256]", "train[256:]"),
        ("train[:90%]", "train[90%:]"),
        ("train[1000:]", "train[:1000]"),
        ("train[10%:]", "train[:10%]"),
        ("train", None),
        ("train[:]", None),
        ("train[10:20]", "train[:10]+train[20:]"),
        ("train[10%:90%]", "train[:10%]+train[90%:]"),
        ("train[-10:]", "train[:-10]"),
        ("train[:-10%]", "train[-10%:]"),
    ],
)
def test_what_a_slice_leaves_out_without_counts(split, rest):
    assert left_out(split) == rest


@pytest.mark.parametrize("split", ["train[:256]", "train[10%:90%]", "train[-10:]", "train[:-10%]"])
def test_left_out_and_complement_agree(split):
    rest = parse_split(left_out(split), COUNTS)
    assert rest == parse_split(complement(split, COUNTS), COUNTS)
