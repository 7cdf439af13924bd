"""Widths and samplers of policies."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import bitmixer_jax as bm
from tests.refusals import refused

SPACE = bm.BitSpace((2, 3, 4))
NAMES = ("stage1.conv1", "stage1.conv2", "stage2.conv1")


def draw(sampler, count, *args, seed=0, **settings):
    """[count, L] policies, each from a key of its own."""
    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: sampler(key, *args, **settings)))(keys))


def looks_uniform(values, categories):
    """Chi-squared test at one in ten thousand."""
    counts = [np.sum(values == c) for c in categories]
    assert sum(counts) == values.size
    return scipy.stats.chisquare(counts).pvalue > 1e-4


# --- BitSpace ---


@pytest.mark.parametrize(
    "choices",
    [(), (3, 2), (2, 2), (1, 2), (0,), (8, 9), (-2,), (2.0, 3), (True, 2), ("2",), "234", 3],
)
def test_bitspace_refuses_choices_that_are_not_ascending_whole_numbers_from_2_to_8(choices):
    with refused("bad-value", repr(choices)):
        bm.BitSpace(choices)


def test_bitspace_refuses_one_bit_for_a_reason_of_its_own():
    with refused("bad-value", (1, 2)) as caught:
        bm.BitSpace((1, 2))
    assert "2..8" not in str(caught.value)
    with refused("bad-value", (0, 2), "2..8"):
        bm.BitSpace((0, 2))


def test_bitspace_keeps_lists_and_numpy_integers_as_a_tuple_of_ints():
    space = bm.BitSpace([np.int64(2), 4, 8])
    assert space.choices == (2, 4, 8)
    assert all(type(c) is int for c in space.choices)
    assert (space.n, space.narrowest, space.widest) == (3, 2, 8)
    assert hash(space) == hash(bm.BitSpace((2, 4, 8)))


def test_uniform_gives_every_layer_the_width():
    policy = SPACE.uniform(3, 5)
    assert policy.dtype == np.int32
    assert policy.tolist() == [3] * 5


@pytest.mark.parametrize(
    ("width", "code"),
    [(1, "policy-width"), (5, "policy-width"), (2.7, "policy-form"), (True, "policy-form")],
)
def test_uniform_refuses_a_width_that_is_not_a_choice(width, code):
    with refused(code, width, (2, 3, 4)):
        SPACE.uniform(width, 5)


@pytest.mark.parametrize(
    ("policy", "code", "mentions"),
    [
        ([4, 3], "policy-length", (2, 3)),
        ([4, 3, 2, 2], "policy-length", (4, 3)),
        ([4, 3, 5], "policy-width", (5, (2, 3, 4))),
        *(
            (policy, "policy-form", (repr(policy), (2, 3, 4)))
            for policy in (
                *([4, 3, 2.0], [4, 3, None], "432", 4, [[[4, 3, 2]]], [[4, 3, 2], [4, 3]]),
                *([True, True, True], [4, 3, 2**70]),
            )
        ),
    ],
)
def test_check_refuses_what_is_not_one_width_per_layer(policy, code, mentions):
    with refused(code, *mentions):
        SPACE.check(policy, 3)


def test_check_names_the_width_and_the_layer_at_fault():
    with refused("policy-width", 7, 1, (2, 3, 4)):
        SPACE.check([4, 7, 2], 3)


def test_check_takes_one_policy_or_a_stack_of_them():
    assert SPACE.check((4, 3, 2), 3).dtype == np.int32
    assert SPACE.check(jnp.array([[4, 3, 2], [2, 2, 2]]), 3).tolist() == [[4, 3, 2], [2, 2, 2]]


def test_index_is_the_place_among_the_choices_static_and_traced():
    space = bm.BitSpace((2, 4, 8))
    assert [space.index(w) for w in space.choices] == [0, 1, 2]
    traced = jax.jit(space.index)(jnp.array([8, 2, 4], jnp.int32))
    assert traced.dtype == jnp.int32
    assert traced.tolist() == [2, 0, 1]


def test_valid_tells_a_traced_unknown_width():
    valid = jax.jit(SPACE.valid)
    assert bool(valid(jnp.array([4, 3, 2])))
    assert not bool(valid(jnp.array([4, 5, 2])))


# --- samplers ---


def test_sample_uniform_gives_one_width_for_all_layers_each_as_often():
    policies = draw(bm.sample_uniform, 3000, SPACE, 4)
    assert (policies == policies[:, :1]).all()
    assert looks_uniform(policies[:, 0], SPACE.choices)


def test_sample_random_gives_every_policy_as_often():
    policies = draw(bm.sample_random, 3000, SPACE, 3)
    rank = (policies - 2) @ np.array([9, 3, 1])
    assert looks_uniform(rank, range(27))


def test_sample_random_gives_the_layers_of_a_group_one_width_and_groups_their_own():
    policies = draw(bm.sample_random, 3000, SPACE, 5, groups=(0, 0, 1, 2, 2))
    assert (policies[:, 0] == policies[:, 1]).all()
    assert (policies[:, 3] == policies[:, 4]).all()
    rank = (policies[:, (0, 2, 3)] - 2) @ np.array([9, 3, 1])
    assert looks_uniform(rank, range(27))


@pytest.fixture(scope="module")
def mixed():
    """``mixed(rho)``: policies [3000, 3]; rho is traced, so one programme serves all tests."""
    keys = jax.random.split(jax.random.key(0), 3000)

    @jax.jit
    def sample(rho):
        return jax.vmap(lambda key: bm.sample_mixed(key, SPACE, 3, rho))(keys)

    return lambda rho: np.asarray(sample(rho))


def test_sample_mixed_without_rho_is_network_wide(mixed):
    policies = mixed(0.0)
    assert (policies == policies[:, :1]).all()
    assert looks_uniform(policies[:, 0], SPACE.choices)


def test_sample_mixed_with_rho_one_draws_each_layer_by_itself(mixed):
    rank = (mixed(1.0) - 2) @ np.array([9, 3, 1])
    assert looks_uniform(rank, range(27))


def test_sample_mixed_in_between_leaves_each_layer_on_the_network_width_as_often(mixed):
    rho = 0.4
    policies = mixed(rho)
    # Two layers agree if both stay, or by chance (1 in 3) if either departs.
    share = (1 - rho) ** 2 + (1 - (1 - rho) ** 2) / 3
    tolerance = 5 * np.sqrt(share * (1 - share) / len(policies))
    assert abs(np.mean(policies[:, 0] == policies[:, 2]) - share) < tolerance


def test_sample_mixed_departs_from_the_given_network_width_with_probability_rho():
    rho, count = 0.4, 6000
    policies = draw(bm.sample_mixed, count // 3, SPACE, 3, rho, base_width=4)
    share = rho / 3  # a layer that departs draws among three widths
    for width in (2, 3):
        tolerance = 5 * np.sqrt(share * (1 - share) / count)
        assert abs(np.mean(policies == width) - share) < tolerance


def test_sample_mixed_lets_the_layers_of_a_group_depart_together():
    policies = draw(bm.sample_mixed, 500, SPACE, 4, 0.5, groups=(0, 0, 1, 1), base_width=4)
    assert (policies[:, 0] == policies[:, 1]).all()
    assert (policies[:, 2] == policies[:, 3]).all()
    assert (policies[:, 0] != policies[:, 2]).any()


def test_sample_average_hits_the_sum_and_gives_every_policy_of_that_sum_as_often():
    all_of_it = [p for p in itertools.product((2, 3, 4), repeat=4) if sum(p) == 12]
    keys = jax.random.split(jax.random.key(0), 600)
    seen = collections.Counter(
        tuple(bm.sample_average(key, SPACE, 4, 3.0).tolist()) for key in keys
    )
    assert set(seen) == set(all_of_it)
    assert scipy.stats.chisquare([seen[p] for p in all_of_it]).pvalue > 1e-4


def test_sample_average_counts_the_layers_of_a_group_together():
    groups = (0, 0, 1, 2)
    all_of_it = {
        (a, a, b, c) for a, b, c in itertools.product((2, 3, 4), repeat=3) if 2 * a + b + c == 13
    }
    keys = jax.random.split(jax.random.key(1), 100)
    seen = [tuple(bm.sample_average(key, SPACE, 4, 3.25, groups).tolist()) for key in keys]
    assert set(seen) == all_of_it


@pytest.mark.parametrize("average", [2.0, 2.49, 3.0, 3.51, 4.0])
def test_sample_average_of_a_deep_network_has_the_nearest_whole_sum(average):
    policy = bm.sample_average(jax.random.key(2), SPACE, 100, average)
    assert policy.dtype == np.int32
    assert policy.sum() == round(100 * average)
    SPACE.check(policy, 100)


def test_sample_average_depends_on_its_key_alone():
    first, again = (bm.sample_average(jax.random.key(3), SPACE, 30, 3.0) for _ in range(2))
    other = bm.sample_average(jax.random.key(4), SPACE, 30, 3.0)
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("choices", "average"), [((2, 3, 4), 1.0), ((2, 3, 4), 4.5), ((2, 4, 8), 3.0), ((2, 3), -1.0)]
)
def test_sample_average_refuses_an_average_that_no_policy_has(choices, average):
    with refused("out-of-reach", average, 3, f"[{choices[0]}, {choices[-1]}]"):
        bm.sample_average(jax.random.key(0), bm.BitSpace(choices), 3, average)
