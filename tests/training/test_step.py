"""The training step: gradients reach what they should, and nothing else moves."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitmixer_jax.distributed import replicate
from bitmixer_jax.models import create_model
from bitmixer_jax.pairs import pairs_used
from bitmixer_jax.policy import BitSpace
from bitmixer_jax.training.losses import cross_entropy, distillation
from bitmixer_jax.training.optimizer import (
    OptimizerSettings,
    apply_masked,
    kernels_only,
    limit_step_sizes,
    make_optimizer,
    schedule,
)
from bitmixer_jax.training.schedule import init
from bitmixer_jax.training.stages import Stage
from bitmixer_jax.training.step import ParallelStep, StepSettings, TrainState, make_train_step

SPACE = BitSpace((2, 3, 4))
B = 16
SGD = OptimizerSettings()
DECAYING = OptimizerSettings(momentum=0.9, weight_decay=0.01)
LAYER_WISE = Stage(
    name="s", epochs=1, widths="layer", ramp=0.0, schedule="constant", learning_rate=0.05
)


def network():
    """One residual block: two quantised layers, so that it compiles fast."""
    return create_model(
        "resnet8", num_classes=3, image_shape=(8, 8, 1), width=4, stage_sizes=(1,), space=SPACE
    )


def images():
    """The data of the tiny network."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (64, 8, 8, 1), np.uint8),
        "label": rng.integers(0, 3, 64, np.int32),
    }


@functools.cache
def first_variables():
    model, x = network(), (images()["image"][:B].astype(np.float32) - 128) / 64
    return jax.jit(lambda key: init(model, key, jnp.asarray(x)))(jax.random.key(0))


@functools.cache
def spread_step(stage, optimizer, devices, most, changes):
    """The compiled step, once for all tests of the same settings."""
    tx = make_optimizer(optimizer, stage, 100)
    fixed = dict(seed=0, start=0, steps=100, batch_size=B, mean=(128.0,), std=(64.0,), pad=1)
    settings = StepSettings(**{**fixed, **dict(changes)})
    return tx, ParallelStep(make_train_step(network(), stage, tx, settings), list(devices), most)


def setting(stage, optimizer=SGD, devices=None, most=1, **changes):
    """A step, a fresh state and data for a tiny network; the pieces a loop would hold."""
    devices = devices or jax.devices()[:1]
    tx, step = spread_step(stage, optimizer, tuple(devices), most, tuple(changes.items()))
    variables = jax.tree.map(jnp.array, first_variables())
    state = TrainState(
        jnp.int32(0), variables["params"], variables["batch_stats"], tx.init(variables["params"])
    )
    return network(), step, replicate(state, devices), replicate(images(), devices)


def rows(number, start=0):
    return (np.arange(number * B, dtype=np.int32).reshape(number, B) + start * B) % 64


def changed(old, new):
    return jax.tree.map(lambda a, b: np.asarray(a) != np.asarray(b), old, new)


def test_unselected_slices_do_not_move_under_momentum_and_weight_decay():
    model, step, state, data = setting(LAYER_WISE, DECAYING, pad=0)
    for number in range(6):
        before = jax.device_get(state)
        state, _ = step(state, data, rows(1, number))
        after = jax.device_get(state)
        # Which policy was drawn shows in the visit counts; the rest must agree with it.
        for layer in model.layers:
            counts = [s.batch_stats[layer.name]["conv_norm"]["count"] for s in (before, after)]
            used = counts[1] > counts[0]
            assert used.sum() == 1
            for tree in ("scale", "bias"):
                moved = (
                    before.params[layer.name]["conv_norm"][tree]
                    != after.params[layer.name]["conv_norm"][tree]
                )
                assert not moved[~used].any()
                assert moved[used].any()
            for tree in ("mean", "var"):
                moved = (
                    before.batch_stats[layer.name]["conv_norm"][tree]
                    != after.batch_stats[layer.name]["conv_norm"][tree]
                )
                assert not moved[~used].any()
            steps = [s.params[layer.name]["input"]["step"] for s in (before, after)]
            assert not (steps[0] != steps[1])[~used.any(0)].any()
    # The optimiser's memory of unvisited slices is still zero.
    traces = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.shape == (3, 3, 4)]
    counts = [after.batch_stats[layer.name]["conv_norm"]["count"] for layer in model.layers[1:2]]
    assert traces
    assert (counts[0] == 0).any()
    assert any((trace[counts[0] == 0] == 0).all() for trace in traces)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_selected_updates_leave_the_rest_bit_for_bit_also_in_the_optimiser(name):
    tx = make_optimizer(
        OptimizerSettings(name=name, weight_decay=0.0 if name == "adam" else 0.1),
        Stage(name="s", epochs=1, schedule="constant"),
        10,
    )
    params = {"layer": {"kernel": jnp.ones((4,))}}
    masks = {"layer": {"kernel": jnp.asarray([True, False, True, False])}}
    state = tx.init(params)
    grads = {"layer": {"kernel": jnp.full((4,), 0.5)}}
    for _ in range(3):
        params, state = apply_masked(tx, grads, state, params, masks)
    kernel = np.asarray(params["layer"]["kernel"])
    assert (kernel[[1, 3]] == 1).all()
    assert (kernel[[0, 2]] != 1).all()
    for leaf in jax.tree.leaves(state):
        if leaf.shape == (4,):
            assert (np.asarray(leaf)[[1, 3]] == 0).all()


def test_a_step_size_moves_by_at_most_a_tenth_and_stays_positive():
    tx = optax.chain(optax.sgd(1.0), limit_step_sizes(0.1))
    params = {"conv": {"step": jnp.asarray([1.0, 0.01]), "kernel": jnp.asarray([1.0])}}
    grads = {"conv": {"step": jnp.asarray([50.0, 0.0005]), "kernel": jnp.asarray([50.0])}}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["conv"]["step"], [-0.1, -0.0005], rtol=1e-6)
    np.testing.assert_allclose(updates["conv"]["kernel"], [-50.0])


def test_weight_decay_is_for_kernels_only():
    tree = {"conv": {"kernel": 1, "step": 1}, "norm": {"scale": 1, "bias": 1}, "head": {"bias": 1}}
    flat = jax.tree.leaves(kernels_only(tree))
    assert sum(flat) == 1
    assert kernels_only(tree)["conv"]["kernel"] is True


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_where_gradients_are_zero_kernels_alone_decay(name):
    params = jax.tree.map(jnp.array, first_variables()["params"])
    stage = Stage(name="s", epochs=1, schedule="constant", learning_rate=0.1)
    tx = make_optimizer(OptimizerSettings(name=name, weight_decay=0.1), stage, 100)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        moves = bool((np.asarray(update) != 0).any())
        assert moves == (path[-1].key == "kernel"), jax.tree_util.keystr(path)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_distill_weight_is_the_share_of_the_distillation_loss(share):
    stage = Stage(
        name="s",
        epochs=1,
        quantize="activations",
        distill="teacher",
        distill_weight=share,
        temperature=3.0,
    )
    model = network().clone(quant=stage.quant_config(network().quant))
    teacher = network().baseline()
    x = (jnp.asarray(images()["image"][:B], jnp.float32) - 128) / 64
    labels = jnp.asarray(images()["label"][:B])
    of_teacher = init(teacher, jax.random.key(5), x)
    tx = make_optimizer(SGD, stage, 100)
    settings = StepSettings(seed=0, start=0, steps=100, batch_size=B, mean=(128.0,), std=(64.0,))
    step = ParallelStep(make_train_step(network(), stage, tx, settings, teacher), jax.devices()[:1])
    variables = jax.tree.map(jnp.array, first_variables())
    state = TrainState(
        jnp.int32(0), variables["params"], variables["batch_stats"], tx.init(variables["params"])
    )
    devices = jax.devices()[:1]
    _, metrics = step(
        replicate(state, devices),
        replicate(images(), devices),
        rows(1),
        replicate(of_teacher, devices),
    )
    # The step drew one width for all layers; the loss is that of one of the three.
    targets = teacher.apply(of_teacher, x, train=False)
    found = []
    for width in SPACE.choices:
        bits = (width,) * model.num_layers
        logits, _ = model.apply(
            first_variables(), x, bits=bits, train=True, mutable=["batch_stats"]
        )
        soft = distillation(logits, targets, 3.0)
        found.append(float((1 - share) * cross_entropy(logits, labels) + share * soft))
    assert min(abs(float(metrics["loss"][0]) - loss) for loss in found) < 1e-4


def test_each_step_of_a_stage_draws_its_own_policy():
    _, step, state, data = setting(LAYER_WISE)
    used = []
    for number in range(6):
        before = jax.tree.map(np.asarray, state.batch_stats)
        state, _ = step(state, data, rows(1, number))
        after = jax.tree.map(np.asarray, state.batch_stats)
        moved = jax.tree.map(lambda a, b: (a != b).tolist(), before, after)
        used.append(str([moved[name]["conv_norm"]["count"] for name in network().names]))
    assert len(set(used)) > 1


def test_schedules_warm_up_and_come_down():
    cosine = schedule(Stage(name="s", epochs=1, learning_rate=1.0, warmup=0.1), 100)
    assert float(cosine(0)) == 0.0
    np.testing.assert_allclose(float(cosine(10)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(float(cosine(55)), 0.5, rtol=1e-6)
    np.testing.assert_allclose(float(cosine(100)), 0.0, atol=1e-7)
    steps = schedule(Stage(name="s", epochs=1, learning_rate=1.0, schedule="step"), 100)
    np.testing.assert_allclose([float(steps(i)) for i in (0, 60, 80)], [1.0, 0.1, 0.01], rtol=1e-5)


def test_distillation_is_zero_for_equal_logits_and_has_the_gradient_of_soft_cross_entropy():
    logits = jax.random.normal(jax.random.key(0), (5, 7))
    teacher = jax.random.normal(jax.random.key(1), (5, 7))
    assert abs(float(distillation(logits, logits, 3.0))) < 1e-6
    got = jax.grad(distillation)(logits, teacher, 3.0)
    want = 3.0 * (jax.nn.softmax(logits / 3) - jax.nn.softmax(teacher / 3)) / 5
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert float(jnp.abs(jax.grad(distillation, 1)(logits, teacher, 3.0)).max()) == 0.0


def test_cross_entropy_with_smoothing_against_the_formula():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    labels = np.asarray([0, 2, 1, 1])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.eye(3)[labels] * 0.9 + 0.1 / 3
    want = -(target * log_p).sum(-1).mean()
    got = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.1)
    np.testing.assert_allclose(float(got), want, rtol=1e-5)


def test_one_trace_for_all_policies_and_the_loss_goes_down():
    _, step, state, data = setting(LAYER_WISE, DECAYING, pad=0)
    losses = []
    for number in range(40):
        state, metrics = step(state, data, rows(1, number))
        losses.append(float(metrics["loss"][0]))
    assert step.traces == 1
    assert np.mean(losses[-8:]) < np.mean(losses[:8])


@pytest.mark.slow
def test_several_steps_per_dispatch_equal_single_ones():
    stage = Stage(name="s", epochs=1, widths="layer", ramp=0.0)
    _, one, state, data = setting(stage)
    _, many, other, _ = setting(stage, most=3)
    for number in range(5):
        state, _ = one(state, data, rows(1, number))
    other, first = many(other, data, rows(3))
    other, second = many(other, data, rows(2, 3))
    assert (first["loss"].shape, second["loss"].shape, many.traces) == ((3,), (2,), 1)
    assert int(other.step) == 5
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_rho_zero_makes_the_layer_wise_stage_equal_the_network_wide_one():
    _, wide, a, data = setting(Stage(name="s", epochs=1))
    _, mixed, b, _ = setting(Stage(name="s", epochs=1, widths="layer", rho_end=0.0))
    for number in range(3):
        a, _ = wide(a, data, rows(1, number))
        b, _ = mixed(b, data, rows(1, number))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("policies", [pytest.param("sum", marks=pytest.mark.slow), "sandwich"])
def test_several_policies_visit_their_pairs_and_distil_from_the_widest(policies):
    stage = Stage(name="s", epochs=1, policies=policies, distill="widest")
    model, step, state, data = setting(stage, pad=0)
    state, metrics = step(state, data, rows(1))
    counts = np.asarray(state.batch_stats[model.names[1]]["conv_norm"]["count"])
    assert counts.sum() == 3
    assert counts[2, 2] >= 1
    assert counts[0, 0] >= 1
    assert np.isfinite(float(metrics["loss"][0]))


def test_pairs_used_of_several_policies_is_their_union():
    model = network()
    policies = jnp.asarray([[2, 2], [4, 4]])
    used = np.asarray(pairs_used(model, policies)[model.names[1]])
    assert np.argwhere(used).tolist() == [[0, 0], [2, 2]]


_DEVICES = """
import json, sys, jax, numpy as np
sys.path.insert(0, {folder!r})
from test_step import rows, setting
from bitmixer_jax.training.stages import Stage
stage = Stage(name="s", epochs=1, widths="layer", ramp=0.0, learning_rate=0.01)
ends = []
for number in (1, 4):
    _, step, state, data = setting(stage, devices=jax.devices()[:number], flip=True, sync_bn={sync})
    losses = []
    for i in range(4):
        state, metrics = step(state, data, rows(1, i))
        losses.append(float(metrics["loss"][0]))
    copies = [np.asarray(s.data) for s in state.params["head"]["kernel"].addressable_shards]
    same = all((c == copies[0]).all() for c in copies)
    ends.append((jax.device_get((state.params, state.batch_stats)), losses, same, len(copies)))
gap = max(float(np.abs(a - b).max()) for a, b in zip(*(jax.tree.leaves(e[0]) for e in ends)))
loss_gap = max(abs(a - b) for a, b in zip(ends[0][1], ends[1][1]))
print(json.dumps(dict(gap=gap, loss_gap=loss_gap, same=ends[1][2], devices=ends[1][3])))
"""


def _four_devices(sync, tmp_path):
    import os
    import pathlib

    script = _DEVICES.format(folder=str(pathlib.Path(__file__).parent), sync=sync)
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_four_devices_equal_one_with_synchronised_bn(tmp_path):
    result = _four_devices(True, tmp_path)
    assert result["devices"] == 4
    assert result["same"]
    assert result["gap"] < 2e-3
    assert result["loss_gap"] < 1e-3


@pytest.mark.slow
def test_without_synchronised_bn_devices_still_agree_among_themselves(tmp_path):
    result = _four_devices(False, tmp_path)
    assert result["same"]
    assert result["loss_gap"] > 1e-6
