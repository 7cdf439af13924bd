"""ONNX in onnxruntime: every form against the integer engine."""

import dataclasses
import json
import re
import sys

import jax
import numpy as np
import pytest

from bitmixer_jax.data import normalize
from bitmixer_jax.export.integer_engine import run_integer
from bitmixer_jax.export.onnx_graph import STORAGE_DTYPES, policy_model, save_onnx, switchable_model
from bitmixer_jax.export.onnx_int8 import int8_model, stream_ranges
from bitmixer_jax.export.onnx_runner import OPTIMIZATION, OnnxRunner
from tests.export.networks import EACH_KIND, WEIGHT_QUANTIZERS, integer_model, network, policies
from tests.refusals import refused

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CLOSE = dict(rtol=1e-5, atol=1e-4)


def pixels(kind, number=6, seed=0):
    shape = network(kind)[0].image_shape
    return np.random.default_rng(seed).integers(256, size=(number, *shape)).astype(np.uint8)


def reference(kind):
    found = integer_model(kind)
    return jax.jit(lambda x, p: run_integer(found, normalize(x, found.mean, found.std), p))


@pytest.fixture(scope="module")
def switchable(tmp_path_factory):
    """``switchable(kind)``: path of the exported file."""
    folder = tmp_path_factory.mktemp("switchable")

    def path(kind):
        file = folder / f"{kind}.onnx"
        if not file.exists():
            save_onnx(file, switchable_model(integer_model(kind)))
        return file

    return path


# --- agreement ---


@pytest.mark.parametrize("level", OPTIMIZATION)
@EACH_KIND
def test_the_switchable_graph_gives_the_logits_of_the_network(kind, level, switchable):
    runner, run, images = OnnxRunner(switchable(kind), level), reference(kind), pixels(kind)
    for policy in policies(kind):
        np.testing.assert_allclose(runner(images, policy), run(images, policy), **CLOSE)


@pytest.mark.parametrize("storage_dtype", STORAGE_DTYPES)
@EACH_KIND
def test_the_graph_of_one_policy_gives_its_logits(kind, storage_dtype, tmp_path):
    run, images = reference(kind), pixels(kind)
    for number, policy in enumerate(policies(kind)[:: 1 if storage_dtype == "int8" else 3]):
        path = tmp_path / f"{number}.onnx"
        save_onnx(path, policy_model(integer_model(kind), policy, storage_dtype))
        for level in OPTIMIZATION:
            found = OnnxRunner(path, level)(images)
            np.testing.assert_allclose(found, run(images, policy), **CLOSE)


@pytest.mark.parametrize(
    ("kind", "every"),
    [
        ("resnet18", 3),
        *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in WEIGHT_QUANTIZERS),
    ],
)
def test_the_fast_graph_gives_nearly_the_logits_of_its_policy(kind, every, tmp_path):
    run, images = reference(kind), pixels(kind, 32)
    for number, policy in enumerate(policies(kind)[::every]):
        path = tmp_path / f"{number}.onnx"
        ranges = stream_ranges(integer_model(kind), policy, images)
        save_onnx(path, int8_model(integer_model(kind), policy, ranges))
        wanted = np.asarray(run(images, policy))
        for level in OPTIMIZATION:
            found = OnnxRunner(path, level)(images)
            correlation = np.corrcoef(found.ravel(), wanted.ravel())[0, 1]
            assert correlation > 0.9, (policy, level)


def test_the_fast_graph_keeps_an_8_bit_stem_whose_codes_reach_their_end(tmp_path):
    kind = "int8 ends"
    found, policy = integer_model(kind), policies(kind)[0]
    codes = found.stem.kernels[0].codes.copy()
    codes.flat[0] = -128
    kernels = (dataclasses.replace(found.stem.kernels[0], codes=codes),)
    changed = dataclasses.replace(found, stem=dataclasses.replace(found.stem, kernels=kernels))
    images = pixels(kind, 32)
    run = jax.jit(lambda x, p: run_integer(changed, normalize(x, found.mean, found.std), p))
    save_onnx(
        tmp_path / "net.onnx", int8_model(changed, policy, stream_ranges(changed, policy, images))
    )
    logits = [OnnxRunner(tmp_path / "net.onnx")(images).ravel(), np.ravel(run(images, policy))]
    assert np.corrcoef(*logits)[0, 1] > 0.97


def test_the_fast_graph_is_fused_into_integer_convolutions(tmp_path):
    kind = "resnet8"
    policy = policies(kind)[0]
    model = int8_model(
        integer_model(kind), policy, stream_ranges(integer_model(kind), policy, pixels(kind))
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ops = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    layers = sum(len(layer.kernels) for layer in integer_model(kind).layers)
    assert ops.count("QLinearConv") == layers
    assert ops.count("Conv") == 1  # the stem


# --- what is in the file ---


def test_any_batch(switchable):
    runner, policy = OnnxRunner(switchable("resnet8")), policies("resnet8")[-1]
    images = pixels("resnet8", 5)
    whole = runner(images, policy)
    for number in (1, 3):
        np.testing.assert_allclose(runner(images[:number], policy), whole[:number], **CLOSE)


def test_all_operators_are_standard_and_weights_are_integers():
    found = integer_model("resnet8")
    uniform = np.full(6, 2)
    for storage_dtype, (bits, opset) in STORAGE_DTYPES.items():
        model = policy_model(found, uniform, storage_dtype)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
        assert {node.domain for node in model.graph.node} == {""}
        kinds = {t.name: t.data_type for t in model.graph.initializer}
        wanted = getattr(onnx.TensorProto, f"INT{bits}")
        assert all(kinds[f"{name}.conv"] == wanted for name in found.names)
    switch = switchable_model(found)
    assert {node.domain for node in switch.graph.node} == {""}


def test_layers_too_wide_for_a_carrier_take_the_next(tmp_path):
    kind = "wide"
    policy = policies(kind)[-1]
    model = policy_model(integer_model(kind), policy, "int2")
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    for name, width in zip(integer_model(kind).names, policy, strict=True):
        bits = 2 if width == 2 else 4 if width <= 4 else 8
        assert kinds[f"{name}.conv"] == getattr(onnx.TensorProto, f"INT{bits}")


def test_the_metadata_tell_how_to_use_it(switchable, tmp_path):
    found, policy = integer_model("resnet8"), policies("resnet8")[-1]
    save_onnx(tmp_path / "one.onnx", policy_model(found, policy))
    for path in (switchable("resnet8"), tmp_path / "one.onnx"):
        about = {p.key: p.value for p in onnx.load(path).metadata_props}
        assert json.loads(about["classes"]) == list(found.classes)
        assert json.loads(about["layers"]) == list(found.names)
        np.testing.assert_allclose(json.loads(about["mean"]), found.mean)
    assert json.loads(about["policy"]) == policy.tolist()
    runner = OnnxRunner(tmp_path / "one.onnx")
    assert (runner.switchable, runner.policy.tolist()) == (False, policy.tolist())


def test_onnxruntime_has_nothing_to_warn_of(switchable, capfd):
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 2
        onnxruntime.InferenceSession(
            switchable("resnet8").read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    assert not re.search(r"\[W:|\[E:", capfd.readouterr().err)


# --- mistakes ---


def test_an_unknown_width_gives_nan(switchable):
    session = onnxruntime.InferenceSession(switchable("resnet8"))
    for policy in ([5] * 6, [4, 4, 4, 4, 4, 0]):
        feed = {"images": pixels("resnet8"), "policy": np.asarray(policy, np.int64)}
        assert np.isnan(session.run(None, feed)[0]).all()


def test_policies_that_do_not_fit_are_refused(switchable, tmp_path):
    runner = OnnxRunner(switchable("resnet8"))
    with refused("missing-value"):
        runner(pixels("resnet8"))
    with refused("policy-width", 5, (2, 3, 4)):
        runner(pixels("resnet8"), [5] * 6)
    save_onnx(tmp_path / "one.onnx", policy_model(integer_model("resnet8"), np.full(6, 3)))
    with refused("conflict"):
        OnnxRunner(tmp_path / "one.onnx")(pixels("resnet8"), [3] * 6)
    with refused("bad-value", "'int3'", ", ".join(STORAGE_DTYPES)):
        policy_model(integer_model("resnet8"), np.full(6, 3), "int3")


def test_other_files_are_refused(switchable, tmp_path):
    with refused("no-such-file", tmp_path / "none.onnx"):
        OnnxRunner(tmp_path / "none.onnx")
    whole = switchable("resnet8").read_bytes()
    path = tmp_path / "damaged.onnx"
    for content in (b"", b"something else", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with refused("damaged", path):
            OnnxRunner(path)
    model = onnx.load(switchable("resnet8"))
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    with refused("wrong-format", path):
        OnnxRunner(path)


def test_a_missing_engine_names_the_extra(monkeypatch, switchable):
    path = switchable("resnet8")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with refused("not-installed", "onnxruntime", "bitmixer_jax[onnx]"):
        OnnxRunner(path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with refused("not-installed", "bitmixer_jax[onnx]"):
        switchable_model(integer_model("resnet8"))
