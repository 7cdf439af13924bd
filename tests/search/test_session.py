"""Searches of a trained network: budgets kept, test data read once, files, honest words."""

import dataclasses
import errno
import functools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from bitmixer_jax import data
from bitmixer_jax.cli import main
from bitmixer_jax.cost import activation_peak, costs
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Evaluator
from bitmixer_jax.front import load_front
from bitmixer_jax.policy import load_policy
from bitmixer_jax.search import (
    METHODS,
    IntegerProgram,
    SearchSession,
    SearchSettings,
    search_front,
    search_policy,
    session,
)
from bitmixer_jax.search.describe import describe_front, describe_policy
from bitmixer_jax.trained import load
from bitmixer_jax.training.checkpoints import digest

SMALL = dict(images=64, evaluations=24)


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """A copy of the trained run: searches write into it."""
    return str(shutil.copytree(trained, tmp_path_factory.mktemp("searched") / "run"))


@pytest.fixture(scope="module")
def model(trained):
    return load(trained).model


@pytest.fixture
def reads(monkeypatch):
    """What is read: the splits that are loaded, and how many policies each call of top1 has."""
    seen = {"splits": [], "top1": []}
    load, top1 = data.open_split, Evaluator.top1

    def counting_load(name, split, data_dir=None, **how):
        seen["splits"].append(split)
        return load(name, split, data_dir, **how)

    def counting_top1(self, variables, policies, *rest):
        seen["top1"].append((self.examples, len(policies)))
        return top1(self, variables, policies, *rest)

    monkeypatch.setattr(data, "open_split", counting_load)
    monkeypatch.setattr(Evaluator, "top1", counting_top1)
    return seen


def search(workdir, budget, out, overwrite=False, **settings):
    """Searches, writes the policy, and returns the lines that are printed."""
    found = search_policy(workdir, budget, **settings)
    found.save(out, overwrite=overwrite)
    return describe_policy(found)


def open_session(workdir, **settings):
    return SearchSession(load(workdir), SearchSettings(**settings))


def run(*words):
    """Runs a command in this process."""
    return main([str(word) for word in words])


@pytest.fixture
def no_network(monkeypatch):
    """Fails where a network is loaded: the mistake must be found before the work."""

    def load(source):
        raise AssertionError("the network was loaded")

    monkeypatch.setattr(session, "load", load)


# --- a policy within a budget ---


@pytest.mark.parametrize("name", METHODS)
def test_a_search_writes_a_policy_within_the_budget_and_reads_test_data_once(
    workdir, model, reads, tmp_path, name
):
    out = tmp_path / "policy.json"
    budget = ["avg_bits=3", "bitops=70%"]
    lines = search(workdir, budget, out, method=name, **SMALL)
    policy = load_policy(out, model.names, model.space)
    of = costs(model)
    assert of["avg_bits"](policy) <= 3
    assert of["bitops"](policy) <= 0.7 * of["bitops"].widest
    assert reads["splits"][-1] == "test[:100]"
    assert set(reads["splits"][:-1]) == {"train[256:]"}
    assert reads["top1"] == [(100, 1 + 3)]
    assert lines[-1] == "Test data: 100 images, read once, after the search."
    assert f"{name}: " in lines[-2]
    assert "on 64 images of train[256:];" in lines[-2]
    assert "trained on them" not in lines[-2]
    assert [line.split("|")[1].strip() for line in lines[2:6]] == [
        *("found", "all 2 bits", "all 3 bits", "all 4 bits")
    ]


def test_the_policy_file_says_how_it_was_found(workdir, model, tmp_path):
    out = tmp_path / "policy.json"
    search(workdir, ["avg_bits=3"], out, **SMALL)
    content = json.loads(out.read_text())
    policy = load_policy(out, model.names, model.space)
    loaded = load(workdir)
    network, variables = loaded.model, loaded.variables
    assert content["weights_digest"] == digest(variables)
    assert content["budget"] == {"avg_bits": 3.0}
    assert content["cost"] == {
        **{name: float(cost(policy)) for name, cost in costs(model).items()},
        "activation_peak": float(activation_peak(model, policy)),
    }
    about = content["search"]
    assert (about["method"], about["seed"], about["split"]) == ("greedy", 0, "train[256:]")
    assert about["images"] == 64
    assert 0 <= about["top1"] <= 1
    test = data.load("digits", "test[:100]")
    evaluator = Evaluator(network, test, test.mean, test.std, batch_size=500)
    top1 = float(evaluator.top1(variables, policy[None])[0])
    assert content["test"] == {"examples": 100, "top1": top1}


def test_a_search_run_again_measures_nothing_and_finds_the_same(workdir, tmp_path, monkeypatch):
    contents = []
    for name in ("one.json", "two.json"):
        settings = dict(method="evolution", **SMALL)
        search(workdir, ["bitops=60%"], tmp_path / name, **settings)
        contents.append(json.loads((tmp_path / name).read_text()))
        del contents[-1]["search"]["seconds"]
        monkeypatch.setattr(Evaluator, "scores", measured_nothing(Evaluator.scores))
    assert contents[0] == contents[1]


def measured_nothing(scores):
    """Evaluator.scores that fails for images of the search."""

    def only_test(self, variables, policies, *rest):
        assert self.examples == 100
        return scores(self, variables, policies, *rest)

    return only_test


def test_hessian_sensitivities_need_no_measurement_but_that_of_the_solution(
    workdir, model, tmp_path, monkeypatch
):
    table = np.tile([0.9, 0.3, 0.0], (6, 1))
    monkeypatch.setattr(session.hessian, "sensitivity", lambda *arguments: table)
    monkeypatch.setitem(METHODS, "ilp", functools.partial(IntegerProgram, rounds=0))
    out = tmp_path / "policy.json"
    settings = dict(method="ilp", sensitivity="hessian", **SMALL)
    lines = search(workdir, ["avg_bits=3"], out, **settings)
    assert load_policy(out, model.names, model.space).tolist() == [3] * 6
    assert "ilp: 1 policies evaluated" in lines[-2]


def test_other_seeds_see_other_images(workdir):
    one, again, other = (
        open_session(workdir, images=64, seed=seed).data.images for seed in (0, 0, 1)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_scores_of_other_images_are_kept_apart(workdir, tmp_path):
    before = set((pathlib.Path(workdir) / "search").iterdir())
    for number in (16, 17):
        settings = dict(images=number, method="random", evaluations=2)
        search(workdir, ["avg_bits=3"], tmp_path / f"{number}.json", **settings)
    after = set((pathlib.Path(workdir) / "search").iterdir())
    assert len(after - before) == 2


def test_a_stage_is_searched_in_the_folder_of_its_run(workdir, tmp_path):
    settings = dict(images=16, method="random", evaluations=2)
    search(f"{workdir}@mixed", ["avg_bits=3"], tmp_path / "policy.json", **settings)
    assert not pathlib.Path(f"{workdir}@mixed").exists()


def test_a_stage_without_mixed_widths_is_refused_in_one_line(workdir, tmp_path):
    with pytest.raises(UserError, match="never visited in training") as caught:
        search(f"{workdir}@weights", ["avg_bits=3"], tmp_path / "policy.json", **SMALL)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "policy.json").exists()


def test_a_latency_file_is_a_budget_of_its_own(workdir, model, tmp_path):
    layers = {name: {"2": 1.5e-3, "3": 1e-3, "4": 2e-3} for name in model.names}
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"format": "bitmixer-latency", "version": 1, "layers": layers}))
    out = tmp_path / "policy.json"
    settings = dict(method="ilp", latency=path, **SMALL)
    search(workdir, ["latency_ms=6.1"], out, **settings)
    assert load_policy(out, model.names, model.space).tolist() == [3] * 6
    assert json.loads(out.read_text())["cost"]["latency_ms"] == pytest.approx(6)


# --- mistakes ---


def test_a_policy_that_is_there_is_refused_before_any_work(no_network, workdir, tmp_path, capsys):
    out = tmp_path / "policy.json"
    out.write_text("mine")
    assert run("search", "--workdir", workdir, "--budget", "avg_bits=3", "--out", out) == 2
    said = capsys.readouterr().err
    assert re.search(r"--out .*policy.json: already exists.*--overwrite", said)
    assert out.read_text() == "mine"


def test_a_policy_that_is_there_is_overwritten_when_asked(workdir, model, tmp_path):
    out = tmp_path / "policy.json"
    out.write_text("mine")
    settings = dict(method="random", **SMALL)
    search(workdir, ["avg_bits=3"], out, **settings, overwrite=True)
    assert load_policy(out, model.names, model.space).mean() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


@pytest.mark.parametrize("where", ["none/policy.json", "."])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    no_network, workdir, tmp_path, capsys, where
):
    out = tmp_path / where
    assert run("search", "--workdir", workdir, "--budget", "avg_bits=3", "--out", out) == 2
    assert capsys.readouterr().err.startswith(f"bitmixer: --out {out}")


def test_a_budget_out_of_reach_measures_nothing(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluator, "scores", None)
    for budget in ("avg_bits=1.9", "bits=3"):
        with pytest.raises(UserError, match="budget"):
            search(workdir, [budget], tmp_path / "policy.json", **SMALL)
    assert not (tmp_path / "policy.json").exists()


@pytest.mark.parametrize("split", ["test", "test[:50]", "test[100:]"])
def test_test_data_are_refused_for_the_search(workdir, tmp_path, reads, split):
    with pytest.raises(UserError, match="that is test data; search on training data"):
        search(workdir, ["avg_bits=3"], tmp_path / "policy.json", split=split, **SMALL)
    assert reads["splits"] == []


@pytest.mark.parametrize("split", ["tset", "train[", "train[5:5]", "train[2000:]"])
def test_a_split_that_there_is_not_is_one_line(workdir, tmp_path, split):
    with pytest.raises(UserError, match="split") as caught:
        search(workdir, ["avg_bits=3"], tmp_path / "policy.json", split=split, **SMALL)
    assert len(str(caught.value).splitlines()) == 1


def test_a_float_twin_has_nothing_to_search(trained_float, tmp_path):
    for run in (
        lambda: search(str(trained_float), ["avg_bits=3"], tmp_path / "policy.json", **SMALL),
        lambda: search_front(trained_float, "bitops", **SMALL),
    ):
        with pytest.raises(UserError, match="full-precision baseline has no widths to search"):
            run()
    assert not (trained_float / "search").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gredy"}, r"method 'gredy'; did you mean greedy\?.*'ilp'"),
        ({"method": ""}, "method ''"),
        ({"sensitivity": "hesian"}, r"sensitivity 'hesian'; did you mean hessian\?"),
        ({"images": 0}, "images 0: give 1 or more"),
        ({"evaluations": 0}, "evaluations 0: give 1 or more"),
    ],
)
def test_settings_that_are_not_allowed_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        SearchSettings(**changes)


# --- which images score policies ---


@pytest.fixture
def as_if_trained_on(monkeypatch):
    """``as_if_trained_on(split)``: the runs that are loaded say so."""

    def change(split):
        def changed(source):
            loaded = load(source)
            run = dataclasses.replace(loaded.run, train_split=split)
            return dataclasses.replace(loaded, run=run)

        monkeypatch.setattr(session, "load", changed)

    return change


def test_images_that_were_trained_on_are_said_to_be(workdir, tmp_path, as_if_trained_on, reads):
    as_if_trained_on("train")
    settings = dict(method="random", images=16, evaluations=2)
    lines = search(workdir, ["avg_bits=3"], tmp_path / "policy.json", **settings)
    assert reads["splits"][0] == "train"
    assert "on 16 images of train; the network was trained on them: train with" in lines[-2]
    assert "config.train_split=train[:90%]" in lines[-2]


def test_a_split_that_was_asked_for_is_used(workdir, as_if_trained_on):
    as_if_trained_on("train[:90%]")
    opened = SearchSession(session.load(workdir), SearchSettings(split="train[1400:]"))
    assert opened.split == "train[1400:]"
    assert len(opened.data) == 37
    assert not opened.seen_in_training


def test_block_selection_searches_whole_blocks(workdir, model, tmp_path, monkeypatch):
    def blocks(source):
        loaded = load(source)
        return dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, selection="block"))

    monkeypatch.setattr(session, "load", blocks)
    out = tmp_path / "policy.json"
    search(workdir, ["avg_bits=3"], out, **SMALL)
    policy = load_policy(out, model.names, model.space)
    assert policy[::2].tolist() == policy[1::2].tolist()


# --- fronts ---


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
        assert 0 <= point.test_top1 <= 1
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


@pytest.mark.parametrize("name", ["greedy", "ilp", "random"])
def test_every_method_draws_a_front(workdir, model, tmp_path, name):
    settings = dict(method=name, images=64, evaluations=8)
    front, opened = search_front(workdir, "avg_bits", random=0, **settings)
    lines = describe_front(front, opened)
    shown = [line for line in lines if line.startswith("| ") and "," in line]
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
    assert "front.json: already exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["front.json"]


def test_a_front_in_place_of_a_file_is_refused_before_any_work(
    no_network, workdir, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "front"):
        assert run("front", "--workdir", workdir, "--out", out) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"bitmixer: --out {out}")
        assert "cannot write" in said


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ("bitop", "did you mean bitops"),
        ("latency_ms", "give a latency file"),
        ("flops", "one of avg_bits, "),
    ],
)
def test_an_unknown_cost_measures_nothing(workdir, tmp_path, monkeypatch, cost, message):
    monkeypatch.setattr(Evaluator, "scores", None)
    with pytest.raises(UserError, match=message):
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
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bitmixer_jax.files.write_whole", full)
    out = tmp_path / "new" / "front"
    words = ["front", "--workdir", workdir, "--out", out, "--cost", "bytes", "--random", 2]
    assert run(*words, "--images", 16) == 2
    assert re.search(r"No space left on device.*make room", capsys.readouterr().err)
    assert not out.exists()
