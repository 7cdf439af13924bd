"""A trained run to search, and what is read and loaded meanwhile."""

import dataclasses
import shutil

import pytest

from bitmixer_jax import data
from bitmixer_jax.evaluation import Evaluator
from bitmixer_jax.search import SearchSession, SearchSettings, session
from bitmixer_jax.trained import load


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """A copy of the trained run: searches write into it."""
    return str(shutil.copytree(trained, tmp_path_factory.mktemp("searched") / "run"))


@pytest.fixture(scope="module")
def model(trained):
    return load(trained).model


@pytest.fixture
def reads(monkeypatch):
    """What is read: the splits that are loaded, and how many policies each call of top1 has."""
    seen = {"splits": [], "top1": []}
    load, top1 = data.open_split, Evaluator.top1

    def counting_load(name, split, data_dir=None, **how):
        seen["splits"].append(split)
        return load(name, split, data_dir, **how)

    def counting_top1(self, variables, policies, *rest):
        seen["top1"].append((self.examples, len(policies)))
        return top1(self, variables, policies, *rest)

    monkeypatch.setattr(data, "open_split", counting_load)
    monkeypatch.setattr(Evaluator, "top1", counting_top1)
    return seen


@pytest.fixture
def no_network(monkeypatch):
    """Fails where a network is loaded: the mistake must be found before the work."""

    def load(source):
        raise AssertionError("the network was loaded")

    monkeypatch.setattr(session, "load", load)


@pytest.fixture
def as_if(trained):
    """``as_if(train_split=...)``: opens sessions on the run as if it had such settings."""

    def change(**settings):
        loaded = load(trained)
        changed = dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, **settings))
        return lambda **more: SearchSession(changed, SearchSettings(**{**SMALL, **more}))

    return change


SMALL = dict(images=16, evaluations=2, method="random")
