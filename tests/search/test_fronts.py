"""Fronts of a trained network: points, plots, files, and what is refused before any work."""

import errno
import json
import os

import numpy as np
import pytest

from bitmixer_jax import data
from bitmixer_jax.cost import costs
from bitmixer_jax.evaluation import Evaluator
from bitmixer_jax.front import Front, Point, load_front
from bitmixer_jax.search import (
    METHODS,
    plots,
    search_front,
    session,
)
from bitmixer_jax.search.describe import describe_front
from bitmixer_jax.trained import load
from bitmixer_jax.training.checkpoints import digest
from tests.refusals import check_line, refused
from tests.search.runs import SMALL, open_session, run


def test_a_front_is_written_with_its_plots(workdir, model, reads, tmp_path, capsys):
    out = tmp_path / "deep" / "front"
    words = ["front", "--workdir", workdir, "--cost", "bitops", "--out", out, "--random", 5]
    assert run(*words, "--method", "evolution", "--images", 64, "--evaluations", 24) == 0
    assert {path.name for path in out.iterdir()} == {"front.json", "front.png", "widths.png"}
    assert all(
        (out / name).read_bytes().startswith(b"\x89PNG") for name in ("front.png", "widths.png")
    )
    variables = load(workdir).variables
    front = load_front(out / "front.json", model.names, model.space, digest(variables))
    bitops = costs(model)["bitops"]
    assert (front.cost, front.unit) == ("bitops", "BitOPs")
    for point in front.points:
        assert point.cost == bitops(np.asarray(point.widths))
        right = 100 * point.test_top1  # of 100 images
        assert right == pytest.approx(round(right))
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
    said = " ".join(capsys.readouterr().out.split())
    assert "Test data: 100 images, read once, after the search." in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy", "ilp", "random"])
def test_every_method_draws_a_front(workdir, model, tmp_path, name):
    settings = dict(method=name, images=64, evaluations=8)
    front, opened = search_front(workdir, "avg_bits", random=0, **settings)
    lines = describe_front(front, opened)
    shown = [line for line in lines[2:] if line.startswith("| ") and "," in line]
    assert len(shown) == min(len(front.points), 12)
    assert lines[-1] == "Test data: 100 images, read once, after the search."
    front.save(tmp_path / "front.json")
    assert load_front(tmp_path / "front.json", model.names, model.space) == front
    assert (front.cost, front.unit) == ("avg_bits", "bits")
    assert front.notes["random"] == []
    if name != "random":
        assert front.best(2.0).widths == (2,) * 6


def test_the_points_of_a_front_score_on_test_as_they_do_alone(workdir, tmp_path):
    front, _ = search_front(workdir, "bytes", method="random", **SMALL, random=2)
    front.save(tmp_path / "front.json")
    content = json.loads((tmp_path / "front.json").read_text())
    loaded = load(workdir)
    model, variables = loaded.model, loaded.variables
    test = data.load("digits", "test[:100]")
    evaluator = Evaluator(model, test, test.mean, test.std, batch_size=500)
    for entry in (*content["points"], *content["uniform"], *content["random"]):
        alone = evaluator.top1(variables, np.asarray([entry["widths"]], np.int32))
        assert entry["test_top1"] == alone[0]


def test_a_front_that_is_there_is_refused_before_any_work(no_network, workdir, tmp_path, capsys):
    (tmp_path / "front.json").write_text("mine")
    assert run("front", "--workdir", workdir, "--out", tmp_path) == 2
    start = f"bitmixer: --out {tmp_path / 'front.json'}: "
    check_line(capsys.readouterr().err, "--overwrite", start=start)
    assert [path.name for path in tmp_path.iterdir()] == ["front.json"]


def test_a_front_in_place_of_a_file_is_refused_before_any_work(
    no_network, workdir, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "front"):
        assert run("front", "--workdir", workdir, "--out", out) == 2
        check_line(capsys.readouterr().err, start=f"bitmixer: --out {out}")


@pytest.mark.parametrize(
    ("cost", "hint"),
    [("bitop", "did you mean bitops"), ("latency_ms", "avg_bits"), ("flops", "bytes")],
)
def test_an_unknown_cost_measures_nothing(workdir, model, monkeypatch, cost, hint):
    monkeypatch.setattr(Evaluator, "scores", None)
    with refused("unknown-name", repr(cost), hint, ", ".join(costs(model))):
        search_front(workdir, cost, **SMALL)


def test_a_search_needs_no_more_policies_than_it_says(workdir):
    for name in METHODS:
        opened = open_session(workdir, method=name, **SMALL)
        problem = opened.problem(opened.costs["bytes"])
        found = opened.search(problem)
        assert 0 < len(found.policies) <= opened.method(problem).evaluations(problem)
        assert opened.about(found)["evaluations"] == len(found.policies)


def test_a_front_that_cannot_be_written_leaves_no_folder(workdir, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("bitmixer_jax.files.write_whole", full)
    out = tmp_path / "new" / "front"
    words = ["front", "--workdir", workdir, "--out", out, "--cost", "bytes", "--random", 2]
    assert run(*words, "--images", 16) == 2
    check_line(capsys.readouterr().err, out, os.strerror(errno.ENOSPC), start="bitmixer: ")
    assert not out.exists()


@pytest.mark.parametrize("name", ["front.png", "widths.png"])
def test_plots_that_are_there_are_refused_before_any_work(
    trained, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(session, "load", None)
    (tmp_path / name).write_text("mine")
    assert run("front", "--workdir", trained, "--out", tmp_path) == 2
    start = f"bitmixer: --out {tmp_path / name}: "
    check_line(capsys.readouterr().err, "--overwrite", start=start)
    assert (tmp_path / name).read_text() == "mine"


def test_a_point_with_no_right_answer_is_in_the_plot(tmp_path, monkeypatch):
    drawn = []
    points = (Point(widths=(2, 2), cost=1.0, loss=2.0, top1=0.0, test_top1=0.0),)
    front = Front(
        points=points, names=("a", "b"), choices=(2, 3, 4), cost="c", unit="u", weights_digest="0"
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
