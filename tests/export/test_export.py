"""bitmixer export and predict on a trained workdir."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from bitmixer_jax import data
from bitmixer_jax.cli import main
from bitmixer_jax.export import ExportSettings, export, export_network
from bitmixer_jax.export.packed import load_packed, save_packed
from bitmixer_jax.export.verify import summary
from bitmixer_jax.predict import predict_files
from bitmixer_jax.runtime import Runtime
from tests.refusals import check_line, refused

QUICK = dict(images=40, random=3)


@pytest.fixture(scope="module")
def packed(trained, tmp_path_factory):
    """A packed file of the trained network, and the report of its export."""
    path = tmp_path_factory.mktemp("export") / "net.packed"
    return path, export_network(trained, path, format="packed", **QUICK)


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
    assert ours.weights_digest == theirs.weights_digest
    for policy in (2, 3, 4, [4, 3, 2, 2, 3, 4]):
        np.testing.assert_allclose(
            ours.predict(images, policy), theirs.predict(images, policy), rtol=1e-5, atol=1e-5
        )


def test_the_report_lies_beside_and_says_how_well_it_agrees(packed):
    path, report = packed
    assert report == json.loads((path.parent / "net.packed.report.json").read_text())
    assert report["passed"]
    assert report["policies"] == len(report["by_policy"]) == 6
    assert report["bytes"] == path.stat().st_size
    assert summary(report).startswith("verified: packed, 6 policies x 40 images")


@pytest.fixture(scope="module")
def printed(trained, tmp_path_factory):
    """What `bitmixer export` prints for a packed file, and the file."""
    path, text = tmp_path_factory.mktemp("printed") / "net.packed", io.StringIO()
    words = ["export", "--workdir", trained, "--format", "packed", "--out", path]
    with contextlib.redirect_stdout(text):
        assert main([*map(str, words), "--images", "20", "--random", "1"]) == 0
    return path, text.getvalue()


def test_sizes_are_printed(printed):
    path, table = printed
    for row in ("float32 weights", "8-bit", "4-bit", "3-bit", "2-bit", "cut to 3 bits (3 planes)"):
        assert row in table
    assert f"{path.stat().st_size:,}" in table


def test_a_cut_file_has_the_size_that_was_printed(printed, tmp_path):
    path, table = printed
    (row,) = [line for line in table.splitlines() if "cut to 2 bits" in line]
    size = int(row.split()[-1].replace(",", ""))
    (tmp_path / "cut").write_bytes(path.read_bytes()[:size])
    assert load_packed(tmp_path / "cut").space.choices == (2,)


def test_float16_tables_are_smaller(trained, packed, tmp_path):
    export_network(trained, tmp_path / "small", format="packed", norm_dtype="float16", **QUICK)
    assert (tmp_path / "small").stat().st_size < packed[0].stat().st_size


def test_a_mismatch_fails_and_leaves_nothing(trained, tmp_path, monkeypatch):
    def wrong(path, network, *rest):
        head = dataclasses.replace(network.head, kernel=-network.head.kernel)
        save_packed(path, dataclasses.replace(network, head=head), *rest)

    monkeypatch.setattr(export, "save_packed", wrong)
    with refused("mismatch", "packed"):
        export_network(trained, tmp_path / "net", format="packed", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept_unless_told(trained, tmp_path):
    path = tmp_path / "net"
    path.write_text("precious")
    settings = dict(format="packed", **QUICK)
    with refused("exists", path):
        export_network(trained, path, **settings)
    assert path.read_text() == "precious"
    export_network(trained, path, **settings, overwrite=True)
    load_packed(path)


@pytest.mark.parametrize(
    ("settings", "code", "mentions"),
    [
        (dict(format="tflite"), "unknown-name", ("'tflite'", "packed")),
        (dict(format="onyx"), "unknown-name", ("'onyx'", "did you mean onnx")),
        (dict(format="packed", policy="3"), "conflict", ("policy 3", "onnx")),
        (dict(format="onnx", storage_dtype="int4"), "missing-value", ("storage_dtype",)),
        (dict(format="onnx", fast=True), "missing-value", ("fast",)),
        (dict(format="packed", fast=True), "missing-value", ("fast",)),
        (
            dict(format="onnx", policy="3", fast=True, storage_dtype="int4"),
            "conflict",
            ("fast", "int4", "int8"),
        ),
        (dict(format="onnx", norm_dtype="float16"), "conflict", ("norm_dtype float16", "packed")),
        (dict(format="onnx", changes={"a": 2}), "missing-value", ()),
        (dict(format="packed", images=0), "bad-value", ("images 0",)),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings, code, mentions):
    with refused(code, *mentions):
        ExportSettings(**settings)


def test_a_baseline_is_refused(trained_float, tmp_path):
    with refused("no-widths", trained_float):
        export_network(trained_float, tmp_path / "x", format="packed")


def test_stage_with_unvisited_pairs_exports_what_it_can(trained, tmp_path):
    report = export_network(f"{trained}@weights", tmp_path / "net", format="packed", **QUICK)
    assert report["passed"]
    widths = {tuple(entry["widths"]) for entry in report["by_policy"]}
    assert widths >= {(2,) * 6, (3,) * 6, (4,) * 6}


def test_predict_names_classes(packed, photos, trained):
    by_file = predict_files(str(packed[0]), photos, policy="3", changes={"stage3.*": 2}, top=2)
    by_workdir = predict_files(str(trained), photos, policy="3", changes={"stage3.*": 2}, top=2)
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
    [{}, dict(policy="3"), dict(policy="3", changes={"stage1.*": 2}, storage_dtype="int2")],
    ids=["switchable", "one policy", "int2"],
)
def test_onnx_exports_are_verified_and_predict(settings, trained, photos, tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    export_network(trained, path, format="onnx", **settings, **QUICK)
    report = json.loads((tmp_path / "net.onnx.report.json").read_text())
    assert report["passed"]
    assert report["top1_agreement"] >= 0.99
    policy = None if settings else "3"
    changes = settings.get("changes")
    ours = predict_files(str(path), photos, policy=policy, top=1)
    theirs = predict_files(str(trained), photos, policy="3", changes=changes, top=1)
    assert [c[0][0] for _, c in ours] == [c[0][0] for _, c in theirs]
    if settings:
        with refused("conflict", path):
            predict_files(str(path), photos, policy="3")


def test_the_fast_onnx_export_keeps_most_answers(trained, tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    report = export_network(trained, path, format="onnx", policy="4", fast=True, **QUICK)
    assert report["passed"]
    assert report["top1_agreement"] >= 0.9


def test_predict_says_what_is_wrong(packed, photos, tmp_path, command):
    for words, mentions in (
        ((packed[0], "--policy", "7", photos[0]), (7, (2, 3, 4))),
        ((tmp_path / "no", photos[0]), (tmp_path / "no",)),
        ((packed[0], packed[0]), (packed[0],)),
    ):
        done = command("predict", "--model", *words)
        assert done.returncode == 2
        check_line(done.stderr, *mentions, start="bitmixer: ")
    done = command("predict", "--model", packed[0], "--top", "1", *photos)
    assert done.stdout.count("%\n") == 3
