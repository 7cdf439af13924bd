"""StableHLO: the loader that the documentation shows, the batch, the policy."""

import re
import textwrap

import jax
import numpy as np
import pytest

from bitmixer_jax.data import normalize
from bitmixer_jax.errors import UserError
from bitmixer_jax.export import stablehlo
from bitmixer_jax.export.integer import run_integer
from bitmixer_jax.export.stablehlo import StablehloRunner, export_stablehlo
from tests.export.networks import deployed, network, policies

pytest.importorskip("flatbuffers")


def pixels(kind, number):
    shape = network(kind)[0].image_shape
    return np.random.default_rng(0).integers(256, size=(number, *shape)).astype(np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("hlo") / "net.stablehlo"
    export_stablehlo(deployed("resnet8"), path)
    return path


def test_any_batch_and_any_policy(path):
    runner, found = StablehloRunner(path), deployed("resnet8")
    run = jax.jit(lambda x, p: run_integer(found, normalize(x, found.mean, found.std), p))
    for number in (1, 5):
        images = pixels("resnet8", number)
        for policy in policies("resnet8"):
            np.testing.assert_allclose(
                runner(images, policy), run(images, policy), rtol=1e-5, atol=1e-5
            )


def test_an_unknown_width_gives_nan(path):
    assert np.isnan(StablehloRunner(path)(pixels("resnet8", 2), np.full(6, 5))).all()


def test_it_is_for_three_platforms(path):
    assert StablehloRunner(path)._exported.platforms == ("cpu", "cuda", "tpu")


def test_the_loader_in_the_documentation_runs(path, monkeypatch):
    example = re.search(r"\n\n(    import json.*?)\n\n[^ ]", stablehlo.__doc__, re.S)[1]
    monkeypatch.chdir(path.parent)
    names: dict = {}
    exec(textwrap.dedent(example), names)
    assert names["logits"].shape == (8, 3)
    assert np.isfinite(names["logits"]).all()
    assert names["about"]["choices"] == [2, 3, 4]


def test_bad_files_are_one_line(path, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        StablehloRunner(tmp_path / "absent")
    for content in (b"", b"PK", path.read_bytes()[:500]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(UserError, match="not a StableHLO export"):
            StablehloRunner(tmp_path / "bad")
    with pytest.raises(UserError, match="is there already"):
        export_stablehlo(deployed("double"), path)
