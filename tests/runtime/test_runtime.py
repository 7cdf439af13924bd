"""Runtime: the logits of model.apply at any policy, and one compilation for all."""

import collections
import gc
import re
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitmixer_jax.loaded_model import Predictor, from_variables
from bitmixer_jax.training.checkpoints import digest
from tests.refusals import refused
from tests.runtime.builds import BATCH, CLOSE, POLICY, build, drawn


@pytest.fixture
def ran(monkeypatch):
    """The compiled programmes that run, in order."""
    found, run = [], Predictor.run

    def record(self, images, policy):
        found.append(self)
        return run(self, images, policy)

    monkeypatch.setattr(Predictor, "run", record)
    return found


# --- logits ---


def test_real_values_alone_are_multiplied_at_the_highest_precision(network):
    """On accelerators the default is less than float32: exact for codes, not for stem and head."""
    model, variables = network
    runnable = from_variables(model, variables, mean=[0], std=[1], classes=("a",))
    programme = str(
        jax.make_jaxpr(runnable.forward)(
            runnable.weights, jnp.zeros((1, *model.image_shape)), jnp.full(6, 3)
        )
    )
    found = collections.Counter(re.findall(r"precision=.*?Precision.(\w+)", programme))
    assert found == {"DEFAULT": 6, "HIGHEST": 2}


@pytest.mark.parametrize("policy", [[2] * 6, [3] * 6, [4] * 6, POLICY, [2, 4, 2, 4, 3, 3]])
def test_logits_are_those_of_a_plain_forward_pass(fresh, plain, digits, policy):
    wanted = plain(policy)
    found = fresh.predict(digits.images, policy)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, **CLOSE)
    fresh.set_policy(policy)
    assert np.array_equal(fresh.predict(digits.images), found)


@pytest.mark.parametrize("number", [1, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH, 2 * BATCH + 1])
def test_any_number_of_images(fresh, plain, digits, compilations, number):
    found = fresh.predict(digits.images[:number], POLICY)
    assert found.shape == (number, 10)
    np.testing.assert_allclose(found, plain(POLICY)[:number], **CLOSE)


def test_policies_give_different_logits(plain):
    assert not np.allclose(plain([4] * 6), plain([2] * 6), atol=0.05)
    assert not np.allclose(plain([4] * 6), plain(POLICY), atol=0.05)


def test_images_need_not_be_contiguous(fresh, digits):
    backwards = fresh.predict(digits.images[::-1], POLICY)
    assert np.array_equal(backwards[::-1][:1], fresh.predict(digits.images[:1], POLICY))


def test_logits_belong_to_the_caller(fresh, digits):
    first = fresh.predict(digits.images[:1])
    first[:] = 0
    assert fresh.predict(digits.images[:1]).any()


def test_classes_names_and_network_are_those_of_the_workdir(runtime, network):
    model, variables = network
    assert runtime.classes == tuple("0123456789")
    assert runtime.names == model.names
    assert runtime.space == model.space
    assert runtime.weights_digest == digest(variables)


# --- policies ---


def test_set_policy_takes_one_width_or_one_per_layer(fresh):
    for given, wanted in ((2, [2] * 6), (np.int64(3), [3] * 6), (POLICY.tolist(), POLICY.tolist())):
        fresh.set_policy(given)
        assert fresh.policy.dtype == np.int32
        assert fresh.policy.tolist() == wanted


def test_a_policy_of_one_call_leaves_the_one_in_force(fresh, digits):
    before = fresh.predict(digits.images[:1])
    fresh.predict(digits.images[:1], policy=2)
    assert fresh.policy.tolist() == [4] * 6
    assert np.array_equal(fresh.predict(digits.images[:1]), before)


def test_the_policy_in_force_cannot_be_changed_from_outside(fresh):
    mine = POLICY.copy()
    fresh.set_policy(mine)
    mine[:] = 2
    fresh.policy[:] = 2
    fresh.check(POLICY)[:] = 2
    assert fresh.policy.tolist() == POLICY.tolist()
    fresh.set_policy(POLICY)
    assert fresh.policy.tolist() == POLICY.tolist()


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        *((policy, "policy-form") for policy in (True, 3.0, "3", None, [3.0] * 6)),
        *((policy, "policy-form") for policy in ([[4] * 6] * 2, [[4], [4, 4]])),
        *((5, "policy-width"), ([5] * 6, "policy-width"), ([4] * 5, "policy-length")),
    ],
    ids=str,
)
def test_a_policy_that_does_not_fit_is_refused(fresh, digits, policy, code):
    calls = [fresh.set_policy, fresh.check, fresh.specialize]
    if policy is not None:
        calls.append(lambda policy: fresh.predict(digits.images[:1], policy))
    for call in calls:
        with refused(code):
            call(policy)
    assert fresh.policy.tolist() == [4] * 6


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_a_width_that_is_none_is_refused_each_time(fresh, dtype):
    for _ in range(3):
        with refused("policy-width", 5, (2, 3, 4)):
            fresh.set_policy(np.asarray([4, 4, 4, 4, 4, 5], dtype))
        with refused("policy-length", 5, 6):
            fresh.set_policy(np.asarray([4] * 5, dtype))


# --- compilations ---


def test_a_thousand_switches_compile_nothing(fresh, digits, compilations):
    policies = drawn(fresh, 1000, seed=5)
    compilations.clear()
    before, cached = fresh.traces, fresh.specialized
    answers = set()
    for i, policy in enumerate(policies):
        fresh.set_policy(policy)
        number = (1, BATCH, BATCH + 1)[i % 3]
        answers.add(fresh.predict(digits.images[:number])[0].tobytes())
    assert compilations == []
    assert (fresh.traces, fresh.specialized) == (before, cached)
    assert len(answers) > 300  # of 729 policies
    jax.jit(lambda x: x * 3)(np.zeros(1009))
    assert compilations  # one would have been seen


def test_it_starts_at_the_widest_policy_and_the_first_call_compiles_nothing(
    network, digits, compilations
):
    runtime = build(network, digits, batch_size=2)
    assert runtime.policy.tolist() == [4] * 6
    assert runtime.traces == 1
    assert compilations
    compilations.clear()
    runtime.predict(digits.images[:3])
    assert (compilations, runtime.traces) == ([], 1)


def test_switches_move_no_weights(fresh, digits, ran):
    places = []
    for width in (4, 2, 3, 4):
        fresh.set_policy(width)
        fresh.predict(digits.images[:1])
        leaves = jax.tree.leaves(ran[-1].weights)
        places.append([leaf.unsafe_buffer_pointer() for leaf in leaves])
    assert len(places[0]) > 6
    assert places == [places[0]] * 4


def test_weights_are_freed_with_the_runtime(network, digits):
    runtime = build(network, digits, batch_size=1)
    runtime.predict(digits.images[:1], POLICY)
    gone = weakref.ref(runtime)
    del runtime
    gc.collect()
    assert gone() is None


# --- specialised programmes ---


ORDER = ([4] * 6, [2] * 6, POLICY.tolist())


@pytest.fixture(scope="module")
def two(network, digits):
    """A runtime that keeps two specialised programmes, and has had four."""
    runtime = build(network, digits, batch_size=2, specialized=2)
    general = {tuple(p): runtime.predict(digits.images, p) for p in ORDER}
    for policy in ORDER:
        runtime.specialize(policy)
    return runtime, general


def test_specialised_programmes_give_the_same_logits(two, digits):
    runtime, general = two
    for policy in runtime.specialized:
        found = runtime.predict(digits.images, policy)
        np.testing.assert_allclose(found, general[policy], **CLOSE)


def test_specialised_programmes_are_bounded(two):
    runtime, _ = two
    assert set(runtime.specialized) == {tuple(p) for p in ORDER[1:]}
    assert runtime.traces == 1 + len(ORDER)


def test_the_programme_that_was_not_used_for_longest_is_evicted(two, digits, compilations):
    runtime, general = two
    older, newer = runtime.specialized
    runtime.predict(digits.images[:1], older)
    assert runtime.specialized == (newer, older)
    runtime.specialize(newer)  # it is there: the look-up alone counts
    assert runtime.specialized == (older, newer)
    assert compilations == []
    runtime.specialize([3] * 6)
    assert runtime.specialized == (newer, (3,) * 6)
    found = runtime.predict(digits.images, older)  # by the programme for all
    assert np.array_equal(found, general[older])


def test_predict_uses_the_programme_of_the_policy_in_force(two, digits, ran):
    runtime, _ = two
    for policy in ([4, 4, 4, 4, 4, 2], [2, 4, 4, 4, 4, 4]):
        runtime.predict(digits.images, policy)
    for policy in runtime.specialized:
        runtime.set_policy(policy)
        assert runtime.predict(digits.images).shape == (17, 10)
    one, again, *own = ran
    assert one is again
    assert len({id(programme) for programme in (one, *own)}) == 3


def test_specialising_at_once_compiles_once(two):
    runtime, _ = two
    before = runtime.traces
    threads = [threading.Thread(target=runtime.specialize, args=([2] * 5 + [4],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runtime.traces == before + 1
