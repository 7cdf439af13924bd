"""bitmixer export and predict on a trained workdir."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from bitmixer_jax import cli, data
from bitmixer_jax.errors import UserError
from bitmixer_jax.export import workdir
from bitmixer_jax.export.packed import load_packed, save_packed
from bitmixer_jax.export.predict import predict_files
from bitmixer_jax.export.workdir import Settings, export_workdir
from bitmixer_jax.runtime import Runtime

QUICK = dict(images=40, random=3)


@pytest.fixture(scope="module")
def packed(trained, tmp_path_factory):
    """A packed file of the trained network, and what the command said."""
    path = tmp_path_factory.mktemp("export") / "net.packed"
    return path, export_workdir(str(trained), path, Settings(format="packed", **QUICK))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three test images as files."""
    folder = tmp_path_factory.mktemp("photos")
    digits = data.load("digits", "test[:3]")
    for i, image in enumerate(digits.images):
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(3)]


def test_the_packed_file_answers_as_the_workdir(trained, packed):
    path, _ = packed
    images = data.load("digits", "test[:50]").images
    ours, theirs = Runtime.load(path), Runtime.load(trained)
    assert ours.network == theirs.network
    for policy in (2, 3, 4, [4, 3, 2, 2, 3, 4]):
        np.testing.assert_allclose(
            ours.predict(images, policy), theirs.predict(images, policy), rtol=1e-5, atol=1e-5
        )


def test_the_report_lies_beside_and_says_how_well_it_agrees(packed):
    path, lines = packed
    report = json.loads((path.parent / "net.packed.report.json").read_text())
    assert report["passed"]
    assert report["policies"] == len(report["by_policy"]) == 6
    assert report["bytes"] == path.stat().st_size
    assert any("verified: packed, 6 policies x 40 images" in line for line in lines)


def test_sizes_are_printed(packed):
    path, lines = packed
    table = "\n".join(lines)
    for row in ("float32 weights", "8-bit", "4-bit", "3-bit", "2-bit", "cut to 3 bits (3 planes)"):
        assert row in table
    assert f"{path.stat().st_size:,}" in table


def test_a_cut_file_has_the_size_that_was_printed(packed, tmp_path):
    path, lines = packed
    (row,) = [line for line in lines if "cut to 2 bits" in line]
    size = int(row.split("|")[2].replace(",", ""))
    (tmp_path / "cut").write_bytes(path.read_bytes()[:size])
    assert load_packed(tmp_path / "cut").space.choices == (2,)


def test_float16_tables_are_smaller(trained, packed, tmp_path):
    settings = Settings(format="packed", tables="float16", **QUICK)
    export_workdir(str(trained), tmp_path / "small", settings)
    assert (tmp_path / "small").stat().st_size < packed[0].stat().st_size


def test_a_mismatch_fails_and_leaves_nothing(trained, tmp_path, monkeypatch):
    def wrong(path, network, *rest):
        head = dataclasses.replace(network.head, kernel=-network.head.kernel)
        save_packed(path, dataclasses.replace(network, head=head), *rest)

    monkeypatch.setattr(workdir, "save_packed", wrong)
    with pytest.raises(UserError, match="MISMATCH"):
        export_workdir(str(trained), tmp_path / "net", Settings(format="packed", **QUICK))
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept_unless_told(trained, tmp_path):
    path = tmp_path / "net"
    path.write_text("precious")
    settings = Settings(format="packed", **QUICK)
    with pytest.raises(UserError, match="already exists"):
        export_workdir(str(trained), path, settings)
    assert path.read_text() == "precious"
    export_workdir(str(trained), path, settings, overwrite=True)
    load_packed(path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(format="tflite"), "unknown"),
        (dict(format="onyx"), "did you mean onnx"),
        (dict(format="packed", policy="3"), "--policy 3: of --format onnx alone"),
        (dict(format="onnx", carrier="int4"), "give --policy"),
        (dict(format="onnx", fast=True), "--fast.*give --policy"),
        (dict(format="packed", fast=True), "--fast.*of one policy alone"),
        (dict(format="onnx", policy="3", fast=True, carrier="int4"), "only int8 is fast"),
        (dict(format="onnx", tables="float16"), "of --format packed alone"),
        (dict(format="onnx", changes=("a=2",)), "--set changes a policy"),
        (dict(format="packed", images=0), "--images 0"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings, says):
    with pytest.raises(UserError, match=says):
        Settings(**settings)


def test_a_float_twin_is_refused(trained_float, tmp_path):
    with pytest.raises(UserError, match="float twin"):
        export_workdir(str(trained_float), tmp_path / "x", Settings(format="packed"))


def test_stage_with_unvisited_pairs_exports_what_it_can(trained, tmp_path):
    lines = export_workdir(
        f"{trained}@weights", tmp_path / "net", Settings(format="packed", **QUICK)
    )
    assert any("verified" in line for line in lines)


def test_predict_names_classes(packed, photos, trained):
    by_file = predict_files(str(packed[0]), photos, policy="3", changes=["stage3.*=2"], top=2)
    by_workdir = predict_files(str(trained), photos, policy="3", changes=["stage3.*=2"], top=2)
    for (path, ours), (_, theirs) in zip(by_file, by_workdir, strict=True):
        assert path.suffix == ".png"
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert len(ours) == 2
        assert 1 >= ours[0][1] >= ours[1][1] >= 0
    images = data.load("digits", "test[:3]").images
    best = Runtime.load(packed[0]).predict(images, [3, 3, 3, 3, 2, 2]).argmax(-1)
    assert [classes[0][0] for _, classes in by_file] == [str(i) for i in best]


@pytest.mark.parametrize(
    "settings",
    [{}, dict(policy="3"), dict(policy="3", changes=("stage1.*=2",), carrier="int2")],
    ids=["switchable", "one policy", "int2"],
)
def test_onnx_exports_are_verified_and_predict(settings, trained, photos, tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    export_workdir(str(trained), path, Settings(format="onnx", **settings, **QUICK))
    report = json.loads((tmp_path / "net.onnx.report.json").read_text())
    assert report["passed"]
    assert report["top1_agreement"] >= 0.99
    policy = "" if settings else "3"
    changes = settings.get("changes", ())
    ours = predict_files(str(path), photos, policy=policy, top=1)
    theirs = predict_files(str(trained), photos, policy="3", changes=changes, top=1)
    assert [c[0][0] for _, c in ours] == [c[0][0] for _, c in theirs]
    if settings:
        with pytest.raises(UserError, match="holds one policy"):
            predict_files(str(path), photos, policy="3")


def test_the_fast_onnx_export_keeps_most_answers(trained, tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    settings = Settings(format="onnx", policy="4", fast=True, **QUICK)
    (line, _) = export_workdir(str(trained), path, settings)
    assert "verified" in line


def test_predict_says_what_is_wrong(packed, photos, tmp_path, capsys):
    def said(*words):
        status = cli.main(["predict", *map(str, words)])
        out, err = capsys.readouterr()
        assert (status, err.count("\n")) == ((0, 0) if out else (2, 1))
        return out or err

    assert "width 7" in said("--model", packed[0], "--policy", "7", photos[0])
    assert "no such workdir or packed file" in said("--model", tmp_path / "no", photos[0])
    assert "not an image" in said("--model", packed[0], packed[0])
    assert said("--model", packed[0], "--top", "1", *photos).count("%\n") == 3
