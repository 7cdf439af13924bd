"""Raw variables as safetensors."""

import jax
import numpy as np
import pytest

from bitmixer_jax.export.raw import export_raw, load_raw
from tests.export.networks import network
from tests.refusals import refused


@pytest.mark.parametrize("kind", ["resnet18", "int8 ends"])
def test_variables_come_back_bit_for_bit(kind, tmp_path):
    _, variables = network(kind)
    export_raw(variables, tmp_path / "net", {"note": "text"})
    found = load_raw(tmp_path / "net")
    assert jax.tree.structure(found) == jax.tree.structure(jax.tree.map(np.asarray, variables))
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_names_are_the_documented_ones(tmp_path):
    from safetensors import safe_open

    export_raw(network("resnet18")[1], tmp_path / "net", {"note": "text"})
    with safe_open(tmp_path / "net", framework="numpy") as file:
        names = set(file.keys())
        assert file.metadata() == {"note": "text"}
    for name in (
        "params/stage1.block1.conv1/input/step",
        "params/stage2.block1.conv1/shortcut/kernel",
        "params/stage2.block1.conv1/shortcut_norm/scale",
        "batch_stats/stage1.block1.conv2/conv_norm/count",
        "params/head/bias",
    ):
        assert name in names


def test_bad_files_are_one_line(tmp_path):
    from safetensors.numpy import save

    with refused("no-such-file", tmp_path / "absent"):
        load_raw(tmp_path / "absent")
    for content, code in (
        *((b"", "damaged"), (b"x" * 100, "damaged")),
        (save({"a": np.zeros(2)}), "wrong-format"),
    ):
        (tmp_path / "bad").write_bytes(content)
        with refused(code, tmp_path / "bad"):
            load_raw(tmp_path / "bad")
    export_raw(network("resnet8")[1], tmp_path / "net")
    with refused("exists", tmp_path / "net"):
        export_raw(network("resnet18")[1], tmp_path / "net")
