"""StableHLO: the loader that the documentation shows, the batch, the policy."""

import io
import json
import os
import re
import textwrap
import zipfile

import jax
import numpy as np
import pytest

from bitmixer_jax.data import normalize
from bitmixer_jax.errors import UserError
from bitmixer_jax.export import stablehlo
from bitmixer_jax.export.integer_engine import run_integer
from bitmixer_jax.export.stablehlo import StablehloRunner, export_stablehlo
from tests.export.networks import integer_model, network, policies
from tests.refusals import refused

pytest.importorskip("flatbuffers")


def pixels(kind, number):
    shape = network(kind)[0].image_shape
    return np.random.default_rng(0).integers(256, size=(number, *shape)).astype(np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("hlo") / "net.stablehlo"
    export_stablehlo(integer_model("resnet8"), path)
    return path


def programme(path):
    """What the file holds for JAX."""
    with zipfile.ZipFile(path) as file:
        return jax.export.deserialize(bytearray(file.read("network.bin")))


def test_any_batch_and_any_policy(path):
    runner, found = StablehloRunner(path), integer_model("resnet8")
    run = jax.jit(lambda x, p: run_integer(found, normalize(x, found.mean, found.std), p))
    for number in (1, 5):
        images = pixels("resnet8", number)
        for policy in policies("resnet8"):
            np.testing.assert_allclose(
                runner(images, policy), run(images, policy), rtol=1e-5, atol=1e-5
            )


def test_an_unknown_width_gives_nan(path):
    runner = StablehloRunner(path)
    found = programme(path).call(pixels("resnet8", 2), np.full(6, 5, np.int32))
    assert np.isnan(found).all()
    with refused("policy-width", 5, (2, 3, 4)):
        runner(pixels("resnet8", 2), np.full(6, 5))


def test_it_is_for_three_platforms(path):
    assert programme(path).platforms == ("cpu", "cuda", "tpu")


def test_no_path_of_the_machine_is_in_the_file(path):
    with zipfile.ZipFile(path) as file:
        programme = file.read("network.bin")
    for folder in (os.path.dirname(jax.__file__), os.path.dirname(stablehlo.__file__)):
        assert folder.encode() not in programme


def test_the_loader_in_the_documentation_runs(path, monkeypatch):
    example = re.search(r"\n\n(    import json.*?)\n\n[^ ]", stablehlo.__doc__, re.S)[1]
    monkeypatch.chdir(path.parent)
    names: dict = {}
    exec(textwrap.dedent(example), names)
    assert names["logits"].shape == (8, 3)
    assert np.isfinite(names["logits"]).all()
    assert names["about"]["choices"] == [2, 3, 4]


def test_bad_files_are_one_line(path, tmp_path):
    with refused("no-such-file", tmp_path / "absent"):
        StablehloRunner(tmp_path / "absent")
    for content in (b"", b"PK", path.read_bytes()[:500]):
        (tmp_path / "bad").write_bytes(content)
        with refused("damaged", tmp_path / "bad"):
            StablehloRunner(tmp_path / "bad")
    with refused("exists", path):
        export_stablehlo(integer_model("double"), path)


def repacked(path, change, **how):
    """The archive with about.json changed, or another part put in."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    about = json.loads(parts["about.json"])
    parts |= change(about) or {}
    parts["about.json"] = json.dumps(about).encode()
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **how) as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return content.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda about: {"network.bin": b"0" * 10**7},
        lambda about: {"more.bin": b""},
        lambda about: {"network.bin": b"not a programme"},
        lambda about: about.update(image_shape=[100_000, 100_000, 1]),
        lambda about: about.update(image_shape=[8, 9, 1]),
        lambda about: about.update(layers=about["layers"][1:]),
        lambda about: about.update(classes=[*about["classes"], "more"]),
        lambda about: about.update(classes="abc"),
        lambda about: about.update(choices=None),
    ],
)
def test_archives_that_say_odd_things_are_one_line(change, path, tmp_path):
    for number, how in enumerate(({}, {"compression": zipfile.ZIP_DEFLATED})):
        bad = tmp_path / str(number)
        bad.write_bytes(repacked(path, change, **how))
        with refused("damaged", bad) as caught:
            StablehloRunner(bad)
        assert len(str(caught.value)) < 400


def test_damage_anywhere_is_one_line_or_changes_nothing(path, tmp_path):
    whole, rng, bad = path.read_bytes(), np.random.default_rng(0), tmp_path / "bad"
    wanted, said = programme(path).mlir_module_serialized, []
    for place in rng.integers(len(whole), size=60):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        bad.write_bytes(changed)
        try:
            StablehloRunner(bad)
        except UserError as error:
            said.append((error.code, len(str(error).splitlines())))
        else:
            assert programme(bad).mlir_module_serialized == wanted
    assert len(said) > 50
    assert set(said) == {("damaged", 1)}


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with refused("not-readable", path):
            StablehloRunner(path)
