"""Regressions of searches, fronts, scores and files of any content."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.cli import main
from bitmixer_jax.cost import Cost, costs, load_latency
from bitmixer_jax.evaluation import Scores
from bitmixer_jax.front import Front, Point, load_front
from bitmixer_jax.policy import load_policy, parse_changes, parse_policy
from bitmixer_jax.search import (
    METHODS,
    Constraint,
    EvaluationCache,
    Problem,
    SearchSession,
    SearchSettings,
    plots,
    search,
    session,
)
from bitmixer_jax.trained import load

CHOICES = (2, 3, 4)
SPACE = bm.BitSpace(CHOICES)
SMALL = dict(images=16, evaluations=2, method="random")


# problem / methods


def test_a_limit_just_below_the_best_policy_is_still_solved():
    model = bm.create_model("resnet18", num_classes=1000)
    count, layers = costs(model)["bytes"], model.num_layers
    rng = np.random.default_rng(0)
    for _ in range(10):
        genes = rng.integers(3, size=layers)
        table = np.ones((layers, 3))
        table[np.arange(layers), genes] = 0
        most = float(count(np.asarray(CHOICES)[genes])) - 1
        limits = (Constraint(cost=count, upper_bound=most),)
        problem = Problem(space=SPACE, groups=model.groups(), objective=count, constraints=limits)
        found = problem.solve_ilp(table)
        assert problem.fits(found)
        assert table[np.arange(layers), found].sum() == 1


@pytest.mark.parametrize("name", METHODS)
def test_fronts_of_blocks_over_a_latency_that_does_not_fall_with_the_width(name):
    for seed in range(3):
        table = np.random.default_rng(seed).uniform(0.5, 2, (6, 3))
        cost = Cost(name="latency_ms", unit="ms", choices=CHOICES, table=table)
        problem = Problem(space=SPACE, groups=(0, 0, 1, 1, 2, 2), objective=cost)
        found = search(problem, METHODS[name](), lambda p: Scores(p.mean(1), 1 / p.mean(1)))
        assert len(found.front()) >= 1 + (name != "greedy")


def test_a_limit_of_nothing_at_all_can_be_met():
    free = np.ones((6, 3))
    free[:, 1] = 0
    free[0] = [1, 1, 0]
    latency = Cost(name="latency_ms", unit="ms", choices=CHOICES, table=free)
    bits = Cost(name="avg_bits", unit="bits", choices=CHOICES, table=np.tile(CHOICES, (6, 1)))
    limits = (Constraint(cost=bits, upper_bound=20), Constraint(cost=latency, upper_bound=0))
    problem = Problem(space=SPACE, groups=tuple(range(6)), objective=bits, constraints=limits)
    assert problem.solve_ilp(np.zeros((6, 3))).tolist() == [2, 1, 1, 1, 1, 1]


# files

HUGE = ["1" + "0" * 400, "9" * 5000]
NAMES = ("a", "b")


def front_file(tmp_path):
    points = (
        Point(widths=(2, 2), cost=1.5, loss=2.5, top1=0.25),
        Point(widths=(4, 4), cost=3.5, loss=1.5, top1=0.75),
    )
    path = tmp_path / "front.json"
    Front(
        points=points,
        names=NAMES,
        choices=CHOICES,
        cost="bytes",
        unit="bytes",
        weights_digest="0",
        notes={"points": [], "about": 1},
    ).save(path)
    return path


def test_notes_do_not_replace_what_a_front_file_says(tmp_path):
    assert len(load_front(front_file(tmp_path), NAMES, SPACE).points) == 2


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("old", ["3.5", "1.5", "0.75"])
def test_numbers_too_large_for_a_front_are_refused(tmp_path, number, old):
    path = front_file(tmp_path)
    path.write_text(path.read_text().replace(old, number))
    with pytest.raises(bm.UserError, match="front file"):
        load_front(path, NAMES, SPACE)


@pytest.mark.parametrize("number", HUGE)
def test_numbers_too_large_for_a_policy_are_refused(tmp_path, number):
    path = tmp_path / "policy.json"
    bm.save_policy(path, [2, 4], NAMES, SPACE)
    path.write_text(path.read_text().replace('"b": 4', f'"b": {number}'))
    with pytest.raises(bm.UserError, match="policy"):
        load_policy(path, NAMES, SPACE)
    with pytest.raises(bm.UserError):
        parse_policy(number, NAMES, SPACE)
    with pytest.raises(bm.UserError):
        parse_changes([f"a={number}"])


@pytest.mark.parametrize("number", HUGE)
def test_seconds_too_large_are_refused(tmp_path, number):
    model = bm.create_model("resnet8", num_classes=10)
    layers = {name: {"2": 1, "3": 1, "4": 1} for name in model.names}
    content = {"format": "bitmixer-latency", "version": 1, "layers": layers, "ends": 7.5}
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(content).replace("7.5", number))
    with pytest.raises(bm.UserError, match="latency"):
        load_latency(path, model)


# scores

ABOUT = {"network": "0"}
HEADER = json.dumps({"format": "bitmixer-scores", "version": 1, **ABOUT}) + "\n"


def measure(policies):
    return Scores(np.zeros(len(policies)), np.zeros(len(policies)))


def test_scores_of_another_network_are_said_to_be(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text(HEADER)
    with pytest.raises(bm.UserError, match="another network or of other images"):
        EvaluationCache(measure, path, {"network": "1"})


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"widths": [2], "top1": 1' + b"0" * 400 + b', "loss": 1, "seconds": 1}',
        b'{"widths": [2], "top1": NaN, "loss": 1, "seconds": 1}',
        b'{"widths": [2], "top1": 1, "loss": Infinity, "seconds": 1}',
    ],
)
def test_lines_with_anything_in_them_are_refused(tmp_path, line):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(HEADER.encode() + line + b"\n")
    with pytest.raises(bm.UserError, match="damaged; remove it"):
        EvaluationCache(measure, path, ABOUT)


def test_every_cut_of_the_header_is_mended(tmp_path):
    path = tmp_path / "scores.jsonl"
    for cut in range(len(HEADER)):
        path.write_text(HEADER[:cut])
        EvaluationCache(measure, path, ABOUT)(np.asarray([[2, 2]], np.int32))
        assert path.read_text().startswith(HEADER)
        assert len(path.read_text().splitlines()) == 2
        EvaluationCache(measure, path, ABOUT)


def test_scores_that_cannot_be_noted_are_one_line(tmp_path):
    path = tmp_path / "scores.jsonl"
    book = EvaluationCache(measure, path, ABOUT)
    path.mkdir()
    with pytest.raises(bm.UserError, match="cannot write there"):
        book(np.asarray([[2, 2]], np.int32))


# workdir


@pytest.fixture
def as_if(trained):
    """``as_if(train_split=...)``: opens sessions on the run as if it had such settings."""

    def change(**settings):
        loaded = load(trained)
        changed = dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, **settings))
        return lambda **more: SearchSession(changed, SearchSettings(**SMALL, **more))

    return change


@pytest.mark.parametrize("split", ["train[:1437]", "train[:100%]", "train[0:]"])
def test_a_split_that_left_nothing_out_is_searched_itself(as_if, split):
    found = as_if(train_split=split)()
    assert found.split == split
    assert found.seen_in_training


@pytest.mark.parametrize(
    ("train", "test"), [("train[:80%]", "train[80%:]"), ("train[:50%]", "train[80%:]")]
)
def test_test_data_that_are_a_slice_of_the_training_split_are_left_alone(as_if, train, test):
    open_session = as_if(train_split=train, test_split=test)
    found = open_session()
    assert found.split == train
    assert found.seen_in_training
    with pytest.raises(bm.UserError, match="that is test data"):
        open_session(split="train[79%:81%]")
    assert len(open_session(split="train[70%:80%]").data) == 16


def test_scores_are_kept_in_the_workdir_also_where_a_folder_above_has_an_at_sign(trained, tmp_path):
    (tmp_path / "me").mkdir()
    workdir = shutil.copytree(trained, tmp_path / "me@home" / "run")
    found = SearchSession(load(workdir), SearchSettings(**SMALL))
    found.cache(np.asarray([[4] * 6], np.int32))
    assert list((workdir / "search").iterdir())
    assert not list((tmp_path / "me").iterdir())


@pytest.mark.parametrize("name", ["front.png", "widths.png"])
def test_plots_that_are_there_are_refused_before_any_work(
    trained, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(session, "load", None)
    (tmp_path / name).write_text("mine")
    assert main(["front", "--workdir", str(trained), "--out", str(tmp_path)]) == 2
    assert f"{name}: already exists" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


def test_a_point_with_no_right_answer_is_in_the_plot(tmp_path, monkeypatch):
    drawn = []
    points = (Point(widths=(2, 2), cost=1.0, loss=2.0, top1=0.0, test_top1=0.0),)
    front = Front(
        points=points, names=NAMES, choices=CHOICES, cost="c", unit="u", weights_digest="0"
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
