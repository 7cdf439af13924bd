"""A Runtime is pickled and copied by its source; policies are whole numbers of any kind."""

import copy
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from bitmixer_jax import data
from bitmixer_jax.loaded_model import from_variables
from bitmixer_jax.runtime import Runtime
from bitmixer_jax.trained import load
from tests.refusals import refused

POLICY = [4, 3, 2, 2, 3, 4]


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """A copy of the run, which a test may change."""
    folder = tmp_path_factory.mktemp("copies") / "run"
    shutil.copytree(trained, folder)
    return folder


@pytest.fixture(scope="module")
def runtime(workdir):
    return Runtime.load(workdir, batch_size=4, specialized=2)


@pytest.fixture(scope="module")
def images():
    return data.load("digits", "test[:3]").images


@pytest.mark.parametrize(
    "again",
    [lambda r: pickle.loads(pickle.dumps(r)), copy.copy, copy.deepcopy],
    ids=["pickle", "copy", "deepcopy"],
)
def test_another_one_answers_the_same_and_goes_its_own_way(again, runtime, images):
    runtime.set_policy(POLICY)
    other = again(runtime)
    assert (other.weights_digest, other.batch_size) == (runtime.weights_digest, 4)
    assert other.policy.tolist() == POLICY
    assert np.array_equal(other.predict(images), runtime.predict(images))
    other.set_policy(2)
    assert runtime.policy.tolist() == POLICY


@pytest.mark.slow
def test_another_process_in_another_folder_loads_it(workdir, images, tmp_path, monkeypatch):
    monkeypatch.chdir(workdir.parent)
    runtime = Runtime.load("run@mixed", batch_size=4)
    runtime.set_policy(3)
    (tmp_path / "given").write_bytes(pickle.dumps((runtime, images)))
    code = (
        "import pickle; runtime, images = pickle.load(open('given', 'rb'))\n"
        "print(runtime.policy.tolist(), runtime.predict(images).argmax(-1).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    best = runtime.predict(images).argmax(-1).tolist()
    assert done.stdout.strip() == f"{[3] * 6} {best}"


def test_a_source_that_changed_is_refused(runtime, workdir):
    held = pickle.dumps(runtime)
    saved = workdir.with_name("saved")
    workdir.rename(saved)
    try:
        with refused("no-such-file", workdir):
            pickle.loads(held)
        network = runtime.weights_digest
        runtime.weights_digest = "0" * 64
        changed = pickle.dumps(runtime)
        runtime.weights_digest = network
    finally:
        saved.rename(workdir)
    with refused("other-network", workdir, "Runtime.load"):
        pickle.loads(changed)


def test_a_network_in_memory_says_what_to_do(workdir):
    loaded = load(workdir)
    model, variables = loaded.model, loaded.variables
    runtime = Runtime(
        from_variables(model, variables, mean=[0], std=[1], classes=tuple("0123456789")),
        batch_size=1,
    )
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"Runtime.load\(path\)") as caught:
            call(runtime)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "policy",
    [3, np.int8(3), np.array(3), [np.uint64(3)] * 6, (np.array(3),) * 6, np.full(6, 3, np.uint8)],
    ids=lambda policy: f"{type(policy).__name__}",
)
def test_whole_numbers_of_any_kind_are_a_policy(policy, runtime):
    assert runtime.check(policy).tolist() == [3] * 6
    runtime.set_policy(2)
    runtime.set_policy(policy)
    assert runtime.policy.tolist() == [3] * 6


@pytest.mark.parametrize(
    "policy",
    [
        *([3.9] * 6, np.full(6, 3.0), np.array(3.0), np.full((2, 2, 6), 3.5)),
        *("333333", ["3"] * 6, np.array("3"), b"333333"),
        *(True, np.array(True), [True] * 6, np.full((3, 6), 3)),
        *([None] * 6, {"a": 3}, {2, 3}, (3 for _ in range(6)), []),
    ],
    ids=lambda policy: f"{type(policy).__name__} {policy}"[:20],
)
def test_what_is_no_whole_number_is_no_policy(policy, runtime):
    before = runtime.policy.tolist()
    for call in (runtime.check, runtime.set_policy):
        with refused("policy-form") as caught:
            call(policy)
        assert len(str(caught.value)) < 300
    assert runtime.policy.tolist() == before


@pytest.mark.parametrize(("policy", "length"), [([[3]] * 6, 1), ([3] * 10**5, 10**5)])
def test_another_number_of_widths_than_layers_is_no_policy(policy, length, runtime):
    before = runtime.policy.tolist()
    for call in (runtime.check, runtime.set_policy):
        with refused("policy-length", length, 6) as caught:
            call(policy)
        assert len(str(caught.value)) < 300
    assert runtime.policy.tolist() == before


class OnAnotherDevice:
    """As a CUDA tensor of PyTorch answers numpy."""

    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_arrays_that_numpy_cannot_read_are_one_line(runtime, images):
    with refused("bad-shape", "cuda:0"):
        runtime.predict(OnAnotherDevice(), POLICY)
    with refused("policy-form"):
        runtime.predict(images, OnAnotherDevice())
