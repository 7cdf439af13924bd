"""Evaluation: right counts for any policy, one compilation, and honest about what it cannot do."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitmixer_jax import data
from bitmixer_jax.evaluation import Evaluator, evaluate_protocols, random_policies
from bitmixer_jax.pairs import covering_policies, pairs_used, recalibrate, uncalibrated_pairs
from bitmixer_jax.trained import load
from tests.refusals import refused

POLICY = np.asarray([4, 3, 2, 2, 3, 4], np.int32)


@pytest.fixture(scope="module")
def network(trained):
    """Run, network and variables at the end of training."""
    loaded = load(trained)
    return loaded.run, loaded.model, loaded.variables


@pytest.fixture(scope="module")
def young(trained):
    """Network and variables before any layer drew its own width."""
    loaded = load(f"{trained}@weights")
    return loaded.model, loaded.variables


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "test[:100]")


@pytest.fixture(scope="module")
def evaluator(network, digits):
    return Evaluator(network[1], digits, digits.mean, digits.std, batch_size=100)


def plain_top1(model, variables, dataset, policy):
    x = data.normalize(jnp.asarray(dataset.images), dataset.mean, dataset.std)
    logits = jax.jit(model.apply)(variables, x, bits=jnp.asarray(policy))
    return np.mean(np.argmax(np.asarray(logits), -1) == dataset.labels)


def test_accuracy_is_that_of_a_plain_forward_pass(network, evaluator, digits):
    _, model, variables = network
    policies = np.stack([POLICY, model.space.uniform(3, model.num_layers)])
    wanted = [plain_top1(model, variables, digits, policy) for policy in policies]
    assert evaluator.top1(variables, policies).tolist() == wanted
    assert wanted[0] > 0.2


def test_padding_does_not_count(network, evaluator, digits):
    _, model, variables = network
    padded = Evaluator(model, digits, digits.mean, digits.std, batch_size=30)
    assert padded.top1(variables, POLICY[None]) == evaluator.top1(variables, POLICY[None])


def test_fifty_random_policies_are_one_trace(network, evaluator):
    _, model, variables = network
    scores = evaluator.top1(variables, random_policies(model, 50, seed=1))
    assert scores.shape == (50,)
    assert evaluator.traces == 1


def test_protocols_hold_the_scores_of_their_policies(network, evaluator):
    _, model, variables = network
    result = evaluate_protocols(evaluator, variables, random=4, seed=3, policy=POLICY)
    scores = evaluator.top1(variables, random_policies(model, 4, 3))
    assert result["random"]["scores"] == scores.tolist()
    assert result["random"]["mean"] == pytest.approx(scores.mean())
    assert result["random"]["std"] == pytest.approx(scores.std())
    assert result["random"]["worst"] == scores.min()
    assert result["random"]["average_bits"] == random_policies(model, 4, 3).mean()
    assert result["policy"]["top1"] == evaluator.top1(variables, POLICY[None])[0]
    for width in model.space.choices:
        alone = evaluator.top1(variables, model.space.uniform(width, 6)[None])[0]
        assert result["uniform"][str(width)] == alone


def test_logits_that_are_not_finite_are_refused(network, evaluator):
    _, _, variables = network
    broken = jax.tree.map(lambda x: x, variables)
    broken["params"]["head"] = jax.tree.map(lambda x: x * jnp.nan, broken["params"]["head"])
    with refused("not-finite", POLICY.tolist()):
        evaluator.top1(broken, POLICY[None])


@pytest.mark.parametrize(
    ("policy", "code"),
    [([5] * 6, "policy-width"), ([4] * 5, "policy-length"), ([3.0] * 6, "policy-form")],
)
def test_policy_that_does_not_fit_is_refused(network, evaluator, policy, code):
    with refused(code):
        evaluator.top1(network[2], [policy])


def test_pairs_never_visited_are_refused(young, digits):
    model, variables = young
    evaluator = Evaluator(model, digits, digits.mean, digits.std)
    with refused("uncalibrated", "4->3", model.names[1]):
        evaluator.top1(variables, POLICY[None])
    assert evaluator.traces == 0


@pytest.fixture(scope="module")
def recalibrated(young):
    model, variables = young
    train = data.load("digits", "train[:128]")
    return recalibrate(model, variables, train.images, train.mean, train.std, 64)


def tables(model, variables):
    """(params, statistics, whether visited) of each Transitional BN."""
    for layer in model.layers:
        for kernel in layer.kernels:
            name = f"{kernel.name}_norm"
            stats = variables["batch_stats"][layer.name][name]
            yield variables["params"][layer.name][name], stats, np.asarray(stats["count"]) > 0


def test_recalibration_leaves_visited_pairs_bit_for_bit(young, recalibrated):
    model, variables = young
    pairs = zip(tables(model, variables), tables(model, recalibrated), strict=True)
    seen = 0
    for (params, stats, visited), (new_params, new_stats, _) in pairs:
        seen += visited.sum()
        for old, new in ((params, new_params), (stats, new_stats)):
            for leaf in old:
                before, after = np.asarray(old[leaf])[visited], np.asarray(new[leaf])[visited]
                assert before.tobytes() == after.tobytes()
    assert seen > 0


def test_recalibration_leaves_kernels_and_steps(young, recalibrated):
    for layer in young[0].layers:
        old, new = (v["params"][layer.name]["conv"] for v in (young[1], recalibrated))
        assert [leaf for leaf in old if not np.array_equal(old[leaf], new[leaf])] == []
        assert "kernel" in old


def test_recalibration_gives_every_pair_statistics(young, recalibrated):
    model, _ = young
    stats = recalibrated["batch_stats"]
    assert uncalibrated_pairs(model, stats, covering_policies(model)) == []
    for _, table, visited in tables(model, recalibrated):
        assert visited.all()
        assert np.isfinite(table["mean"]).all()
        assert (np.asarray(table["var"]) > 0).all()


def test_recalibration_estimates_other_statistics_than_those_copied(young, recalibrated):
    model, variables = young
    name = model.layers[1].name
    visited = np.asarray(variables["batch_stats"][name]["conv_norm"]["count"]) > 0
    new = np.asarray(recalibrated["batch_stats"][name]["conv_norm"]["mean"])
    diagonal = np.arange(model.space.n)
    assert visited[diagonal, diagonal].all()
    assert not np.allclose(new[0, 1], new[1, 1])


def test_recalibration_needs_one_batch(young):
    model, variables = young
    train = data.load("digits", "train[:8]")
    with refused("no-data", 8, 64):
        recalibrate(model, variables, train.images, train.mean, train.std, 64)


def test_covering_policies_cover_all_pairs(network):
    model = network[1]
    policies = covering_policies(model)
    assert policies.shape == (9, 6)
    assert policies.dtype == np.int32
    used = pairs_used(model, policies)
    assert len(used) == 6
    assert all(np.asarray(pairs).all() for pairs in used.values())


def test_random_policies_are_reproducible(network):
    model = network[1]
    first, again = (random_policies(model, 20, seed=7) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, random_policies(model, 20, seed=8))


def test_random_policies_take_every_width_in_every_layer(network):
    policies = random_policies(network[1], 60, seed=0)
    assert all(set(column) == {2, 3, 4} for column in policies.T.tolist())


def test_block_selection_gives_the_layers_of_a_block_one_width(network):
    model = network[1]
    groups = np.asarray(model.groups("block"))
    policies = random_policies(model, 30, 0, tuple(groups.tolist()))
    assert len(set(groups.tolist())) < len(groups)
    for group in set(groups.tolist()):
        assert (np.ptp(policies[:, groups == group], axis=1) == 0).all()
    assert len(np.unique(policies, axis=0)) > 10


# Scores of many policies at once.


def plain_scores(model, variables, dataset, policies):
    """Accuracy and mean cross-entropy of each policy, from logits, in float64."""
    x = data.normalize(jnp.asarray(dataset.images), dataset.mean, dataset.std)
    forward = jax.jit(model.apply)
    top1, loss = [], []
    for policy in policies:
        logits = np.asarray(forward(variables, x, bits=jnp.asarray(policy)), np.float64)
        top1.append(np.mean(logits.argmax(-1) == dataset.labels))
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        loss.append(-np.log(chances[np.arange(len(logits)), dataset.labels]).mean())
    return np.asarray(top1), np.asarray(loss)


def test_losses_are_the_mean_cross_entropy_of_the_logits(network, evaluator, digits):
    _, model, variables = network
    policies = random_policies(model, 5, seed=4)
    top1, loss = plain_scores(model, variables, digits, policies)
    scores = evaluator.scores(variables, policies)
    # Of two programmes, one may round a code up where the other rounds it down.
    np.testing.assert_allclose(scores.top1, top1, atol=0.011)
    np.testing.assert_allclose(scores.loss, loss, rtol=1e-3)
    assert scores.loss.dtype == scores.top1.dtype == np.float64
    assert len(set(scores.loss.tolist())) == 5


def test_policies_of_a_batch_score_as_each_does_alone(network, evaluator):
    _, model, variables = network
    policies = random_policies(model, 19, seed=5)  # one call of 16, one of 3
    together = evaluator.scores(variables, policies)
    alone = [evaluator.scores(variables, policy[None]) for policy in policies]
    assert together.top1.tolist() == [score.top1[0] for score in alone]
    assert together.loss.tolist() == [score.loss[0] for score in alone]
    again = evaluator.scores(variables, policies[::-1])
    assert again.loss.tolist() == together.loss[::-1].tolist()


def test_batches_of_any_number_of_policies_are_one_trace(network, digits):
    _, model, variables = network
    small = Evaluator(model, digits, digits.mean, digits.std, batch_size=100, policies=4)
    wanted = small.scores(variables, random_policies(model, 9, seed=6))
    for number in (1, 3, 4, 5, 8):
        found = small.scores(variables, random_policies(model, 9, seed=6)[:number])
        assert found.loss.tolist() == wanted.loss[:number].tolist()
        assert found.top1.tolist() == wanted.top1[:number].tolist()
    assert small.traces == 1


def test_no_policies_have_no_scores(network, evaluator):
    _, model, variables = network
    scores = evaluator.scores(variables, random_policies(model, 0, seed=0))
    assert scores.top1.shape == scores.loss.shape == (0,)


def test_padding_adds_nothing_to_losses(network, evaluator, digits):
    _, model, variables = network
    policies = random_policies(model, 3, seed=7)
    padded = Evaluator(model, digits, digits.mean, digits.std, batch_size=30)
    wanted = evaluator.scores(variables, policies).loss
    np.testing.assert_allclose(padded.scores(variables, policies).loss, wanted, rtol=1e-3)


def test_progress_wraps_the_calls_that_are_made(network, evaluator):
    _, model, variables = network
    seen = []

    def progress(calls):
        seen.append(len(calls))
        return calls

    evaluator.scores(variables, random_policies(model, 33, seed=8), progress)
    assert seen == [3]


_DEVICES = """
import json, sys
import jax
from bitmixer_jax import data
from bitmixer_jax.evaluation import Evaluator, random_policies
from bitmixer_jax.trained import load
loaded = load(sys.argv[1])
model, variables = loaded.model, loaded.variables
digits = data.load("digits", "test[:90]")
policies = random_policies(model, 5, seed=9)
found = []
for number in (1, 4):
    devices = jax.devices()[:number]
    evaluator = Evaluator(model, digits, digits.mean, digits.std, devices, 8, policies=2)
    scores = evaluator.scores(variables, policies)
    found.append([scores.top1.tolist(), scores.loss.tolist(), evaluator.traces, len(devices)])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_four_devices_score_as_one_does(trained):
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", _DEVICES, str(trained)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, four = json.loads(done.stdout.splitlines()[-1])
    assert (four[2], four[3]) == (1, 4)
    np.testing.assert_allclose(four[0], one[0], atol=0.012)
    np.testing.assert_allclose(four[1], one[1], rtol=1e-3)
