"""Integer execution against the simulated network."""

import dataclasses

import jax
import numpy as np
import pytest

from bitmixer_jax.export.integer_engine import run_integer, tensors
from bitmixer_jax.export.integer_model import to_integer_model, truncate_bits
from bitmixer_jax.export.packed import pack, unpack
from bitmixer_jax.quantizers import WEIGHT_QUANTIZERS as WEIGHT_QUANTIZER_OBJECTS
from tests.export.networks import (
    EACH_KIND,
    images,
    integer_model,
    network,
    policies,
)
from tests.refusals import refused


@EACH_KIND
def test_logits_are_those_of_the_simulated_network(kind):
    model, variables = network(kind)
    x, packed = images(kind), integer_model(kind)
    simulated = jax.jit(lambda v, x, p: model.apply(v, x, bits=p, train=False))
    integer = jax.jit(lambda x, p: run_integer(packed, x, p))
    for policy in policies(kind):
        wanted, found = simulated(variables, x, policy), integer(x, policy)
        # Equal up to the head, which sums floats in an order of its own.
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["resnet8", "double", pytest.param("mobilenet", marks=pytest.mark.slow)]
)
def test_every_layer_is_equal_bit_for_bit(kind):
    model, variables = network(kind)
    x, policy = images(kind), policies(kind)[-1]
    run = jax.jit(
        lambda v, x, p: model.apply(
            v, x, bits=p, train=False, capture_intermediates=True, mutable=["intermediates"]
        )
    )
    captured = run(variables, x, policy)[1]["intermediates"]
    packed = integer_model(kind)
    made = jax.jit(lambda x, p: tensors(packed, x, p))(x, policy)
    for node in packed.graph:
        if node.op == "layer":
            outputs = captured[node.layer]["__call__"][0]
            for name, wanted in zip(node.outputs, outputs, strict=True):
                np.testing.assert_array_equal(made[name], wanted)


@pytest.mark.parametrize("kind", ["resnet8", "independent", "wide"])
def test_static_policies_give_the_logits_of_traced_ones(kind):
    x, policy = images(kind), policies(kind)[-1]
    packed = integer_model(kind)
    traced = jax.jit(lambda x, p: run_integer(packed, x, p))(x, policy)
    static = jax.jit(lambda x: run_integer(packed, x, tuple(policy.tolist())))(x)
    np.testing.assert_allclose(static, traced, rtol=1e-5, atol=1e-5)


def test_arithmetic_is_in_integers():
    text = str(
        jax.make_jaxpr(lambda x, p: run_integer(integer_model("resnet8"), x, p))(
            images("resnet8"), policies("resnet8")[0]
        )
    )
    convolutions = [line for line in text.splitlines() if "= conv_general_dilated[" in line]
    assert sum(":i32[" in line for line in convolutions) == 6
    assert sum(":f32[" in line for line in convolutions) == 1  # the stem


def test_traced_width_that_is_not_a_choice_gives_nan():
    run = jax.jit(lambda x, p: run_integer(integer_model("resnet8"), x, p))
    assert np.isnan(run(images("resnet8"), np.full(6, 5, np.int32))).all()


def test_static_width_that_is_not_a_choice_is_an_error():
    with refused("policy-width", 5, (2, 3, 4)):
        run_integer(integer_model("resnet8"), images("resnet8"), (5,) * 6)


def test_narrowed_codes_nest():
    codes = np.arange(-128, 128, dtype=np.int8)
    for shift in range(7):
        assert np.array_equal(truncate_bits(codes, shift, "floor", 8), np.floor(codes / 2**shift))
        rounded = np.floor(codes / 2**shift + 0.5).clip(max=2 ** (7 - shift) - 1)
        assert np.array_equal(truncate_bits(codes, shift, "double", 8), rounded)


def test_a_network_whose_weights_are_real_is_refused():
    model, variables = network("resnet8")
    for other in (model.baseline(), model.clone(quant=model.quant.__class__(weights=False))):
        with refused("no-widths"):
            to_integer_model(other, variables, mean=[0], std=[1], classes=("a",), weights_digest="")


def test_pairs_never_visited_are_refused():
    model, variables = network("resnet8")
    stats = {**variables["batch_stats"]}
    name = model.layers[1].name
    norm = {**stats[name]["conv_norm"], "count": np.asarray([[1, 1, 1], [1, 1, 1], [0, 1, 1]])}
    stats[name] = {"conv_norm": norm}
    found = to_integer_model(
        model,
        {"params": variables["params"], "batch_stats": stats},
        mean=[0],
        std=[1],
        classes=("a", "b", "c"),
        weights_digest="",
    )
    found.check_calibrated(np.full(6, 4))
    with refused("uncalibrated", name, "2 bits", 4):
        found.check_calibrated(np.asarray([4, 2, 2, 2, 2, 2]))


def test_a_new_weight_quantiser_needs_one_class(monkeypatch):
    class Renamed(type(WEIGHT_QUANTIZER_OBJECTS["floor"])):
        name = "renamed"

    monkeypatch.setitem(WEIGHT_QUANTIZER_OBJECTS, "renamed", Renamed())
    model, variables = network("resnet8")
    other = model.clone(quant=dataclasses.replace(model.quant, weight_quantizer="renamed"))
    about = dict(mean=[0.0], std=[1.0], classes=("a", "b", "c"), weights_digest="")
    found = unpack(pack(to_integer_model(other, variables, **about)), "file")
    policy = policies("resnet8")[-1]
    np.testing.assert_array_equal(
        run_integer(found, images("resnet8"), policy),
        run_integer(integer_model("resnet8"), images("resnet8"), policy),
    )
