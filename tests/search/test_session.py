"""Searches of a trained network: budgets kept, test data read once, files, honest words."""

import functools
import json
import pathlib
import shutil

import numpy as np
import pytest

from bitmixer_jax import data
from bitmixer_jax.cost import activation_peak, costs
from bitmixer_jax.evaluation import Evaluator
from bitmixer_jax.policy import load_policy
from bitmixer_jax.search import (
    METHODS,
    IntegerProgram,
    SearchSession,
    SearchSettings,
    search_front,
    session,
)
from bitmixer_jax.trained import load
from bitmixer_jax.training.checkpoints import digest
from tests.refusals import check_line, refused
from tests.search.runs import SMALL, open_session, run, search

# --- a policy within a budget ---


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "greedy" else pytest.mark.slow) for name in METHODS],
)
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
    searched = open_session(workdir, **SMALL).data
    size = loaded.run.evaluate_batch
    evaluator = Evaluator(network, searched, searched.mean, searched.std, batch_size=size)
    scores = evaluator.scores(variables, policy[None])
    assert (about["top1"], about["loss"]) == (scores.top1[0], scores.loss[0])
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


@pytest.mark.slow
def test_scores_of_other_images_are_kept_apart(workdir, tmp_path):
    before = set((pathlib.Path(workdir) / "search").iterdir())
    for number, seed in ((16, 0), (17, 0), (17, 1)):
        settings = dict(images=number, seed=seed, method="random", evaluations=2)
        search(workdir, ["avg_bits=3"], tmp_path / f"{number}-{seed}.json", **settings)
    after = set((pathlib.Path(workdir) / "search").iterdir())
    assert len(after - before) == 3


def test_a_stage_is_searched_in_the_folder_of_its_run(workdir, tmp_path):
    settings = dict(images=16, method="random", evaluations=2)
    search(f"{workdir}@mixed", ["avg_bits=3"], tmp_path / "policy.json", **settings)
    assert not pathlib.Path(f"{workdir}@mixed").exists()


def test_a_stage_without_mixed_widths_is_refused_in_one_line(workdir, tmp_path):
    with refused("uncalibrated", "->"):
        search(f"{workdir}@weights", ["avg_bits=3"], tmp_path / "policy.json", **SMALL)
    assert not (tmp_path / "policy.json").exists()


@pytest.mark.slow
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
    check_line(capsys.readouterr().err, "--overwrite", start=f"bitmixer: --out {out}: ")
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
    check_line(capsys.readouterr().err, start=f"bitmixer: --out {out}: ")


def test_a_budget_out_of_reach_measures_nothing(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluator, "scores", None)
    for budget, code in (("avg_bits=1.9", "out-of-reach"), ("bits=3", "unknown-name")):
        with refused(code, budget.partition("=")[0]):
            search(workdir, [budget], tmp_path / "policy.json", **SMALL)
    assert not (tmp_path / "policy.json").exists()


@pytest.mark.parametrize("split", ["test", "test[:50]", "test[100:]"])
def test_test_data_are_refused_for_the_search(workdir, tmp_path, reads, split):
    with refused("test-data", split):
        search(workdir, ["avg_bits=3"], tmp_path / "policy.json", split=split, **SMALL)
    assert reads["splits"] == []


@pytest.mark.parametrize(
    ("split", "code"),
    [
        ("tset", "unknown-name"),
        ("train[", "unknown-name"),
        ("train[5:5]", "no-data"),
        ("train[2000:]", "bad-value"),
    ],
)
def test_a_split_that_there_is_not_is_one_line(workdir, tmp_path, split, code):
    with refused(code, repr(split)):
        search(workdir, ["avg_bits=3"], tmp_path / "policy.json", split=split, **SMALL)


def test_a_float_twin_has_nothing_to_search(trained_float, tmp_path):
    for search_it in (
        lambda: search(str(trained_float), ["avg_bits=3"], tmp_path / "policy.json", **SMALL),
        lambda: search_front(trained_float, "bitops", **SMALL),
    ):
        with refused("no-widths", trained_float):
            search_it()
    assert not (trained_float / "search").exists()


@pytest.mark.parametrize(
    ("changes", "code", "mentions"),
    [
        ({"method": "gredy"}, "unknown-name", ("'gredy'", "did you mean greedy", "'ilp'")),
        ({"method": ""}, "unknown-name", ("''", "'greedy'", "'ilp'")),
        ({"sensitivity": "hesian"}, "unknown-name", ("'hesian'", "did you mean hessian")),
        ({"images": 0}, "bad-value", ("images 0",)),
        ({"evaluations": 0}, "bad-value", ("evaluations 0",)),
        ({"sensitivity": "hessian"}, "conflict", ("hessian", "ilp")),
    ],
)
def test_settings_that_are_not_allowed_are_one_line(changes, code, mentions):
    with refused(code, *mentions):
        SearchSettings(**changes)


def test_scores_are_kept_in_the_workdir_also_where_a_folder_above_has_an_at_sign(trained, tmp_path):
    (tmp_path / "me").mkdir()
    workdir = shutil.copytree(trained, tmp_path / "me@home" / "run")
    found = SearchSession(load(workdir), SearchSettings(**SMALL))
    found.cache(np.asarray([[4] * 6], np.int32))
    assert list((workdir / "search").iterdir())
    assert not list((tmp_path / "me").iterdir())
