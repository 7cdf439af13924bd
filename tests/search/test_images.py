"""Which images score the policies of a search: never test data, trained on only where told."""

import dataclasses

import pytest

from bitmixer_jax.policy import load_policy
from bitmixer_jax.search import (
    SearchSession,
    SearchSettings,
    session,
)
from bitmixer_jax.trained import load
from tests.refusals import refused
from tests.search.runs import SMALL, search


@pytest.fixture
def as_if_trained_on(monkeypatch):
    """``as_if_trained_on(split)``: the runs that are loaded say so."""

    def change(split):
        def changed(source):
            loaded = load(source)
            run = dataclasses.replace(loaded.run, train_split=split)
            return dataclasses.replace(loaded, run=run)

        monkeypatch.setattr(session, "load", changed)

    return change


def test_images_that_were_trained_on_are_said_to_be(workdir, tmp_path, as_if_trained_on, reads):
    as_if_trained_on("train")
    settings = dict(method="random", images=16, evaluations=2)
    lines = search(workdir, ["avg_bits=3"], tmp_path / "policy.json", **settings)
    assert reads["splits"][0] == "train"
    assert "on 16 images of train; the network was trained on them: train with" in lines[-2]
    assert "config.train_split=train[:90%]" in lines[-2]


def test_a_split_that_was_asked_for_is_used(workdir, as_if_trained_on):
    as_if_trained_on("train[:90%]")
    opened = SearchSession(session.load(workdir), SearchSettings(split="train[1400:]"))
    assert opened.split == "train[1400:]"
    assert len(opened.data) == 37
    assert not opened.seen_in_training


@pytest.mark.slow
def test_block_selection_searches_whole_blocks(workdir, model, tmp_path, monkeypatch):
    def blocks(source):
        loaded = load(source)
        return dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, selection="block"))

    monkeypatch.setattr(session, "load", blocks)
    out = tmp_path / "policy.json"
    search(workdir, ["avg_bits=3"], out, **SMALL)
    policy = load_policy(out, model.names, model.space)
    assert policy[::2].tolist() == policy[1::2].tolist()


@pytest.mark.parametrize("split", ["train[:1437]", "train[:100%]", "train[0:]"])
def test_a_split_that_left_nothing_out_is_searched_itself(as_if, split):
    found = as_if(train_split=split)()
    assert found.split == split
    assert found.seen_in_training


@pytest.mark.parametrize(
    ("train", "test"), [("train[:80%]", "train[80%:]"), ("train[:50%]", "train[80%:]")]
)
def test_test_data_that_are_a_slice_of_the_training_split_are_left_alone(as_if, train, test):
    open_session = as_if(train_split=train, test_split=test)
    found = open_session()
    assert found.split == train
    assert found.seen_in_training
    with refused("test-data", "train[79%:81%]"):
        open_session(split="train[79%:81%]")
    assert len(open_session(split="train[70%:80%]").data) == 16
