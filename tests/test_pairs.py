"""The batch norm of a pair of widths: its row in the tables, and which pairs have statistics."""

import dataclasses
import itertools

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.export.integer_engine import from_integer_model
from bitmixer_jax.export.integer_model import to_integer_model
from bitmixer_jax.loaded_model import from_variables
from bitmixer_jax.pairs import calibrated, find_uncalibrated
from tests.export.networks import integer_model, network
from tests.refusals import refused

LAYERS = bm.create_model("resnet8", num_classes=2).layers


@pytest.mark.parametrize(
    ("place", "norm", "rows"), [(0, "transitional", 1), (3, "transitional", 3), (3, "per_width", 1)]
)
def test_a_layer_has_a_row_for_each_width_of_a_predecessor_that_counts(place, norm, rows):
    assert LAYERS[place].norm_rows(3, norm) == rows
    assert LAYERS[place].norm_row([0, 1, 2, 1, 0, 2], rows) == (2 if rows > 1 else 0)


@pytest.mark.parametrize("norm", ["transitional", "per_width"])
def test_uncalibrated_pairs_are_those_that_policies_use_and_no_step_used(norm):
    rng = np.random.default_rng(0)
    counts = [rng.integers(0, 2, (layer.norm_rows(3, norm), 3)) for layer in LAYERS]
    policies = rng.choice([2, 3, 4], (20, 6))
    expected = set()
    for policy, (i, layer) in itertools.product(policies, enumerate(LAYERS)):
        transitional = norm == "transitional" and i > 0
        row = policy[i - 1] - 2 if transitional else 0
        if counts[i][row, policy[i] - 2] == 0:
            expected.add((layer.name, policy[i - 1] if transitional else 0, policy[i]))
    found = find_uncalibrated(LAYERS, counts, (2, 3, 4), policies)
    assert set(found) == expected
    assert len(found) == len(expected)


def test_a_pair_is_calibrated_once_a_step_used_it():
    assert calibrated(np.array([[0, 1], [7, 0]])).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(("kind", "width"), [("resnet8", 4), ("per width", 0)])
def test_every_loaded_network_names_the_pair_that_is_missing(kind, width):
    model, variables = network(kind)
    name = model.names[1]
    norm = variables["batch_stats"][name]["conv_norm"]
    count = norm["count"].copy()
    count[-1, 0] = 0
    stats = {**variables["batch_stats"], name: {"conv_norm": {**norm, "count": count}}}
    known = {"params": variables["params"], "batch_stats": stats}
    about = dict(mean=[0.0], std=[1.0], classes=("a", "b", "c"))
    integers = to_integer_model(model, known, weights_digest="", **about)
    policy = np.asarray([4, 2, 2, 2, 2, 2], np.int32)
    for loaded in (from_variables(model, known, **about), from_integer_model(integers)):
        assert loaded.uncalibrated(policy) == [(name, width, 2)]
    with refused("uncalibrated", name, "2 bits", width or "any"):
        integers.check_calibrated(policy)


def test_a_damaged_count_of_one_kernel_is_noticed():
    whole = integer_model("resnet18")
    place = next(i for i, layer in enumerate(whole.layers) if len(layer.kernels) > 1)
    layer = whole.layers[place]
    conv, shortcut = layer.kernels
    shortcut = dataclasses.replace(shortcut, count=np.zeros_like(shortcut.count))
    damaged = list(whole.layers)
    damaged[place] = dataclasses.replace(layer, kernels=(conv, shortcut))
    policy = np.full(len(damaged), 2, np.int32)
    whole.check_calibrated(policy)
    with refused("uncalibrated", layer.info.name, "2 bits"):
        dataclasses.replace(whole, layers=tuple(damaged)).check_calibrated(policy)
