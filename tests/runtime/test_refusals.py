"""What a Runtime refuses: pairs never visited, images and settings that do not fit, baselines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitmixer_jax.pairs import uncalibrated_pairs
from bitmixer_jax.runtime import Runtime
from bitmixer_jax.trained import load
from tests.refusals import refused
from tests.runtime.builds import build, drawn


def test_pairs_never_visited_are_refused(young, runtime, digits, compilations):
    calls = (
        young.set_policy,
        young.specialize,
        young.check,
        lambda p: young.predict(digits.images, p),
    )
    for call in calls:
        with refused("uncalibrated", [4, 3, 4, 3, 4, 3], 5, "4->3", young.names[1]):
            call([4, 3, 4, 3, 4, 3])
    assert young.policy.tolist() == [4] * 6
    for width in (2, 3, 4):
        young.set_policy(width)
        assert young.predict(digits.images[:1]).shape == (1, 10)
    assert young.traces == 1
    assert young.weights_digest != runtime.weights_digest


def test_just_the_policies_that_evaluation_refuses_are_refused(young, trained, network):
    stats = load(f"{trained}@weights").variables["batch_stats"]
    # Few random policies of six layers are uniform: most of these change their width just once.
    changes = [[a] * cut + [b] * (6 - cut) for a in (2, 3, 4) for b in (2, 3, 4) for cut in (1, 4)]
    found = 0
    for policy in [*drawn(young, 10, 0).tolist(), *changes]:
        missing = uncalibrated_pairs(network[0], stats, np.asarray([policy]))
        if missing:
            with refused("uncalibrated", policy, len(missing)):
                young.check(policy)
            found += 1
        else:
            assert young.check(policy).tolist() == policy
    assert 0 < found < 28


def test_a_widest_policy_that_was_never_visited_is_refused_when_it_runs(network, digits):
    model, variables = network
    blank = jax.tree.map(lambda x: x, variables)
    name = model.names[2]
    count = blank["batch_stats"][name]["conv_norm"]["count"]
    blank["batch_stats"][name]["conv_norm"]["count"] = count.at[2, 2].set(0)
    runtime = build((model, blank), digits, batch_size=1)
    assert runtime.policy.tolist() == [4] * 6
    with refused("uncalibrated", [4] * 6, 1, "4->4", name):
        runtime.predict(digits.images)
    runtime.set_policy(3)
    assert runtime.predict(digits.images).shape == (17, 10)


def test_a_layer_without_a_width_before_it_says_any(network, digits):
    model, variables = network
    blank = jax.tree.map(lambda x: x, variables)
    first = blank["batch_stats"][model.names[0]]["conv_norm"]
    first["count"] = first["count"].at[0, 1].set(0)
    runtime = build((model, blank), digits, batch_size=1)
    with refused("uncalibrated", "any->3", model.names[0]):
        runtime.set_policy([3, 2, 2, 2, 2, 2])
    runtime.set_policy([2, 3, 3, 3, 3, 3])


def test_logits_that_are_not_finite_are_refused(network, digits):
    model, variables = network
    broken = jax.tree.map(lambda x: x, variables)
    broken["params"]["head"] = jax.tree.map(lambda x: x * jnp.nan, broken["params"]["head"])
    with refused("not-finite", [4] * 6):
        build((model, broken), digits, batch_size=1).predict(digits.images[:1])


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 1), np.float32),
        np.zeros((2, 8, 8, 1), np.int64),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((2, 9, 8, 1), np.uint8),
        np.zeros((0, 8, 8, 1), np.uint8),
        np.uint8(3),
        [np.zeros((8, 8, 1), np.uint8), np.zeros((9, 8, 1), np.uint8)],
        None,
        "image.png",
    ],
    ids=lambda images: f"{np.shape(images) if isinstance(images, np.ndarray) else type(images)}",
)
def test_images_that_do_not_fit_are_refused(fresh, images):
    with refused("bad-shape", "uint8 (N, 8, 8, 1)"):
        fresh.predict(images)


@pytest.mark.parametrize("setting", ["batch_size", "specialized"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_settings_that_are_no_counts_are_refused(network, digits, setting, value):
    with refused("bad-value", f"{setting} = {value}"):
        build(network, digits, **{setting: value})


def test_a_float_twin_is_refused(trained_float):
    with refused("no-widths", trained_float):
        Runtime.load(trained_float)


def test_a_workdir_without_a_run_is_refused(tmp_path, trained):
    with refused("no-run", tmp_path, "config.json"):
        Runtime.load(tmp_path)
    with refused("no-run", trained, "'none'", "activations, weights, mixed"):
        Runtime.load(f"{trained}@none")
