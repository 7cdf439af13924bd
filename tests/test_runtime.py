"""Runtime: the logits of model.apply at any policy, one compilation, many threads."""

import collections
import copy
import dataclasses
import gc
import re
import sys
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitmixer_jax import data
from bitmixer_jax.errors import UserError
from bitmixer_jax.loaded_model import from_variables
from bitmixer_jax.pairs import uncalibrated_pairs
from bitmixer_jax.runtime import Runtime
from bitmixer_jax.trained import load
from bitmixer_jax.training.checkpoints import digest

POLICY = np.asarray([4, 3, 2, 2, 3, 4], np.int32)
CLOSE = dict(rtol=1e-4, atol=1e-5)  # two programmes for the same numbers differ in rounding
BATCH = 8


@pytest.fixture(scope="module")
def runtime(trained):
    return Runtime.load(trained, batch_size=BATCH)


@pytest.fixture
def fresh(runtime):
    """The compiled runtime with its widest policy in force, whatever other tests did."""
    runtime.set_policy(4)
    return runtime


@pytest.fixture(scope="module")
def network(trained):
    """Network and variables at the end of training."""
    loaded = load(trained)
    return loaded.model, loaded.variables


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "test[:17]")


@pytest.fixture(scope="module")
def plain(network, digits):
    """``plain(policy)``: logits ``[17, 10]`` of all test images by model.apply."""
    model, variables = network

    @jax.jit
    def run(images, policy):
        x = data.normalize(images, digits.mean, digits.std)
        return model.apply(variables, x, bits=policy)

    def logits(policy):
        policy = jnp.asarray(policy, jnp.int32)
        parts = [run(digits.images[i : i + BATCH], policy) for i in (0, 8, 9)]
        return np.concatenate([parts[0], parts[1], parts[2][-1:]])

    return logits


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


@pytest.fixture
def compilations():
    """Names of what jax compiles, in the whole process."""
    found = []

    def listen(event, duration, **_):
        if "compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def drawn(runtime, number, seed):
    """Random policies int32 ``[number, L]``."""
    rng = np.random.default_rng(seed)
    size = (number, len(runtime.names))
    return rng.choice(runtime.space.choices, size=size).astype(np.int32)


def build(network, digits, **settings):
    model, variables = network
    about = dict(mean=digits.mean, std=digits.std, classes=digits.classes)
    return Runtime(from_variables(model, variables, **about), **settings)


# --- logits ---


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


def test_it_starts_at_the_widest_policy(network, digits):
    assert build(network, digits, batch_size=1).policy.tolist() == [4] * 6


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
    "policy",
    [5, True, 3.0, "3", None, [4] * 5, [5] * 6, [3.0] * 6, [[4] * 6] * 2, [[4], [4, 4]]],
    ids=str,
)
def test_a_policy_that_does_not_fit_is_refused(fresh, digits, policy):
    calls = [fresh.set_policy, fresh.check, fresh.specialize]
    if policy is not None:
        calls.append(lambda policy: fresh.predict(digits.images[:1], policy))
    for call in calls:
        with pytest.raises(UserError, match="policy: ") as caught:
            call(policy)
        assert len(str(caught.value).splitlines()) == 1
    assert fresh.policy.tolist() == [4] * 6


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_a_width_that_is_none_is_refused_each_time(fresh, dtype):
    for _ in range(3):
        with pytest.raises(UserError, match="width 5"):
            fresh.set_policy(np.asarray([4, 4, 4, 4, 4, 5], dtype))
        with pytest.raises(UserError, match="5 widths for a network of 6"):
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


def test_the_first_call_compiles_nothing(network, digits, compilations):
    runtime = build(network, digits, batch_size=2)
    assert runtime.traces == 1
    assert compilations
    compilations.clear()
    runtime.predict(digits.images[:3])
    assert (compilations, runtime.traces) == ([], 1)


def test_switches_move_no_weights(fresh, digits):
    held = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(fresh._weights)]
    for width in (2, 3, 4):
        fresh.set_policy(width)
        fresh.predict(digits.images[:1])
    after = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(fresh._weights)]
    assert held == after


def test_weights_are_freed_with_the_runtime(network, digits):
    runtime = build(network, digits, batch_size=1)
    runtime.predict(digits.images[:1], POLICY)
    gone = weakref.ref(runtime)
    del runtime
    gc.collect()
    assert gone() is None


# --- threads ---

POLICIES = ([4] * 6, [2] * 6, POLICY.tolist())


def race(runtime, images, switches):
    """Two threads switch while four predict: how often each of POLICIES answered, or "mixed"."""
    wanted = [runtime.predict(images, policy) for policy in POLICIES]
    seen: list = [collections.Counter() for _ in range(4)]
    running = [True, True]
    errors = []

    def switch(me):
        for i in range(switches):
            runtime.set_policy(POLICIES[(i + me) % 3])
            time.sleep(1e-4)  # lets the others in
        running[me] = False

    def predict(me):
        while any(running):
            logits = runtime.predict(images)
            equal = [i for i, each in enumerate(wanted) if np.array_equal(logits, each)]
            seen[me][equal[0] if len(equal) == 1 else "mixed"] += 1

    def guarded(work, me):
        try:
            work(me)
        except BaseException as error:
            errors.append(error)
            running[:] = [False, False]

    threads = [threading.Thread(target=guarded, args=(switch, i)) for i in range(2)]
    threads += [threading.Thread(target=guarded, args=(predict, i)) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    return sum(seen, collections.Counter())


def test_threads_that_predict_and_switch_never_mix_policies(fresh, digits, compilations):
    images = digits.images[: BATCH + 1]  # two calls of the programme, which must agree
    answers = race(fresh, images, switches=5000)
    assert set(answers) == {0, 1, 2}, answers
    assert compilations == []


class Torn(Runtime):
    """What must never be: a switch that others see half done."""

    def set_policy(self, policy):
        for layer, width in enumerate(policy):
            self._current.widths[layer] = width
            time.sleep(0.0005)


def test_a_policy_that_is_switched_layer_by_layer_would_be_caught(fresh, digits):
    torn = copy.copy(fresh)
    torn.__class__ = Torn
    torn._current = dataclasses.replace(torn._current, widths=POLICY.copy(), key=())
    assert race(torn, digits.images[:2], switches=40)["mixed"] > 0


def test_a_mix_of_two_policies_has_logits_of_its_own(fresh, digits):
    images = digits.images[:2]
    wanted = [fresh.predict(images, policy) for policy in POLICIES]
    for a in POLICIES:
        for b in POLICIES:
            for cut in range(1, 6):
                mixed = a[:cut] + b[cut:]
                if mixed not in POLICIES:
                    found = fresh.predict(images, mixed)
                    assert not any(np.allclose(found, each, atol=1e-3) for each in wanted)


# --- specialised programmes ---


@pytest.fixture(scope="module")
def two(network, digits):
    """A runtime that keeps two specialised programmes, and has had four."""
    runtime = build(network, digits, batch_size=2, specialized=2)
    general = {tuple(p): runtime.predict(digits.images, p) for p in ORDER}
    for policy in ORDER:
        runtime.specialize(policy)
    return runtime, general


ORDER = ([4] * 6, [2] * 6, POLICY.tolist())


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


def test_predict_uses_the_programme_of_the_policy_in_force(two, digits, monkeypatch):
    runtime, _ = two

    def general(*_):
        raise AssertionError("the programme for all policies ran")

    monkeypatch.setattr(runtime, "_any_policy", general)
    runtime.set_policy(runtime.specialized[0])
    assert runtime.predict(digits.images).shape == (17, 10)
    with pytest.raises(AssertionError, match="the programme for all policies"):
        runtime.predict(digits.images, [4, 4, 4, 4, 4, 2])


def test_specialising_at_once_compiles_once(two):
    runtime, _ = two
    before = runtime.traces
    threads = [threading.Thread(target=runtime.specialize, args=([2] * 5 + [4],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runtime.traces == before + 1


# --- what it refuses ---


@pytest.fixture(scope="module")
def young(trained):
    """Before any layer drew its own width: pairs of different widths were never visited."""
    return Runtime.load(f"{trained}@weights", batch_size=1)


def test_pairs_never_visited_are_refused(young, runtime, digits, compilations):
    calls = (
        young.set_policy,
        young.specialize,
        young.check,
        lambda p: young.predict(digits.images, p),
    )
    for call in calls:
        with pytest.raises(
            UserError, match=r"5 of its pairs .* never visited .* 4->3 bits at "
        ) as e:
            call([4, 3, 4, 3, 4, 3])
        assert len(str(e.value).splitlines()) == 1
    assert young.policy.tolist() == [4] * 6
    for width in (2, 3, 4):
        young.set_policy(width)
        assert young.predict(digits.images[:1]).shape == (1, 10)
    assert young.traces == 1
    assert young.network != runtime.weights_digest


def test_just_the_policies_that_evaluation_refuses_are_refused(young, network):
    stats = young._weights["batch_stats"]
    # Few random policies of six layers are uniform: most of these change their width just once.
    changes = [[a] * cut + [b] * (6 - cut) for a in (2, 3, 4) for b in (2, 3, 4) for cut in (1, 4)]
    refused = 0
    for policy in [*drawn(young, 10, 0).tolist(), *changes]:
        missing = uncalibrated_pairs(network[0], stats, np.asarray([policy]))
        try:
            young.check(policy)
            assert not missing
        except UserError:
            assert missing
            refused += 1
    assert 0 < refused < 28


def test_a_widest_policy_that_was_never_visited_is_refused_when_it_runs(network, digits):
    model, variables = network
    blank = jax.tree.map(lambda x: x, variables)
    name = model.names[2]
    count = blank["batch_stats"][name]["conv_norm"]["count"]
    blank["batch_stats"][name]["conv_norm"]["count"] = count.at[2, 2].set(0)
    runtime = build((model, blank), digits, batch_size=1)
    assert runtime.policy.tolist() == [4] * 6
    with pytest.raises(UserError, match=f"1 of its pairs .* 4->4 bits at {name}"):
        runtime.predict(digits.images)
    runtime.set_policy(3)
    assert runtime.predict(digits.images).shape == (17, 10)


def test_a_layer_without_a_width_before_it_says_any(network, digits):
    model, variables = network
    blank = jax.tree.map(lambda x: x, variables)
    first = blank["batch_stats"][model.names[0]]["conv_norm"]
    first["count"] = first["count"].at[0, 1].set(0)
    runtime = build((model, blank), digits, batch_size=1)
    with pytest.raises(UserError, match=r"any->3 bits at "):
        runtime.set_policy([3, 2, 2, 2, 2, 2])
    runtime.set_policy([2, 3, 3, 3, 3, 3])


def test_logits_that_are_not_finite_are_refused(network, digits):
    model, variables = network
    broken = jax.tree.map(lambda x: x, variables)
    broken["params"]["head"] = jax.tree.map(lambda x: x * jnp.nan, broken["params"]["head"])
    with pytest.raises(UserError, match="the logits are not finite"):
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
    with pytest.raises(UserError, match=r"give uint8 \(N, 8, 8, 1\), N at least 1") as caught:
        fresh.predict(images)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("setting", ["batch_size", "specialized"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_settings_that_are_no_counts_are_refused(network, digits, setting, value):
    with pytest.raises(UserError, match=f"{setting} = {value}: give a whole number, 1 or more"):
        build(network, digits, **{setting: value})


def test_a_float_twin_is_refused(trained_float):
    with pytest.raises(UserError, match="a float twin has no bit-widths"):
        Runtime.load(trained_float)


def test_a_workdir_without_a_run_is_refused(tmp_path, trained):
    with pytest.raises(UserError, match="no run here"):
        Runtime.load(tmp_path)
    with pytest.raises(UserError, match="no stage 'none'"):
        Runtime.load(f"{trained}@none")
