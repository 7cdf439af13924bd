"""Fronts of a trained network: points, plots, files, and what is refused before any work."""

import errno
import json

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax import data
from bitmixer_jax.cost import costs
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Evaluator
from bitmixer_jax.front import Front, Point, load_front
from bitmixer_jax.search import (
    plots,
)
from bitmixer_jax.search.workdir import Settings, front_workdir
from bitmixer_jax.training import load_trained
from bitmixer_jax.training.checkpoints import digest

SMALL = dict(images=64, evaluations=24)


def test_a_front_is_written_with_its_plots(workdir, model, reads, tmp_path):
    out = tmp_path / "deep" / "front"
    lines = front_workdir(workdir, "bitops", out, Settings(method="evolution", **SMALL), random=5)
    assert {path.name for path in out.iterdir()} == {"front.json", "front.png", "widths.png"}
    assert all(
        (out / name).read_bytes().startswith(b"\x89PNG") for name in ("front.png", "widths.png")
    )
    _, _, variables = load_trained(workdir)
    front = load_front(out / "front.json", model.names, model.space, digest(variables))
    bitops = costs(model)["bitops"]
    assert (front.cost, front.unit) == ("bitops", "BitOPs")
    for point in front.points:
        assert point.cost == bitops(np.asarray(point.widths))
        assert 100 * point.test_top1 == pytest.approx(round(100 * point.test_top1))
    assert max(point.test_top1 for point in front.points) > 0.2
    assert front.points[0].widths == (2,) * 6
    assert [entry["widths"][0] for entry in front.notes["uniform"]] == [2, 3, 4]
    assert len(front.notes["random"]) == 5
    assert front.notes["test"] == {"examples": 100}
    assert front.notes["search"]["method"] == "evolution"
    assert front.notes["search"]["images"] == 64
    assert reads["splits"][-1] == "test[:100]"
    assert set(reads["splits"][:-1]) == {"train[256:]"}
    assert reads["top1"] == [(100, len(front.points) + 3 + 5)]
    assert lines[-1] == "Test data: 100 images, read once, after the search."
    shown = [line for line in lines if line.startswith("| ") and "," in line]
    assert min(len(front.points), 12) <= len(shown) <= len(front.points) + 1


@pytest.mark.parametrize("name", ["greedy", "ilp", "random"])
def test_every_method_draws_a_front(workdir, model, tmp_path, name):
    settings = Settings(method=name, images=64, evaluations=8)
    front_workdir(workdir, "avg_bits", tmp_path, settings, random=0)
    front = load_front(tmp_path / "front.json", model.names, model.space)
    assert (front.cost, front.unit) == ("avg_bits", "bits")
    assert front.notes["random"] == []
    if name != "random":
        assert front.best(2.0).widths == (2,) * 6


def test_the_points_of_a_front_score_on_test_as_they_do_alone(workdir, tmp_path):
    front_workdir(workdir, "bytes", tmp_path, Settings(method="random", **SMALL), random=2)
    content = json.loads((tmp_path / "front.json").read_text())
    _, model, variables = load_trained(workdir)
    test = data.load("digits", "test[:100]")
    evaluator = Evaluator(model, test, test.mean, test.std, batch_size=500)
    for entry in (*content["points"], *content["uniform"], *content["random"]):
        alone = evaluator.top1(variables, np.asarray([entry["widths"]], np.int32))
        assert entry["test_top1"] == alone[0]


def test_a_front_that_is_there_is_refused_before_any_work(no_network, workdir, tmp_path):
    (tmp_path / "front.json").write_text("mine")
    with pytest.raises(UserError, match=r"front.json: .*already exists"):
        front_workdir(workdir, "bitops", tmp_path, Settings(**SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["front.json"]


def test_a_front_in_place_of_a_file_is_refused_before_any_work(no_network, workdir, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "front"):
        with pytest.raises(UserError, match=r"--out .*cannot write"):
            front_workdir(workdir, "bitops", out, Settings(**SMALL))


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ("bitop", "did you mean bitops"),
        ("latency_ms", r"give --latency"),
        ("flops", "one of avg_bits, "),
    ],
)
def test_an_unknown_cost_measures_nothing(workdir, tmp_path, monkeypatch, cost, message):
    monkeypatch.setattr(Evaluator, "scores", None)
    with pytest.raises(UserError, match=message):
        front_workdir(workdir, cost, tmp_path, Settings(**SMALL))


def test_a_front_that_cannot_be_written_leaves_no_folder(workdir, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bitmixer_jax.files.write_whole", full)
    out = tmp_path / "new" / "front"
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        front_workdir(workdir, "bytes", out, Settings(images=16, method="greedy"), random=2)
    assert not out.exists()


@pytest.mark.parametrize("name", ["front.png", "widths.png"])
def test_plots_that_are_there_are_refused_before_any_work(no_network, workdir, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(bm.UserError, match=f"{name}: .*already exists"):
        front_workdir(workdir, "bitops", tmp_path, Settings(**SMALL))
    assert (tmp_path / name).read_text() == "mine"


def test_a_point_with_no_right_answer_is_in_the_plot(tmp_path, monkeypatch):
    drawn = []
    points = (Point(widths=(2, 2), cost=1.0, loss=2.0, top1=0.0, test_top1=0.0),)
    front = Front(
        points=points, names=("a", "b"), choices=(2, 3, 4), cost="c", unit="u", network="0"
    )
    real = plots.new_figure

    def new_figure(*size):
        figure, axis = real(*size)
        plot = axis.plot
        monkeypatch.setattr(axis, "plot", lambda *a, **k: drawn.append(a[1]) or plot(*a, **k))
        return figure, axis

    monkeypatch.setattr(plots, "new_figure", new_figure)
    plots.plot_front(tmp_path / "front.png", front)
    assert drawn[0] == [0.0]
