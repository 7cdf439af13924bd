"""ONNX files as they come from elsewhere: damaged, hostile, or from before checksums."""

import json
import logging
import os

import numpy as np
import pytest

from bitmixer_jax.errors import UserError
from bitmixer_jax.export.onnx_graph import policy_model, save_onnx, switchable_model
from bitmixer_jax.export.onnx_runner import OPTIMIZATION, OnnxRunner
from bitmixer_jax.export.onnx_seal import add_seal, seal
from tests.export.networks import integer_model
from tests.refusals import check_line, refused

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

IMAGES = np.random.default_rng(0).integers(256, size=(3, 8, 8, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A switchable file."""
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    save_onnx(path, switchable_model(integer_model("resnet8")))
    return path


def old(model):
    """Bytes as version 1 of the format wrote them: no checksum, no way of reading images."""
    for entry in list(model.metadata_props):
        if entry.key in ("sha256", "images"):
            model.metadata_props.remove(entry)
        if entry.key == "version":
            entry.value = "1"
    return model.SerializeToString()


def check_refused(path, code="damaged"):
    with refused(code, path) as caught:
        OnnxRunner(path)
    assert len(str(caught.value)) < 500


def check_not_whole(path):
    with pytest.raises(UserError) as caught:
        OnnxRunner(path)
    assert caught.value.code in ("damaged", "wrong-format")
    check_line(str(caught.value), path)
    assert len(str(caught.value)) < 500


def test_no_byte_changes_unnoticed(path, tmp_path):
    whole, rng, bad = path.read_bytes(), np.random.default_rng(0), tmp_path / "bad.onnx"
    for place in [0, 1, len(whole) - 1, *rng.integers(len(whole), size=150)]:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        bad.write_bytes(changed)
        check_not_whole(bad)
    for content in (whole[:-1], whole + b"\0", whole + whole, whole[:100], b""):
        bad.write_bytes(content)
        check_not_whole(bad)


def test_the_same_network_gives_the_same_bytes(path, tmp_path):
    save_onnx(tmp_path / "again.onnx", switchable_model(integer_model("resnet8")))
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_a_model_that_was_changed_after_its_export_is_refused(path, tmp_path):
    model = onnx.load(path)
    model.graph.node[0].name = "other"
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    check_refused(tmp_path / "net.onnx")
    save_onnx(tmp_path / "sealed.onnx", model)  # one that read it may save it anew
    OnnxRunner(tmp_path / "sealed.onnx")


@pytest.mark.parametrize("policy", [None, [4, 3, 2, 2, 3, 4]], ids=["switchable", "one policy"])
def test_files_from_before_checksums_open_with_a_word(policy, tmp_path, caplog):
    network = integer_model("resnet8")
    model = switchable_model(network) if policy is None else policy_model(network, policy)
    save_onnx(tmp_path / "new.onnx", model)
    (tmp_path / "old.onnx").write_bytes(old(onnx.load(tmp_path / "new.onnx")))
    asked = 3 if policy is None else None
    wanted = OnnxRunner(tmp_path / "new.onnx")(IMAGES, asked)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        found = OnnxRunner(tmp_path / "old.onnx")(IMAGES, asked)
    np.testing.assert_array_equal(found, wanted)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    check_line(record.getMessage(), tmp_path / "old.onnx")


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "old"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("image_shape", v) for v in ([100_000, 100_000, 1], [8, 9, 1], [8, 8], "8", None, [-1])],
        *[("choices", v) for v in ([], [2, 3.5], [4, 3, 2], [10**400], "234", {"a": 2})],
        *[("layers", v) for v in ([], ["a"], "abcdef", [1] * 6, ["a"] * 6, ["\ud800"] * 6)],
        *[("classes", v) for v in ([], ["a", "b"], [1, 2, 3], {"a": 1, "b": 2, "c": 3})],
        *[("policy", v) for v in ([3] * 6, [3] * 5, 3, [5] * 6, "null")],
        *[("mean", v) for v in ([10**400], [], ["1"], [1.0, 2.0])],
    ],
    ids=str,
)
def test_metadata_that_do_not_fit_the_graph_are_one_line(key, value, sealed, path, tmp_path):
    model = onnx.load(path)
    (entry,) = [p for p in model.metadata_props if p.key == key]
    entry.value = json.dumps(value)
    rewritten(model, sealed, tmp_path / "bad.onnx")


def rewritten(model, sealed, bad):
    """Writes a model with a right checksum, or with none, and asserts that it is refused."""
    if sealed:
        add_seal(model)
        bad.write_bytes(seal(model.SerializeToString(deterministic=True)))
    else:
        bad.write_bytes(old(model))
    check_refused(bad)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("image_shape", "[8, 8, 1"),
        ("classes", "[" * 100_000),
        ("mean", "[NaN]"),
        ("choices", "1" * 5000),
        ("version", "3"),
        ("more", "text"),
        ("form", None),
    ],
)
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "old"])
def test_metadata_that_are_no_json_or_not_ours_are_one_line(key, text, sealed, path, tmp_path):
    model = onnx.load(path)
    for entry in [p for p in model.metadata_props if p.key == key]:
        model.metadata_props.remove(entry)
    if text is not None:
        model.metadata_props.add(key=key, value=text)
    if key == "version" and not sealed:
        (tmp_path / "bad.onnx").write_bytes(model.SerializeToString())  # a checksum, but wrong
        return check_refused(tmp_path / "bad.onnx")
    return rewritten(model, sealed, tmp_path / "bad.onnx")


def test_a_file_of_version_2_cannot_pass_as_an_old_one(path, tmp_path):
    for damage in ((b"sha256", b"sha255"), (b"\x12\x40", b"\x12\x41")):
        (tmp_path / "bad.onnx").write_bytes(path.read_bytes().replace(*damage))
        check_not_whole(tmp_path / "bad.onnx")


def test_places_that_hold_no_file_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    places = [tmp_path, tmp_path / "pipe.onnx", "/dev/zero", tmp_path / ("x" * 300)]
    for place in [*places, tmp_path / "none.onnx", "/proc/self/mem"]:
        check_refused(place, "not-readable")
    for place, name in (("nul\0.onnx", ".onnx"), ("gs://bucket/net.onnx", "gs://bucket/net.onnx")):
        with refused("bad-path", name):
            OnnxRunner(place)


def test_inputs_are_checked_as_the_runtime_checks_them(path):
    runner = OnnxRunner(path)
    wanted = runner(IMAGES, [3] * 6)
    for policy in (3, np.int64(3), np.array(3), [np.uint8(3)] * 6):
        np.testing.assert_array_equal(runner(IMAGES, policy), wanted)
    for policy in ([3.9] * 6, "3", True, [True] * 6, [[3] * 6] * 2, (3 for _ in range(6))):
        with refused("policy-form"):
            runner(IMAGES, policy)
    for images in (IMAGES / 255, IMAGES.astype(int), IMAGES[:, :7], IMAGES[0], IMAGES[:0], None):
        with refused("bad-shape", "uint8 (N, 8, 8, 1)"):
            runner(images, 3)
    with refused("bad-value", "'all'", ", ".join(OPTIMIZATION)):
        OnnxRunner(path, "all")
