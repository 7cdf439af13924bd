"""The benchmark: what it measures is there, consistent, and printed."""

import json

import pytest

from bitmixer_jax import cli
from bitmixer_jax.benchmark import KINDS, benchmark
from tests.refusals import refused


@pytest.mark.slow
def test_all_figures_are_there_and_agree(capsys, tmp_path):
    out = tmp_path / "speed.json"
    words = ["--model", "resnet8", "--batch_size", "8", "--steps", "2", "--json", str(out)]
    assert cli.main(["benchmark", *words]) == 0
    result = json.loads(out.read_text())
    assert set(result["steps"]) == set(KINDS)
    assert set(result["evaluation"]) == {"float", "policies"}
    rows = [*result["steps"].values(), *result["evaluation"].values(), result["data"]]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(8e3 / row["milliseconds"])
        assert row["compile_seconds"] > 0
    base = result["steps"]["float"]
    for row in result["steps"].values():
        assert row["ratio_to_float"] == row["milliseconds"] / base["milliseconds"]
        # Images and activations of a batch, at the least: 8 x 32 x 32 x 16 floats a layer.
        assert row["memory_bytes"] > 6 * 8 * 32 * 32 * 16 * 4 / 4
        assert row["memory_to_float"] <= 1.5
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("layer-wise", "policies", "augmentation", "MiB"))


def test_batches_that_do_not_fit_are_refused():
    for name in ("batch_size", "steps"):
        with refused("bad-value", f"{name} = 0"):
            benchmark("resnet8", **{name: 0})
