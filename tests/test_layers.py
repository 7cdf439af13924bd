"""Layers: transitional batch norm, quantised convolution and dense layer, the baseline."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitmixer_jax.layer_table import LayerInfo, conv_info
from bitmixer_jax.layers import (
    QuantActivation,
    QuantConfig,
    QuantConv,
    QuantDense,
    QuantLayer,
    TransitionalBatchNorm,
    fold,
)
from bitmixer_jax.policy import BitSpace
from tests import oracle
from tests.refusals import refused

SPACE = BitSpace((2, 3, 4))
QUANT = QuantConfig(space=SPACE)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scrambled(variables, seed=0):
    """The variables with other norm tables: every slice different, counts zero."""
    rng = np.random.default_rng(seed)

    def other(path, leaf):
        name = path[-1].key
        low, high = {"scale": (0.5, 1.5), "var": (0.5, 2)}.get(name, (-0.5, 0.5))
        if name in ("scale", "bias", "mean", "var"):
            return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)
        return leaf

    return jax.tree_util.tree_map_with_path(other, variables)


# --- QuantConfig ---


@pytest.mark.parametrize(
    ("settings", "code", "mentions"),
    [
        ({"weight_quantizer": "flor"}, "bad-value", ("'flor'", "floor")),
        ({"norm": "batch"}, "bad-value", ("norm", "'batch'", "per_width")),
        ({"compute_dtype": "float16"}, "bad-value", ("compute_dtype", "'float16'", "bfloat16")),
        ({"activations": False, "weights": True}, "conflict", ()),
    ],
)
def test_quantization_refuses_settings_it_does_not_know(settings, code, mentions):
    with refused(code, *mentions):
        QuantConfig(**settings)


def test_the_baseline_quantises_nothing_and_keeps_the_rest():
    quant = QuantConfig(space=SPACE, momentum=0.7, weight_quantizer="double")
    plain = quant.baseline()
    assert (plain.activations, plain.weights, plain.space, plain.n) == (False, False, None, 1)
    assert (plain.momentum, plain.weight_quantizer) == (0.7, "double")


# --- transitional batch norm ---

TABLE = (3, 3, 5)  # [P, n, C]


@pytest.fixture(scope="module")
def tbn():
    """``tbn(variables, sums, step, predecessor, index)``: one training step, indices traced."""
    norm = TransitionalBatchNorm(QUANT, predecessor_widths=3)

    @jax.jit
    def step(variables, sums, step, predecessor, index):
        return norm.apply(
            variables, sums, step, predecessor, index, train=True, mutable=["batch_stats"]
        )

    return step


@functools.cache
def tbn_variables():
    norm = TransitionalBatchNorm(QUANT, predecessor_widths=3)
    return scrambled(norm.init(jax.random.key(0), normal(4, 3, 3, 5), None, 0, 0, False))


def test_the_tables_hold_one_slice_for_each_pair_of_widths():
    shapes = jax.tree.map(jnp.shape, tbn_variables())
    assert shapes == {
        "params": {"scale": TABLE, "bias": TABLE},
        "batch_stats": {"mean": TABLE, "var": TABLE, "count": TABLE[:2]},
    }


def test_evaluation_uses_the_slice_of_its_pair():
    norm, x = TransitionalBatchNorm(QUANT, predecessor_widths=3), np.asarray(normal(4, 3, 3, 5))
    variables = tbn_variables()
    for pair in ((0, 0), (0, 2), (2, 0), (1, 2)):
        found = norm.apply(variables, x, None, *pair, train=False)
        params, stats = variables["params"], variables["batch_stats"]
        np.testing.assert_allclose(found, oracle.normalise(x, params, stats, pair), atol=1e-5)


def test_a_training_step_changes_the_visited_pair_and_no_other_bit(tbn):
    old = tbn_variables()["batch_stats"]
    _, new = tbn(tbn_variables(), normal(4, 3, 3, 5), jnp.float32(1), 2, 1)
    others = np.ones(TABLE[:2], bool)
    others[2, 1] = False
    for leaf in ("mean", "var", "count"):
        before, after = np.asarray(old[leaf]), np.asarray(new["batch_stats"][leaf])
        np.testing.assert_array_equal(before[others], after[others])
        assert (before[2, 1] != after[2, 1]).all()
    assert new["batch_stats"]["count"][2, 1] == 1


def test_running_statistics_are_the_plain_average_first_and_exponential_later(tbn):
    variables = dict(tbn_variables())
    means, variances, expected = [], [], {}
    for visit in range(14):
        x = normal(4, 3, 3, 5, seed=visit) + visit
        _, new = tbn(variables, x, jnp.float32(1), 1, 0)
        variables["batch_stats"] = new["batch_stats"]
        means.append(np.mean(x, (0, 1, 2)))
        variances.append(np.var(x, (0, 1, 2)))
        if visit < 10:  # momentum 0.9: from the eleventh visit on, a plain one would be slower
            expected = {"mean": np.mean(means, 0), "var": np.mean(variances, 0)}
        else:
            expected["mean"] = 0.9 * expected["mean"] + 0.1 * means[-1]
            expected["var"] = 0.9 * expected["var"] + 0.1 * variances[-1]
        for leaf in ("mean", "var"):
            np.testing.assert_allclose(
                new["batch_stats"][leaf][1, 0], expected[leaf], rtol=2e-4, atol=1e-5
            )
        assert new["batch_stats"]["count"][1, 0] == visit + 1


def test_training_normalises_with_the_batch_and_the_slice_of_the_pair(tbn):
    x = np.asarray(normal(4, 3, 3, 5)) * 3 + 1
    found, _ = tbn(tbn_variables(), x, jnp.float32(1), 0, 2)
    stats = {"mean": x.mean((0, 1, 2))[None, None], "var": x.var((0, 1, 2))[None, None]}
    params = {k: v[0, 2][None, None] for k, v in tbn_variables()["params"].items()}
    np.testing.assert_allclose(found, oracle.normalise(x, params, stats, (0, 0)), atol=1e-5)


def test_the_step_multiplies_the_sums_before_they_are_normalised(tbn):
    sums, step = normal(4, 3, 3, 5), jnp.float32(0.03)
    one = tbn(tbn_variables(), sums, step, 1, 1)
    two = tbn(tbn_variables(), step * sums, jnp.float32(1), 1, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)


def test_statistics_over_devices_are_those_of_the_whole_batch(tbn):
    spread = TransitionalBatchNorm(
        dataclasses.replace(QUANT, axis_name="device"), predecessor_widths=3
    )
    x = normal(2, 4, 3, 3, 5)

    def step(x):
        return spread.apply(
            tbn_variables(), x, jnp.float32(1), 1, 2, train=True, mutable=["batch_stats"]
        )

    parts, stats = jax.jit(jax.vmap(step, axis_name="device"))(x)
    whole, expected = tbn(tbn_variables(), x.reshape(8, 3, 3, 5), jnp.float32(1), 1, 2)
    np.testing.assert_allclose(parts.reshape(whole.shape), whole, atol=1e-5)
    for leaf in ("mean", "var", "count"):
        both, one = stats["batch_stats"][leaf], expected["batch_stats"][leaf]
        np.testing.assert_array_equal(both[0], both[1])
        np.testing.assert_allclose(both[0], one, atol=1e-5)


def test_fold_is_batch_norm_as_one_multiplier_and_one_offset():
    scale, bias, mean, sums = (np.asarray(normal(5, seed=i)) for i in range(4))
    var, step = np.square(normal(5, seed=5)), 0.1
    multiplier, offset = fold(scale, bias, mean, var, step, 1e-5)
    expected = scale * (step * sums - mean) / np.sqrt(var + 1e-5) + bias
    np.testing.assert_allclose(multiplier * sums + offset, expected, rtol=1e-4)


# --- the baseline is flax ---

CONV = conv_info("conv", (6, 6, 3), 5, kernel=3, strides=2)
SHORTCUT = conv_info("shortcut", (6, 6, 3), 7, kernel=1, strides=2)
LAYER = LayerInfo(
    name="layer",
    kind="conv",
    kernels=(CONV,),
    predecessor=0,
    block=0,
    signed=False,
    input=(6, 6, 3),
)
BOTH_KERNELS = dataclasses.replace(LAYER, kernels=(CONV, SHORTCUT))


class Plain(nn.Module):
    """Convolution and batch norm as flax has them."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(5, (3, 3), 2, ((1, 1), (1, 1)), use_bias=False, name="conv")(x)
        return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="conv_norm")(x)


def baseline_variables():
    """Of the baseline of the layer, and the same for flax."""
    layer = QuantLayer(LAYER, QUANT.baseline())
    variables = scrambled(layer.init(jax.random.key(0), normal(4, 6, 6, 3), 0, 0, False))
    flat = {
        group: jax.tree.map(lambda leaf: leaf[0, 0] if leaf.ndim == 3 else leaf, tree)
        for group, tree in variables.items()
    }
    del flat["batch_stats"]["conv_norm"]["count"]
    return layer, variables, flat


def test_the_baseline_has_no_step_sizes_and_one_norm():
    _, variables, _ = baseline_variables()
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "conv": {"kernel": (3, 3, 3, 5)},
        "conv_norm": {"scale": (1, 1, 5), "bias": (1, 1, 5)},
    }


def test_the_baseline_evaluates_like_flax():
    layer, variables, flat = baseline_variables()
    x = normal(4, 6, 6, 3, seed=1)
    (found,) = layer.apply(variables, x, 0, 0, train=False)
    np.testing.assert_allclose(found, Plain().apply(flat, x, train=False), atol=1e-5)


def test_the_baseline_trains_like_flax():
    layer, variables, flat = baseline_variables()
    # After many visits the running average is exponential, as that of flax is from the start.
    variables["batch_stats"]["conv_norm"]["count"] = jnp.full((1, 1), 100)
    x, r = normal(4, 6, 6, 3, seed=1), normal(4, 3, 3, 5, seed=2)

    def ours(params):
        state = {**variables, "params": params}
        (y,), new = layer.apply(state, x, 0, 0, train=True, mutable=["batch_stats"])
        return jnp.sum(r * y), (y, new["batch_stats"]["conv_norm"])

    def theirs(params):
        state = {**flat, "params": params}
        y, new = Plain().apply(state, x, train=True, mutable=["batch_stats"])
        return jnp.sum(r * y), (y, new["batch_stats"]["conv_norm"])

    (_, (y, stats)), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(variables["params"])
    (_, (expected, plain)), expected_grads = jax.jit(jax.value_and_grad(theirs, has_aux=True))(
        flat["params"]
    )
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for leaf in ("mean", "var"):
        np.testing.assert_allclose(stats[leaf][0, 0], plain[leaf], rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-4, atol=1e-4),
        grads,
        expected_grads,
    )


# --- quantised layers ---


@functools.cache
def layer_variables(weight_quantizer="floor", info=LAYER):
    layer = QuantLayer(info, dataclasses.replace(QUANT, weight_quantizer=weight_quantizer))
    return scrambled(layer.init(jax.random.key(0), oracle.relu(normal(4, 6, 6, 3)), 0, 0, False))


def by_hand(variables, x, kernel, stride, pair, kind):
    """One kernel of a layer in evaluation: quantise, convolve, normalise."""
    params, c = variables["params"], pair[1]
    bits = SPACE.choices[c]
    x_step, w_step = params["input"]["step"][c], params[kernel]["step"]
    w_step = np.float32(w_step[c if kind == "independent" else 0])
    w = np.asarray(params[kernel]["kernel"])
    x_codes = oracle.codes("independent", np.asarray(x), np.float32(x_step), bits, 4, signed=False)
    sums = oracle.convolve(x_codes, oracle.codes(kind, w, w_step, bits, 4), stride)
    y = sums * float(x_step) * float(oracle.pitch(kind, w_step, bits, 4))
    norm = f"{kernel}_norm"
    return oracle.normalise(y, params[norm], variables["batch_stats"][norm], pair)


@pytest.mark.parametrize("kind", oracle.WEIGHT_QUANTIZERS)
def test_a_layer_is_quantise_convolve_normalise(kind):
    layer = QuantLayer(LAYER, dataclasses.replace(QUANT, weight_quantizer=kind))
    x, variables = oracle.relu(normal(4, 6, 6, 3)), layer_variables(kind)
    for pair in ((0, 0), (2, 1), (1, 2)):
        (found,) = layer.apply(variables, x, *pair, train=False)
        expected = by_hand(variables, x, "conv", 2, pair, kind)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_shortcut_kernel_shares_the_input_codes_and_the_pair_of_its_layer():
    layer, variables = QuantLayer(BOTH_KERNELS, QUANT), layer_variables(info=BOTH_KERNELS)
    x = oracle.relu(normal(4, 6, 6, 3))
    assert set(variables["params"]) == {"input", "conv", "conv_norm", "shortcut", "shortcut_norm"}
    for pair in ((0, 2), (2, 1)):
        outputs = layer.apply(variables, x, *pair, train=False)
        for found, kernel in zip(outputs, ("conv", "shortcut"), strict=True):
            expected = by_hand(variables, x, kernel, 2, pair, "floor")
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_after_the_stem_and_one_with_per_width_norm_have_no_previous_width():
    first = dataclasses.replace(LAYER, predecessor=-1)
    per_width = dataclasses.replace(QUANT, norm="per_width")
    x = normal(4, 6, 6, 3)
    for layer in (QuantLayer(first, QUANT), QuantLayer(LAYER, per_width)):
        variables = jax.eval_shape(
            lambda key, m=layer: m.init(key, x, 0, 0, False), jax.random.key(0)
        )
        assert variables["params"]["conv_norm"]["scale"].shape == (1, 3, 5)
        assert variables["batch_stats"]["conv_norm"]["count"].shape == (1, 3)


@pytest.mark.parametrize("kind", oracle.WEIGHT_QUANTIZERS)
def test_bfloat16_operands_give_the_very_sums_of_float32(kind):
    space = BitSpace((2, 8))
    x = oracle.relu(normal(4, 6, 6, 3))
    sums = {}
    for dtype in ("float32", "bfloat16"):
        quant = QuantConfig(space=space, weight_quantizer=kind, compute_dtype=dtype)
        conv = QuantConv(quant, features=5)
        for index in (0, 1):
            act = QuantActivation(quant)
            (codes, step), _ = act.init_with_output(jax.random.key(0), x, index)
            (out, scale), _ = conv.init_with_output(jax.random.key(1), codes, step, index)
            assert out.dtype == jnp.float32
            sums[dtype, index] = out, scale
    for index in (0, 1):
        for one, two in zip(sums["float32", index], sums["bfloat16", index], strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_kernels_of_stage_1_are_convolved_in_float32(dtype):
    quant = QuantConfig(space=SPACE, weights=False, compute_dtype=dtype)
    codes = np.round(4 * oracle.relu(normal(4, 6, 6, 3)))
    conv = QuantConv(quant, features=5)
    (sums, scale), variables = conv.init_with_output(jax.random.key(0), codes, jnp.float32(2), 0)
    expected = oracle.convolve(codes, variables["params"]["kernel"])
    np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-5)
    assert scale == 2  # the step of the input alone


def test_gradients_in_bfloat16_are_close_to_those_of_float32():
    grads = {}
    for dtype in ("float32", "bfloat16"):
        conv = QuantConv(dataclasses.replace(QUANT, compute_dtype=dtype), features=5)
        codes = np.round(4 * oracle.relu(normal(4, 6, 6, 3)))
        variables = conv.init(jax.random.key(0), codes, jnp.float32(1), 1)
        r = normal(4, 6, 6, 5, seed=3)

        def loss(params, codes, conv=conv, r=r):
            sums, scale = conv.apply({"params": params}, codes, jnp.float32(1), 1)
            return jnp.sum(r * scale * sums)

        grads[dtype] = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], codes)
    for one, two in zip(*map(jax.tree.leaves, grads.values()), strict=True):
        assert one.dtype == two.dtype == jnp.float32
        # The step's is a difference of large sums, of which one passed through bfloat16.
        assert np.linalg.norm(one - two) < (0.05 if one.size == 1 else 0.01) * np.linalg.norm(one)


def test_the_variables_are_the_same_whether_weights_or_activations_are_quantised_or_not():
    x = oracle.relu(normal(4, 6, 6, 3))
    trees = []
    for flags in ({}, {"weights": False}, {"weights": False, "activations": False}):
        layer = QuantLayer(LAYER, dataclasses.replace(QUANT, **flags))
        trees.append(layer.init(jax.random.key(0), x, 0, 1, False))
    for tree in trees[1:]:
        jax.tree.map(np.testing.assert_array_equal, tree, trees[0])


def test_a_dense_layer_multiplies_codes_and_adds_a_real_bias():
    dense, x = QuantDense(QUANT, features=5), np.arange(12.0).reshape(4, 3)
    variables = dense.init(jax.random.key(0), x, jnp.float32(0.5), 0)
    variables["params"]["bias"] = normal(5)
    kernel, step = map(np.asarray, (variables["params"]["kernel"], variables["params"]["step"][0]))
    for index, bits in enumerate(SPACE.choices):
        found = dense.apply(variables, x, jnp.float32(0.5), index)
        codes = oracle.codes("floor", kernel, step, bits, 4)
        expected = (0.5 * x) @ (codes * oracle.pitch("floor", step, bits, 4)) + normal(5)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
