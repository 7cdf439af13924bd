"""Sensitivities from second derivatives: traces against explicit Hessians, and their use."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bitmixer_jax as bm
from bitmixer_jax.cost import costs
from bitmixer_jax.search import Problem, hessian
from tests import oracle

CHOICES = (2, 3, 4)
IMAGES = np.random.default_rng(0).normal(size=(8, 6, 6, 1)).astype(np.float32)
LABELS = np.arange(8) % 3


def make(**settings):
    """Two blocks, the second with a projection shortcut: five kernels, 296 weights."""
    shape = dict(image_shape=(6, 6, 1), width=2, stage_sizes=(1, 1), projection=True)
    return bm.create_model("resnet8", num_classes=3, **{**shape, **settings})


@functools.cache
def network():
    """The network, and variables in which most weights and inputs are inside their clips."""
    model = make()
    policy = model.space.uniform(4, 4)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES, bits=policy)
    ranges = {"scale": (0.8, 1.2), "bias": (0, 0.5), "mean": (-0.1, 0.1), "var": (0.5, 1)}
    rng = np.random.default_rng(1)

    def filled(path, leaf):
        low, high = ranges.get(path[-1].key, (0, 0))
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype) if high else leaf

    return model, jax.tree_util.tree_map_with_path(filled, variables)


@functools.cache
def estimated(samples):
    model, variables = network()
    return hessian.traces(model, variables, IMAGES, LABELS, jax.random.key(3), samples)


@functools.cache
def explicit():
    """``{(layer, kernel): (rows of the Hessian of all kernels, where its own columns are)}``."""
    model, variables = network()
    kernels = {
        layer.name: {
            k.name: variables["params"][layer.name][k.name]["kernel"] for k in layer.kernels
        }
        for layer in model.layers
    }
    flat, unflatten = jax.flatten_util.ravel_pytree(kernels)

    def loss(flat):
        params = jax.tree.map(lambda leaf: leaf, variables["params"])
        for layer, own in unflatten(flat).items():
            for name, kernel in own.items():
                params[layer][name]["kernel"] = kernel
        logits = model.apply({**variables, "params": params}, IMAGES, bits=jnp.full(4, 4))
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    matrix = np.asarray(jax.jit(jax.jacrev(jax.grad(loss)))(flat), np.float64)
    places = unflatten(jnp.arange(len(flat)))
    return matrix, {
        (layer, name): np.asarray(place).ravel()
        for layer, own in places.items()
        for name, place in own.items()
    }


@pytest.mark.slow
def test_the_loss_is_curved_and_its_hessian_symmetric():
    matrix, _ = explicit()
    assert np.abs(matrix).max() > 0.01
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-5)


def test_estimated_traces_agree_with_explicit_hessians_within_five_standard_errors():
    samples = 200
    matrix, places = explicit()
    for (layer, kernel), own in places.items():
        inside = matrix[np.ix_(own, own)]
        rows = matrix[own]
        # Of v.(Hv) with random signs v: every product of two different signs has variance 1, and
        # those within the kernel meet twice.
        variance = (rows**2).sum() + (inside**2).sum() - 2 * (np.diag(inside) ** 2).sum()
        error = estimated(samples)[layer][kernel] - np.trace(inside)
        assert abs(error) < 5 * np.sqrt(variance / samples) + 1e-5
    total = sum(np.trace(matrix[np.ix_(own, own)]) for own in places.values())
    found = sum(trace for own in estimated(samples).values() for trace in own.values())
    assert total > 0.5
    assert found == pytest.approx(total, rel=0.3)


def test_sensitivities_are_positive_and_fall_with_the_width():
    model, variables = network()
    table = hessian.sensitivity(
        problem_of(model), model, variables, IMAGES, LABELS, jax.random.key(3), samples=200
    )
    assert (table[:, -1] == 0).all()
    assert (np.diff(table, axis=1) <= 0).all()
    assert (table[:, 0] > 0).any()


def test_there_is_a_trace_for_each_kernel_also_of_shortcuts():
    model, _ = network()
    found = estimated(200)
    assert {layer: set(own) for layer, own in found.items()} == {
        layer.name: {kernel.name for kernel in layer.kernels} for layer in model.layers
    }
    assert set(found["stage2.block1.conv1"]) == {"conv", "shortcut"}
    assert all(type(trace) is float for own in found.values() for trace in own.values())


# --- from traces to sensitivities ---


def problem_of(model, selection="layer"):
    groups = model.groups(selection)
    return Problem(space=model.space, groups=groups, objective=costs(model)["bitops"])


def random_variables(model):
    """Kernels and step sizes alone: the traces are given."""
    rng, params = np.random.default_rng(2), {}
    steps = len(model.space.choices) if model.quant.weight_quantizer == "independent" else 1
    for layer in model.layers:
        params[layer.name] = {
            kernel.name: {
                "kernel": rng.normal(0, 0.3, kernel.shape).astype(np.float32),
                "step": rng.uniform(0.02, 0.2, steps).astype(np.float32),
            }
            for kernel in layer.kernels
        }
    return {"params": params}


@pytest.mark.parametrize("kind", oracle.WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("selection", ["layer", "block"])
def test_sensitivity_is_half_the_mean_curvature_times_the_change_of_the_weights(
    monkeypatch, kind, selection
):
    model = make(weight_quantizer=kind)
    variables = random_variables(model)
    given = {
        layer.name: {kernel.name: 0.5 + i + j for j, kernel in enumerate(layer.kernels)}
        for i, layer in enumerate(model.layers)
    }
    given["stage1.block1.conv2"]["conv"] = -3.0  # noise: counts as none
    monkeypatch.setattr(hessian, "traces", lambda *arguments: given)
    problem = problem_of(model, selection)
    found = hessian.sensitivity(problem, model, variables, IMAGES, LABELS, jax.random.key(0))

    def weights(held, place):
        bits, step = CHOICES[place], held["step"][place if kind == "independent" else 0]
        whole = oracle.codes(kind, held["kernel"], step, bits, 4)
        return whole * float(oracle.pitch(kind, step, bits, 4))

    wanted = np.zeros((problem.size, 3))
    for group, layer in zip(problem.groups, model.layers, strict=True):
        for name, held in variables["params"][layer.name].items():
            for place in range(3):
                change = ((weights(held, place) - weights(held, 2)) ** 2).sum()
                trace = max(given[layer.name][name], 0)
                wanted[group, place] += trace * change / held["kernel"].size / 2
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert found.shape == ((4, 3) if selection == "layer" else (2, 3))
    assert (found[:, 2] == 0).all()
    if selection == "layer":
        assert (found[1] == 0).all()
