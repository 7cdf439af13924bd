"""Which images score the policies of a search: never test data, trained on only where told."""

import pytest

import bitmixer_jax as bm
from bitmixer_jax.errors import UserError
from bitmixer_jax.search.workdir import Settings, Trained, left_out, search_workdir

SMALL = dict(images=64, evaluations=24)


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
def test_what_training_left_out(split, rest):
    assert left_out(split) == rest


def test_images_that_were_trained_on_are_said_to_be(workdir, tmp_path, as_if, reads):
    as_if(train_split="train")
    settings = Settings(method="random", images=16, evaluations=2)
    lines = search_workdir(workdir, ["avg_bits=3"], tmp_path / "policy.json", settings)
    assert reads["splits"][0] == "train"
    assert "on 16 images of train; the network was trained on them: train with" in lines[-2]
    assert "config.train_split=train[:90%]" in lines[-2]


def test_a_split_that_was_asked_for_is_used(workdir, as_if):
    as_if(train_split="train[:90%]")
    trained = Trained(workdir, Settings(split="train[1400:]"))
    assert trained.split == "train[1400:]"
    assert len(trained.data) == 37
    assert not trained.seen_in_training


@pytest.mark.parametrize("split", ["train[:1437]", "train[:100%]", "train[0:]"])
def test_a_split_that_left_nothing_out_is_searched_itself(trained, as_if, split):
    as_if(train_split=split)
    found = Trained(str(trained), Settings(**SMALL))
    assert found.split == split
    assert found.seen_in_training


@pytest.mark.parametrize(
    ("train", "test"), [("train[:80%]", "train[80%:]"), ("train[:50%]", "train[80%:]")]
)
def test_test_data_that_are_a_slice_of_the_training_split_are_left_alone(
    trained, as_if, train, test
):
    as_if(train_split=train, test_split=test)
    found = Trained(str(trained), Settings(**SMALL))
    assert found.split == train
    assert found.seen_in_training
    with pytest.raises(bm.UserError, match="that is test data"):
        Trained(str(trained), Settings(**SMALL, split="train[79%:81%]"))
    assert len(Trained(str(trained), Settings(**SMALL, split="train[70%:80%]")).data) == 16


@pytest.mark.parametrize("split", ["test", "test[:50]", "test[100:]"])
def test_test_data_are_refused_for_the_search(workdir, tmp_path, reads, split):
    with pytest.raises(UserError, match="that is test data; search on training data"):
        search_workdir(
            workdir, ["avg_bits=3"], tmp_path / "policy.json", Settings(split=split, **SMALL)
        )
    assert reads["splits"] == []


@pytest.mark.parametrize("split", ["tset", "train[", "train[5:5]", "train[2000:]"])
def test_a_split_that_there_is_not_is_one_line(workdir, tmp_path, split):
    with pytest.raises(UserError, match="split") as caught:
        search_workdir(
            workdir, ["avg_bits=3"], tmp_path / "policy.json", Settings(split=split, **SMALL)
        )
    assert len(str(caught.value).splitlines()) == 1
