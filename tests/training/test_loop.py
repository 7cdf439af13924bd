"""Runs whose settings differ from the default, through the loop to the report."""

import jax
import numpy as np
import pytest

from bitmixer_jax import data
from bitmixer_jax.evaluation import Evaluator
from bitmixer_jax.report import report
from bitmixer_jax.trained import load
from bitmixer_jax.training import train
from bitmixer_jax.training.metrics import read_metrics
from bitmixer_jax.training.schedule import make_schedule
from tests.refusals import refused
from tests.states import newest_state


@pytest.fixture(scope="module")
def unusual(tiny, trained_float, tmp_path_factory):
    """A float teacher, AdamW, EMA, sandwich steps, blocks, three steps a dispatch."""
    workdir = tmp_path_factory.mktemp("unusual") / "run"
    config = tiny(
        f"init_from={trained_float}",
        f"teacher={trained_float}",
        "stages.mixed.distill=teacher",
        "stages.mixed.policies=sandwich",
        "optimizer.name=adamw",
        "optimizer.ema=0.9",
        "selection=block",
        "label_smoothing=0.1",
        "steps_per_dispatch=3",
        "order=('mixed',)",
        "stages.mixed.epochs=4.0",
        "stages.mixed.learning_rate=1e-3",
    )
    report(train(config, workdir))
    return workdir


@pytest.mark.slow
def test_a_run_with_every_option_ends_with_finite_losses(unusual):
    records = read_metrics(unusual, "train")
    assert {record["stage"] for record in records} == {"mixed"}
    assert all(np.isfinite(record["loss"]) for record in records)


@pytest.mark.slow
def test_layers_of_a_block_never_met_at_different_widths(unusual):
    loaded = load(unusual)
    model, variables = loaded.model, loaded.variables
    second_of_block = [i for i, layer in enumerate(model.layers) if layer.name.endswith("conv2")]
    for i in second_of_block:
        count = np.asarray(variables["batch_stats"][model.names[i]]["conv_norm"]["count"])
        assert count.sum() > 0
        assert (count[~np.eye(3, dtype=bool)] == 0).all()


@pytest.mark.slow
def test_evaluation_uses_the_moving_average(unusual):
    variables = load(unusual).variables
    state = newest_state(unusual)
    averaged, last = jax.tree.leaves(variables["params"]), jax.tree.leaves(state.params)
    for a, b in zip(averaged, jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(averaged, last, strict=True))


@pytest.mark.slow
def test_the_report_names_the_baseline(unusual):
    assert "| full-precision baseline |" in (unusual / "report" / "README.md").read_text()


def test_images_that_do_not_fit_the_network_are_refused(trained):
    loaded = load(trained)
    model, variables = loaded.model, loaded.variables
    digits = data.load("digits", "test[:8]")
    wide = digits.images.repeat(2, axis=1)
    bad = type(digits)(**{**vars(digits), "images": wide})
    evaluator = Evaluator(model, bad, digits.mean, digits.std)
    with refused("bad-shape", "16, 8, 1)", (8, 8, 1)):
        evaluator.top1(variables, [[4] * model.num_layers])


def test_every_example_is_drawn_over_the_epochs_and_none_twice_in_one(tiny):
    from bitmixer_jax.training.config import read

    run = read(tiny())
    schedule = make_schedule(
        run, run.build(10, (8, 8, 1)), 150
    )  # two batches of 64, 22 images over
    epochs = [np.concatenate([schedule.rows(2 * e), schedule.rows(2 * e + 1)]) for e in range(30)]
    assert all(len(set(rows.tolist())) == 128 for rows in epochs)
    assert set(np.concatenate(epochs).tolist()) == set(range(150))
    np.testing.assert_array_equal(epochs[0][:64], schedule.rows(0))
