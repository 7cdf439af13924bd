"""Networks: policies as arguments, an independent forward pass, step sizes, mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bitmixer_jax as bm
from tests import oracle
from tests.refusals import refused

CHOICES = (2, 3, 4)
SPACE = bm.BitSpace(CHOICES)
TINY = dict(num_classes=5, space=SPACE, image_shape=(8, 8, 3), width=4)
POLICY = (4, 2, 3, 3, 2, 4)


def images(count=4, seed=0, shape=(8, 8, 3)):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def tiny(**settings):
    return bm.create_model("resnet8", **{**TINY, **settings})


def filled(shapes, rng):
    """Variables of these shapes as after training: every norm slice and step differs, so that a
    wrong index shows. (The initial ones take longer to compile than the network.)"""
    if not isinstance(shapes, dict):
        return {}
    tree = {name: filled(branch, rng) for name, branch in shapes.items()}
    size = 0.4
    if "kernel" in shapes:
        shape = shapes["kernel"].shape
        kernel = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape).astype(np.float32)
        tree["kernel"], size = jnp.asarray(kernel), np.abs(kernel).mean()
    ranges = {"scale": (0.5, 1.5), "bias": (-0.3, 0.6), "mean": (-0.3, 0.3), "var": (0.5, 2)}
    ranges |= {"step": (0.4 * size, 0.9 * size), "count": (0, 1)}
    for leaf, (low, high) in ranges.items():
        if leaf in shapes:
            held = rng.uniform(low, high, shapes[leaf].shape)
            tree[leaf] = jnp.asarray(held, shapes[leaf].dtype)
    return tree


def trained(model):
    """Variables of a model, as `filled` makes them."""
    shapes = jax.eval_shape(
        lambda key: model.init(
            key, images(1, shape=model.image_shape), bits=POLICY[:1] * model.num_layers
        ),
        jax.random.key(0),
    )
    return filled(shapes, np.random.default_rng(0))


@functools.cache
def tiny_variables(**settings):
    return trained(tiny(**settings))


@functools.cache
def traced(**settings):
    """``f(variables, x, bits)``: logits of a tiny network; ``f.traces`` counts compilations."""
    model = tiny(**settings)

    @jax.jit
    def apply(variables, x, bits):
        found.traces += 1
        return model.apply(variables, x, bits=bits)

    def found(variables, x, bits):
        return apply(variables, x, np.asarray(bits, np.int32))

    found.traces = 0
    return found


def random_policies(count, layers, seed=0):
    return np.random.default_rng(seed).choice(CHOICES, (count, layers)).astype(np.int32)


# --- a policy is an argument ---


@pytest.mark.parametrize(
    "settings",
    [{"weight_quantizer": kind} for kind in oracle.WEIGHT_QUANTIZERS] + [{"projection": True}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_network_computes_what_the_method_says(settings):
    variables = tiny_variables(**settings)
    apply = traced(**settings)
    for policy in (POLICY, (2,) * 6, *random_policies(6, 6).tolist()):
        found = apply(variables, images(), policy)
        kind = settings.get("weight_quantizer", "floor")
        expected = oracle.resnet8(variables, images(), policy, CHOICES, kind)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", [POLICY, (3,) * 6])
def test_static_and_traced_widths_give_the_same_logits(policy):
    model, variables = tiny(), tiny_variables()
    static = jax.jit(lambda variables, x: model.apply(variables, x, bits=policy))
    as_data = traced()(variables, images(), policy)
    np.testing.assert_allclose(static(variables, images()), as_data, rtol=1e-4, atol=1e-5)


def test_200_policies_are_one_trace_and_give_different_logits():
    policies = np.unique(random_policies(260, 6), axis=0)[:200]
    logits = [traced()(tiny_variables(), images(), policy) for policy in policies]
    assert len(policies) == 200
    assert traced().traces == 1
    assert len({np.asarray(x).tobytes() for x in logits}) == 200


def test_an_unknown_traced_width_gives_nan_for_every_logit():
    apply = traced()
    assert np.isfinite(apply(tiny_variables(), images(), POLICY)).all()
    for width in (5, 0, -1):
        policy = (4, 2, width, 3, 2, 4)
        assert np.isnan(apply(tiny_variables(), images(), policy)).all()


@pytest.mark.parametrize(
    ("bits", "code"),
    [
        ((4, 2, 5, 3, 2, 4), "policy-width"),
        (np.array((4, 2, 5, 3, 2, 4)), "policy-width"),
        (jnp.array((4, 2, 5, 3, 2, 4)), "policy-width"),
        ((4, 2, 3), "policy-length"),
        (np.array((4, 2, 3)), "policy-length"),
        (np.full((2, 6), 4), "policy-length"),
        ([[4] * 6] * 6, "policy-length"),
        ((4.0,) * 6, "policy-form"),
        (4, "policy-length"),
        (None, "missing-value"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"{type(value).__name__}-{np.shape(value)}"
    ),
)
def test_a_policy_that_does_not_fit_is_refused(bits, code):
    with refused(code):
        jax.eval_shape(lambda: tiny().apply(tiny_variables(), images(), bits=bits))


@pytest.mark.parametrize("shape", [(4, 8, 8, 1), (4, 16, 16, 3), (8, 8, 3)])
def test_images_of_another_shape_are_refused(shape):
    with refused("bad-shape", shape, (8, 8, 3)):
        tiny().apply(tiny_variables(), jnp.zeros(shape), bits=POLICY)


# --- transitional batch norm in a network ---


def test_uniform_policies_of_a_transitional_network_are_those_of_one_norm_per_width():
    variables = tiny_variables()

    def diagonal(leaf):
        own = np.arange(len(CHOICES))
        return leaf[own, own][None] if np.shape(leaf)[:2] == (3, 3) else leaf

    per_width = {
        group: {
            layer: {
                part: jax.tree.map(diagonal, leaves) if part.endswith("norm") else leaves
                for part, leaves in parts.items()
            }
            for layer, parts in tree.items()
        }
        for group, tree in variables.items()
    }
    one, other = traced(), traced(norm="per_width")
    for bits in CHOICES:
        policy = SPACE.uniform(bits, 6)
        logits = one(variables, images(), policy)
        np.testing.assert_array_equal(logits, other(per_width, images(), policy))
    mixed = POLICY
    assert (one(variables, images(), mixed) != other(per_width, images(), mixed)).any()


@functools.cache
def after_a_step():
    """Old and new statistics, and gradients, of a training step with POLICY."""
    model, variables = tiny(projection=True), tiny_variables(projection=True)

    def loss(params, bits):
        state = {**variables, "params": params}
        logits, new = model.apply(state, images(), bits=bits, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.square(logits)), new["batch_stats"]

    grads, new = jax.jit(jax.grad(loss, has_aux=True))(variables["params"], np.array(POLICY))
    return variables["batch_stats"], new, grads


def visited(layer):
    """Whether a step with POLICY uses each pair of a layer of the tiny network."""
    own = np.arange(len(CHOICES))
    place = tiny().names.index(layer)
    c = own == CHOICES.index(POLICY[place])
    p = own == CHOICES.index(POLICY[place - 1]) if place else np.array([True])
    return p[:, None] & c[None]


def norms(tree):
    """(layer, norm, tables) of each norm after the stem."""
    for layer in tiny().names:
        for part in tree[layer]:
            if part.endswith("norm"):
                yield layer, part, tree[layer][part]


def test_a_training_step_updates_the_visited_pairs_and_leaves_the_others_bit_for_bit():
    old, new, _ = after_a_step()
    for layer, part, tables in norms(new):
        for leaf in ("mean", "var", "count"):
            changed = np.asarray(tables[leaf]) != old[layer][part][leaf]
            changed = changed.reshape(*changed.shape[:2], -1)
            np.testing.assert_array_equal(changed.any(-1), visited(layer), f"{layer} {leaf}")
        np.testing.assert_array_equal(tables["count"], visited(layer).astype(int))


def test_only_the_visited_pairs_and_the_steps_in_use_get_a_gradient():
    *_, grads = after_a_step()
    for layer, part, tables in norms(grads):
        for leaf in ("scale", "bias"):
            moved = (np.asarray(tables[leaf]) != 0).any(-1)
            np.testing.assert_array_equal(moved, visited(layer), f"{layer} {part} {leaf}")
    for layer, bits in zip(tiny().names, POLICY, strict=True):
        moved = np.asarray(grads[layer]["input"]["step"]) != 0
        np.testing.assert_array_equal(moved, np.array(CHOICES) == bits)


def test_the_layer_after_the_stem_has_one_previous_width_and_the_others_all():
    stats = tiny_variables()["batch_stats"]
    tables = [stats[name]["conv_norm"]["count"].shape for name in tiny().names]
    assert tables == [(1, 3)] + 5 * [(3, 3)]
    assert stats["stem"]["conv_norm"]["count"].shape == (1, 1)


# --- step sizes ---


def test_the_first_step_sizes_come_from_the_images_given_to_init():
    model = tiny(weight_quantizer="independent", stage_sizes=(1,))
    x = images(8) * (1 + 3 * (images(8, shape=(1, 1, 1)) > 0))
    params = model.init(jax.random.key(0), x, bits=(4, 4))["params"]
    stem = oracle.convolve(x, params["stem"]["conv"]["kernel"])
    entered = oracle.relu((stem - stem.mean((0, 1, 2))) / np.sqrt(stem.var((0, 1, 2)) + 1e-5))
    layer = params["stage1.block1.conv1"]
    for index, bits in enumerate(CHOICES):
        unsigned, signed = (oracle.limits(bits, s)[1] for s in (False, True))
        expected = 2 * np.abs(entered).mean() / np.sqrt(unsigned)
        np.testing.assert_allclose(layer["input"]["step"][index], expected, rtol=1e-4)
        expected = 2 * np.abs(layer["conv"]["kernel"]).mean() / np.sqrt(signed)
        np.testing.assert_allclose(layer["conv"]["step"][index], expected, rtol=1e-4)


def test_the_shared_step_of_nested_weights_starts_as_that_of_the_widest():
    model = tiny(stage_sizes=(1,))
    layer = model.init(jax.random.key(0), images(), bits=(2, 2))["params"]["stage1.block1.conv2"]
    expected = 2 * np.abs(layer["conv"]["kernel"]).mean() / np.sqrt(7)
    np.testing.assert_allclose(layer["conv"]["step"], [expected], rtol=1e-5)


# --- the arithmetic ---


@pytest.mark.parametrize("first_last", ["int8", "float"])
def test_bfloat16_operands_give_the_very_logits_of_float32(first_last):
    variables = tiny_variables(first_last_layers=first_last)
    policy = POLICY
    logits = [
        traced(first_last_layers=first_last, compute_dtype=dtype)(variables, images(), policy)
        for dtype in ("float32", "bfloat16")
    ]
    np.testing.assert_array_equal(*logits)


def test_int8_ends_are_quantised_with_a_step_each():
    variables, apply = tiny_variables(first_last_layers="int8"), traced(first_last_layers="int8")
    params = variables["params"]
    for step in (
        params["stem"]["input"],
        params["stem"]["conv"],
        params["head_input"],
        params["head"],
    ):
        assert step["step"].shape == (1,)
    logits = apply(variables, images(), POLICY)
    assert np.isfinite(logits).all()
    # Changes far below an 8-bit step of the stem's input leave the logits as they are.
    nudged = images() + 1e-7 * float(params["stem"]["input"]["step"][0])
    np.testing.assert_array_equal(apply(variables, nudged, POLICY), logits)


def test_float_ends_have_no_step_sizes():
    params = tiny_variables()["params"]
    assert set(params["stem"]) == {"conv", "conv_norm"}
    assert set(params["head"]) == {"kernel", "bias"}


def test_a_baseline_takes_no_policy_and_has_no_widths():
    baseline = tiny().baseline()
    variables = trained(baseline)
    assert np.isfinite(jax.jit(baseline.apply)(variables, images())).all()
    assert "input" not in variables["params"]["stage1.block1.conv1"]
    with refused("no-widths"):
        _ = baseline.space


@pytest.mark.slow
def test_a_small_mobilenet_runs_mixed_policies():
    model = bm.create_model(
        "mobilenetv2", num_classes=5, space=SPACE, image_shape=(16, 16, 3), multiplier=0.25
    )
    x, variables = images(shape=(16, 16, 3)), trained(model)
    apply = jax.jit(lambda bits: model.apply(variables, x, bits=bits))
    logits = [apply(policy) for policy in random_policies(3, 51)]
    assert np.isfinite(logits).all()
    assert (logits[0] != logits[1]).any()


# --- mistakes ---


@pytest.mark.parametrize(
    ("name", "settings", "code", "mentions"),
    [
        ("resnet21", {}, "unknown-name", ("'resnet21'", "did you mean", "resnet20")),
        ("vgg", {}, "unknown-name", ("'vgg'", "one of resnet8")),
        (
            "resnet20",
            {"weight_quantzer": "floor"},
            "unknown-name",
            ("'weight_quantzer'", "did you mean weight_quantizer"),
        ),
        ("resnet20", {"multiplier": 2}, "unknown-name", ("'multiplier'", "resnet20")),
        ("resnet20", {"weight_quantizer": "flor"}, "bad-value", ("'flor'", "floor")),
        (
            "resnet20",
            {"first_last_layers": "int9"},
            "bad-value",
            ("first_last_layers", "'int9'", "int8"),
        ),
    ],
)
def test_create_model_refuses_what_it_does_not_know_and_names_the_nearest(
    name, settings, code, mentions
):
    with refused(code, *mentions):
        bm.create_model(name, num_classes=10, **settings)
