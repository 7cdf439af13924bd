"""The one door to a trained network: each command opens a workdir once."""

import dataclasses
import shutil

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax import cli
from bitmixer_jax import trained as door
from bitmixer_jax.training.checkpoints import Checkpoints, digest
from tests.refusals import refused


@pytest.fixture
def opened(monkeypatch):
    """How often a configuration is read, a checkpoint restored, and weights hashed by the door."""
    counts = {"config.json": 0, "restore": 0, "digest": 0}
    read, restore, hash_ = door.read_config, Checkpoints.restore, door.digest

    def counted(what, call):
        def run(*arguments, **settings):
            counts[what] += 1
            return call(*arguments, **settings)

        return run

    monkeypatch.setattr(door, "read_config", counted("config.json", read))
    monkeypatch.setattr(Checkpoints, "restore", counted("restore", restore))
    monkeypatch.setattr(door, "digest", counted("digest", hash_))
    return counts


@pytest.mark.parametrize(
    ("words", "digests"),
    [
        (["evaluate", "--random", 2], 0),
        (["cost", "--policy", 3], 0),
        (["search", "--budget", "avg_bits=3", "--images", 16, "--out", "policy.json"], 1),
        (["front", "--method", "random", "--images", 16, "--evaluations", 2, "--out", "front"], 1),
        (["export", "--format", "packed", "--images", 16, "--out", "net"], 1),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_a_command_opens_a_workdir_once(trained, opened, tmp_path, monkeypatch, words, digests):
    workdir = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    command, *others = map(str, words)
    assert cli.main([command, "--workdir", str(workdir), *others]) == 0
    assert opened == {"config.json": 1, "restore": 1, "digest": digests}


def test_a_runtime_opens_a_workdir_once(trained, opened):
    bm.Runtime.load(trained, batch_size=1)
    assert opened == {"config.json": 1, "restore": 1, "digest": 1}


def test_all_that_is_loaded_belongs_together(trained):
    found = bm.load(str(trained))
    assert bm.load(found) is found
    assert found.folder == trained
    assert found.dataset_info == found.config["dataset_info"]
    assert found.model.num_layers == len(found.groups) == 6
    assert found.weights_digest == digest(found.variables)
    test = found.load_split(found.run.test_split)
    np.testing.assert_array_equal(test.mean, np.float32(found.dataset_info["mean"]))
    stage = bm.load(f"{trained}@activations")
    assert (stage.model.quant.weights, found.model.quant.weights) == (False, True)
    assert stage.weights_digest != found.weights_digest


def test_a_baseline_has_no_widths(trained_float):
    found = bm.load(trained_float)
    assert found.is_baseline
    with refused("no-widths", trained_float):
        found.require_widths("search")


def test_what_is_not_trained_is_refused(trained, tmp_path):
    with refused("no-run", tmp_path):
        bm.load(tmp_path)
    with refused("no-run", "mixd", "mixed"):
        bm.load(f"{trained}@mixd")
    shutil.copy(trained / "config.json", tmp_path)
    with refused("no-run", tmp_path):
        bm.load(tmp_path)


def test_verbs_take_a_trained_network_in_place_of_a_path(trained, opened):
    found = bm.load(trained)
    result = bm.evaluate(found, policy=3)
    assert result["policy"]["top1"] == result["uniform"]["3"]
    changed = dataclasses.replace(found, run=dataclasses.replace(found.run, selection="block"))
    assert changed.groups == (0, 0, 1, 1, 2, 2)
    assert opened["restore"] == 1
