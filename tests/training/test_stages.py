"""Stages: which policies they draw, what is handed over, what a run starts from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitmixer_jax.models import create_model
from bitmixer_jax.pairs import fill_uncalibrated_pairs, pairs_used, uncalibrated_pairs
from bitmixer_jax.policy import BitSpace
from bitmixer_jax.training.stages import Stage, transfer_variables, update_mask
from tests.refusals import refused

SPACE = BitSpace((2, 3, 4))
L = 6


def small(**settings):
    return create_model(
        "resnet8", num_classes=3, image_shape=(8, 8, 1), width=4, **{"space": SPACE, **settings}
    )


def variables_of(model, seed=0):
    """Variables of the right shapes with arbitrary values: nothing is compiled."""
    bits = None if model.quant.space is None else (4,) * model.num_layers
    images = jnp.zeros((1, 8, 8, 1))
    shapes = jax.eval_shape(lambda key: model.init(key, images, bits=bits), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if leaf.dtype == jnp.int32:
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(rng.uniform(0.1, 1.0, leaf.shape), leaf.dtype)

    return jax.tree.map(fill, shapes)


def draws(stage, progress, number=300):
    keys = jax.random.split(jax.random.key(0), number)
    return np.asarray(jax.jit(jax.vmap(lambda key: stage.draw(key, SPACE, L, progress)))(keys))


def test_network_wide_stage_draws_one_width_for_all_layers():
    policies = draws(Stage(name="s", epochs=1), 0.7)
    assert policies.shape == (300, 1, L)
    assert (policies == policies[..., :1]).all()
    assert set(np.unique(policies)) == {2, 3, 4}


def test_rho_ramps_linearly_and_then_stays():
    stage = Stage(name="s", epochs=1, widths="layer", rho_start=0.2, rho_end=0.8, ramp=0.5)
    rho = [float(stage.rho(jnp.float32(p))) for p in (0.0, 0.25, 0.5, 1.0)]
    np.testing.assert_allclose(rho, [0.2, 0.5, 0.8, 0.8], rtol=1e-6)


def test_without_ramp_rho_is_at_its_end_from_the_start():
    stage = Stage(name="s", epochs=1, widths="layer", ramp=0.0)
    assert float(stage.rho(jnp.float32(0.0))) == 1.0


def test_layer_wise_stage_at_rho_zero_draws_what_the_network_wide_stage_draws():
    wide = Stage(name="wide", epochs=1)
    mixed = Stage(name="mixed", epochs=1, widths="layer", rho_end=0.0)
    np.testing.assert_array_equal(draws(wide, 0.5), draws(mixed, 0.5))


def test_layer_wise_stage_at_rho_one_reaches_every_pair_evenly():
    policies = draws(Stage(name="s", epochs=1, widths="layer", ramp=0.0), 1.0, 3000)[:, 0]
    pairs = np.stack([policies[:, :-1], policies[:, 1:]], -1).reshape(-1, 2)
    counts = np.unique(pairs, axis=0, return_counts=True)[1]
    assert len(counts) == 9
    expected = len(pairs) / 9
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)


def test_sum_starts_from_each_width_and_keeps_the_widest_uniform():
    stage = Stage(name="s", epochs=1, widths="layer", policies="sum", rho_start=0.5, rho_end=0.5)
    policies = draws(stage, 0.5)
    assert policies.shape[1] == SPACE.n
    assert (policies[:, 0] == 4).all()
    assert (policies[:, 2] == 2).mean() > 0.5


def test_sandwich_has_widest_drawn_and_narrowest():
    stage = Stage(name="s", epochs=1, widths="layer", policies="sandwich", draws=2, ramp=0.0)
    policies = draws(stage, 1.0)
    assert policies.shape[1] == 4
    assert (policies[:, 0] == 4).all()
    assert (policies[:, -1] == 2).all()
    assert set(np.unique(policies[:, 1:3])) == {2, 3, 4}


def test_block_selection_gives_the_layers_of_a_block_one_width():
    groups = (0, 0, 1, 1, 2, 2)
    stage = Stage(name="s", epochs=1, widths="layer", ramp=0.0)
    keys = jax.random.split(jax.random.key(3), 200)
    draw = jax.jit(jax.vmap(lambda key: stage.draw(key, SPACE, L, 1.0, groups)))
    policies = np.asarray(draw(keys))[:, 0]
    assert (policies[:, ::2] == policies[:, 1::2]).all()
    assert len(np.unique(policies[:, ::2], axis=0)) > 20


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantize", "weights"),
        ("widths", "both"),
        ("policies", "all"),
        ("distill", "self"),
        ("schedule", "linear"),
        ("ramp", 1.5),
        ("epochs", 0),
        ("draws", 0),
        ("temperature", -1.0),
    ],
)
def test_a_value_that_is_not_allowed_is_named(field, value):
    with refused("bad-value", "stage 's'", f"{field} = {value!r}"):
        Stage(**{"name": "s", "epochs": 1, field: value})


def test_distilling_from_the_widest_needs_it_in_each_step():
    with refused("conflict", '"widest"', '"sandwich"'):
        Stage(name="s", epochs=1, distill="widest")


def test_pairs_used_follow_the_policy():
    model = small()
    used = pairs_used(model, jnp.asarray([[2, 3, 4, 2, 2, 4]]))
    first, second, third = (np.asarray(used[layer.name]) for layer in model.layers[:3])
    np.testing.assert_array_equal(first, [[True, False, False]])
    assert np.argwhere(second).tolist() == [[0, 1]]
    assert np.argwhere(third).tolist() == [[1, 2]]


def test_selected_marks_the_slices_a_policy_uses_and_no_other():
    model = small(weight_quantizer="independent")
    params = variables_of(model)["params"]
    masks = update_mask(model, params, jnp.asarray([[2, 3, 4, 2, 2, 4]]))
    layer = masks[model.names[1]]
    np.testing.assert_array_equal(layer["input"]["step"], [False, True, False])
    np.testing.assert_array_equal(layer["conv"]["step"], [False, True, False])
    assert np.argwhere(layer["conv_norm"]["scale"][..., 0]).tolist() == [[0, 1]]
    assert bool(layer["conv"]["kernel"])
    assert bool(masks["head"]["bias"])


def test_handover_copies_the_diagonal_to_unvisited_pairs_only():
    model = small()
    variables = jax.tree.map(jnp.array, variables_of(model))
    name = model.names[1]
    rng = np.random.default_rng(0)
    for tree in (variables["params"], variables["batch_stats"]):
        norm = tree[name]["conv_norm"]
        for leaf in set(norm) - {"count"}:
            norm[leaf] = jnp.asarray(rng.normal(size=norm[leaf].shape), jnp.float32)
    count = jnp.asarray([[5, 7, 0], [0, 5, 0], [0, 0, 0]], jnp.int32)
    variables["batch_stats"][name]["conv_norm"]["count"] = count
    filled = fill_uncalibrated_pairs(variables, model.layers)
    for collection in ("params", "batch_stats"):
        old, new = variables[collection][name]["conv_norm"], filled[collection][name]["conv_norm"]
        for leaf in set(old) - {"count"}:
            want = np.array(old[leaf])
            want[1, 0] = want[2, 0] = want[0, 0]  # own width 2: from [2, 2]
            want[2, 1] = want[1, 1]  # [2, 3] was visited and stays
            np.testing.assert_array_equal(new[leaf], want)  # [4, 4] unvisited: column 4 stays
    np.testing.assert_array_equal(filled["batch_stats"][name]["conv_norm"]["count"], count)


def test_never_visited_names_layer_and_widths():
    model = small()
    stats = variables_of(model)["batch_stats"]
    stats = jax.tree.map(lambda x: jnp.ones_like(x), stats)
    name = model.names[2]
    stats[name]["conv_norm"]["count"] = stats[name]["conv_norm"]["count"].at[0, 2].set(0)
    assert uncalibrated_pairs(model, stats, np.asarray([[2, 2, 4, 2, 2, 2]])) == [(name, 2, 4)]
    assert uncalibrated_pairs(model, stats, np.asarray([[2, 3, 4, 2, 2, 2]])) == []


def test_starting_from_a_baseline_spreads_its_bn_and_keeps_step_sizes():
    model = small()
    source, target = variables_of(model.baseline(), seed=5), variables_of(model)
    plain = source["params"][model.names[1]]["conv_norm"]["scale"]
    started = transfer_variables(source, target)
    name = model.names[1]
    np.testing.assert_array_equal(
        started["params"][name]["conv"]["kernel"], source["params"][name]["conv"]["kernel"]
    )
    np.testing.assert_array_equal(
        started["params"][name]["conv_norm"]["scale"], np.broadcast_to(plain, (3, 3, 4))
    )
    np.testing.assert_array_equal(
        started["params"][name]["input"]["step"], target["params"][name]["input"]["step"]
    )
    assert (np.asarray(started["batch_stats"][name]["conv_norm"]["count"]) == 0).all()


def test_bn_per_width_takes_the_diagonal_of_a_transitional_one_and_spreads_back():
    model = small()
    per_width = small(norm="per_width")
    source = variables_of(model)
    name = model.names[1]
    table = jnp.arange(36.0, dtype=jnp.float32).reshape(3, 3, 4)
    source["params"][name]["conv_norm"]["scale"] = table
    per_width = transfer_variables(source, variables_of(per_width))
    got = per_width["params"][name]["conv_norm"]["scale"]
    np.testing.assert_array_equal(got, np.asarray(table)[[0, 1, 2], [0, 1, 2]][None])
    spread = transfer_variables(per_width, variables_of(model))["params"][name]["conv_norm"][
        "scale"
    ]
    np.testing.assert_array_equal(spread, np.broadcast_to(got, (3, 3, 4)))


def test_another_network_is_refused_with_the_first_difference():
    source = variables_of(small())
    wider = create_model("resnet8", num_classes=3, image_shape=(8, 8, 1), width=8, space=SPACE)
    with refused("other-network"):
        transfer_variables(source, variables_of(wider))


def test_quantization_of_a_stage():
    base = small().quant
    real = Stage(name="s", epochs=1, quantize="activations").quant_config(base)
    assert (real.activations, real.weights) == (True, False)
    assert Stage(name="s", epochs=1).quant_config(base) == dataclasses.replace(base)
