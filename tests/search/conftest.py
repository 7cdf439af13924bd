"""A trained run to search, and what is read and loaded meanwhile."""

import dataclasses
import shutil

import pytest

from bitmixer_jax import data
from bitmixer_jax.evaluation import Evaluator
from bitmixer_jax.search import workdir as workdirs
from bitmixer_jax.training import load_trained


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """A copy of the trained run: searches write into it."""
    return str(shutil.copytree(trained, tmp_path_factory.mktemp("searched") / "run"))


@pytest.fixture(scope="module")
def model(trained):
    return load_trained(trained)[1]


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

    monkeypatch.setattr(workdirs, "load_trained", load)


@pytest.fixture
def as_if(monkeypatch):
    """``as_if(train_split=...)``: the runs that are loaded say so."""

    def change(**settings):
        def load(source):
            run, model, variables = load_trained(source)
            return dataclasses.replace(run, **settings), model, variables

        monkeypatch.setattr(workdirs, "load_trained", load)

    return change
