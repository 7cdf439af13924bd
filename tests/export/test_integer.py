"""Integer execution against the simulated network."""

import jax
import numpy as np
import pytest

from bitmixer_jax.errors import UserError
from bitmixer_jax.export.deployed import deploy, narrowed
from bitmixer_jax.export.integer import run_integer, tensors
from tests.export.networks import EACH_KIND, deployed, images, network, policies


@EACH_KIND
def test_logits_are_those_of_the_simulated_network(kind):
    model, variables = network(kind)
    x, packed = images(kind), deployed(kind)
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
    packed = deployed(kind)
    made = jax.jit(lambda x, p: tensors(packed, x, p))(x, policy)
    for node in packed.graph:
        if node.op == "layer":
            outputs = captured[node.layer]["__call__"][0]
            for name, wanted in zip(node.outputs, outputs, strict=True):
                np.testing.assert_array_equal(made[name], wanted)


@pytest.mark.parametrize("kind", ["resnet8", "independent", "wide"])
def test_static_policies_give_the_logits_of_traced_ones(kind):
    x, policy = images(kind), policies(kind)[-1]
    packed = deployed(kind)
    traced = jax.jit(lambda x, p: run_integer(packed, x, p))(x, policy)
    static = jax.jit(lambda x: run_integer(packed, x, tuple(policy.tolist())))(x)
    np.testing.assert_allclose(static, traced, rtol=1e-5, atol=1e-5)


def test_arithmetic_is_in_integers():
    text = str(
        jax.make_jaxpr(lambda x, p: run_integer(deployed("resnet8"), x, p))(
            images("resnet8"), policies("resnet8")[0]
        )
    )
    convolutions = [line for line in text.splitlines() if "= conv_general_dilated[" in line]
    assert sum(":i32[" in line for line in convolutions) == 6
    assert sum(":f32[" in line for line in convolutions) == 1  # the stem


def test_traced_width_that_is_not_a_choice_gives_nan():
    run = jax.jit(lambda x, p: run_integer(deployed("resnet8"), x, p))
    assert np.isnan(run(images("resnet8"), np.full(6, 5, np.int32))).all()


def test_static_width_that_is_not_a_choice_is_an_error():
    with pytest.raises(UserError, match="width 5"):
        run_integer(deployed("resnet8"), images("resnet8"), (5,) * 6)


def test_narrowed_codes_nest():
    codes = np.arange(-128, 128, dtype=np.int8)
    for shift in range(7):
        assert np.array_equal(narrowed(codes, shift, "floor", 8), np.floor(codes / 2**shift))
        rounded = np.floor(codes / 2**shift + 0.5).clip(max=2 ** (7 - shift) - 1)
        assert np.array_equal(narrowed(codes, shift, "double", 8), rounded)


def test_a_network_whose_weights_are_real_is_refused():
    model, variables = network("resnet8")
    for other in (model.float_twin(), model.clone(quant=model.quant.__class__(weights=False))):
        with pytest.raises(UserError, match="not quantised"):
            deploy(other, variables, mean=[0], std=[1], classes=("a",), network="")


def test_pairs_never_visited_are_refused():
    model, variables = network("resnet8")
    stats = {**variables["batch_stats"]}
    name = model.layers[1].name
    norm = {**stats[name]["conv_norm"], "count": np.asarray([[1, 1, 1], [1, 1, 1], [0, 1, 1]])}
    stats[name] = {"conv_norm": norm}
    found = deploy(
        model,
        {"params": variables["params"], "batch_stats": stats},
        mean=[0],
        std=[1],
        classes=("a", "b", "c"),
        network="",
    )
    found.check_visited(np.full(6, 4))
    with pytest.raises(UserError, match=r"conv2 at 2 bits after 4 was never visited"):
        found.check_visited(np.asarray([4, 2, 2, 2, 2, 2]))
