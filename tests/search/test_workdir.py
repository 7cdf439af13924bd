"""Searches of a trained network: budgets kept, test data read once, files, honest words."""

import dataclasses
import errno
import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
from bitmixer_jax.search.workdir import Settings, Trained, front_workdir, search_workdir

from bitmixer_jax import data
from bitmixer_jax.cost import activation_peak, costs
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Evaluator
from bitmixer_jax.front import load_front
from bitmixer_jax.policy import load_policy
from bitmixer_jax.search import METHODS, IntegerProgram, Problem
from bitmixer_jax.search import workdir as workdirs
from bitmixer_jax.training import load_trained
from bitmixer_jax.training.checkpoints import digest

SMALL = dict(images=64, evaluations=24)


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """A copy of the trained run: searches write into it."""
    return str(shutil.copytree(trained, tmp_path_factory.mktemp("searched") / "run"))


@pytest.fixture(scope="module")
def model(trained):
    return load_trained(trained)[1]


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


@pytest.fixture
def no_network(monkeypatch):
    """Fails where a network is loaded: the mistake must be found before the work."""

    def load(source):
        raise AssertionError("the network was loaded")

    monkeypatch.setattr(workdirs, "load_trained", load)


# --- a policy within a budget ---


@pytest.mark.parametrize("name", METHODS)
def test_a_search_writes_a_policy_within_the_budget_and_reads_test_data_once(
    workdir, model, reads, tmp_path, name
):
    out = tmp_path / "policy.json"
    budget = ["avg_bits=3", "bitops=70%"]
    lines = search_workdir(workdir, budget, out, Settings(method=name, **SMALL))
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
    search_workdir(workdir, ["avg_bits=3"], out, Settings(**SMALL))
    content = json.loads(out.read_text())
    policy = load_policy(out, model.names, model.space)
    _, network, variables = load_trained(workdir)
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
        settings = Settings(method="evolution", **SMALL)
        search_workdir(workdir, ["bitops=60%"], tmp_path / name, settings)
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
    monkeypatch.setattr(workdirs.hessian, "sensitivity", lambda *arguments: table)
    monkeypatch.setitem(METHODS, "ilp", functools.partial(IntegerProgram, rounds=0))
    out = tmp_path / "policy.json"
    settings = Settings(method="ilp", sensitivity="hessian", **SMALL)
    lines = search_workdir(workdir, ["avg_bits=3"], out, settings)
    assert load_policy(out, model.names, model.space).tolist() == [3] * 6
    assert "ilp: 1 policies evaluated" in lines[-2]


def test_other_seeds_see_other_images(workdir):
    one, again, other = (
        Trained(workdir, Settings(images=64, seed=seed)).data.images for seed in (0, 0, 1)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_scores_of_other_images_are_kept_apart(workdir, tmp_path):
    before = set((pathlib.Path(workdir) / "search").iterdir())
    for number in (16, 17):
        settings = Settings(images=number, method="random", evaluations=2)
        search_workdir(workdir, ["avg_bits=3"], tmp_path / f"{number}.json", settings)
    after = set((pathlib.Path(workdir) / "search").iterdir())
    assert len(after - before) == 2


def test_a_stage_is_searched_in_the_folder_of_its_run(workdir, tmp_path):
    settings = Settings(images=16, method="random", evaluations=2)
    search_workdir(f"{workdir}@mixed", ["avg_bits=3"], tmp_path / "policy.json", settings)
    assert not pathlib.Path(f"{workdir}@mixed").exists()


def test_a_stage_without_mixed_widths_is_refused_in_one_line(workdir, tmp_path):
    with pytest.raises(UserError, match="never visited in training") as caught:
        search_workdir(
            f"{workdir}@weights", ["avg_bits=3"], tmp_path / "policy.json", Settings(**SMALL)
        )
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "policy.json").exists()


def test_a_latency_file_is_a_budget_of_its_own(workdir, model, tmp_path):
    layers = {name: {"2": 1.5e-3, "3": 1e-3, "4": 2e-3} for name in model.names}
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"format": "bitmixer-latency", "version": 1, "layers": layers}))
    out = tmp_path / "policy.json"
    settings = Settings(method="ilp", latency=path, **SMALL)
    search_workdir(workdir, ["latency_ms=6.1"], out, settings)
    assert load_policy(out, model.names, model.space).tolist() == [3] * 6
    assert json.loads(out.read_text())["cost"]["latency_ms"] == pytest.approx(6)


# --- mistakes ---


def test_a_policy_that_is_there_is_refused_before_any_work(no_network, workdir, tmp_path):
    out = tmp_path / "policy.json"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"--out .*policy.json: .*already exists.*--overwrite"):
        search_workdir(workdir, ["avg_bits=3"], out, Settings(**SMALL))
    assert out.read_text() == "mine"


def test_a_policy_that_is_there_is_overwritten_when_asked(workdir, model, tmp_path):
    out = tmp_path / "policy.json"
    out.write_text("mine")
    settings = Settings(method="random", **SMALL)
    search_workdir(workdir, ["avg_bits=3"], out, settings, overwrite=True)
    assert load_policy(out, model.names, model.space).mean() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


@pytest.mark.parametrize("where", ["none/policy.json", "."])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    no_network, workdir, tmp_path, where
):
    with pytest.raises(UserError, match="--out"):
        search_workdir(workdir, ["avg_bits=3"], tmp_path / where, Settings(**SMALL))


def test_a_budget_out_of_reach_measures_nothing(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluator, "scores", None)
    for budget in ("avg_bits=1.9", "bits=3"):
        with pytest.raises(UserError, match="budget"):
            search_workdir(workdir, [budget], tmp_path / "policy.json", Settings(**SMALL))
    assert not (tmp_path / "policy.json").exists()


@pytest.mark.parametrize("split", ["test", "test[:50]", "test[100:]"])
def test_test_data_are_refused_for_the_search(workdir, tmp_path, reads, split):
    with pytest.raises(UserError, match="that is test data; search on training data"):
        search_workdir(
            workdir, ["avg_bits=3"], tmp_path / "policy.json", Settings(split=split, **SMALL)
        )
    assert reads["splits"] == []


@pytest.mark.parametrize("split", ["tset", "train[", "train[5:5]", "train[2000:]"])
def test_a_split_that_there_is_not_is_one_line(workdir, tmp_path, split):
    with pytest.raises(UserError, match="split") as caught:
        search_workdir(
            workdir, ["avg_bits=3"], tmp_path / "policy.json", Settings(split=split, **SMALL)
        )
    assert len(str(caught.value).splitlines()) == 1


def test_a_float_twin_has_nothing_to_search(trained_float, tmp_path):
    for run in (
        lambda: search_workdir(
            str(trained_float), ["avg_bits=3"], tmp_path / "policy.json", Settings(**SMALL)
        ),
        lambda: front_workdir(str(trained_float), "bitops", tmp_path / "out", Settings(**SMALL)),
    ):
        with pytest.raises(UserError, match="float twin"):
            run()
    assert not (trained_float / "search").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gredy"}, r"--method 'gredy'; did you mean greedy\?.*'ilp'"),
        ({"method": ""}, "--method ''"),
        ({"sensitivity": "hesian"}, r"--sensitivity 'hesian'; did you mean hessian\?"),
        ({"images": 0}, "--images 0: give 1 or more"),
        ({"evaluations": 0}, "--evaluations 0: give 1 or more"),
    ],
)
def test_settings_that_are_not_allowed_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        Settings(**changes)


# --- which images score policies ---


@pytest.fixture
def as_if_trained_on(monkeypatch):
    """``as_if_trained_on(split)``: the runs that are loaded say so."""

    def change(split):
        def load(source):
            run, model, variables = load_trained(source)
            return dataclasses.replace(run, train_split=split), model, variables

        monkeypatch.setattr(workdirs, "load_trained", load)

    return change


def test_images_that_were_trained_on_are_said_to_be(workdir, tmp_path, as_if_trained_on, reads):
    as_if_trained_on("train")
    settings = Settings(method="random", images=16, evaluations=2)
    lines = search_workdir(workdir, ["avg_bits=3"], tmp_path / "policy.json", settings)
    assert reads["splits"][0] == "train"
    assert "on 16 images of train; the network was trained on them: train with" in lines[-2]
    assert "config.train_split=train[:90%]" in lines[-2]


def test_a_split_that_was_asked_for_is_used(workdir, as_if_trained_on):
    as_if_trained_on("train[:90%]")
    trained = Trained(workdir, Settings(split="train[1400:]"))
    assert trained.split == "train[1400:]"
    assert len(trained.data) == 37
    assert not trained.seen_in_training


def test_block_selection_searches_whole_blocks(workdir, model, tmp_path, monkeypatch):
    def load(source):
        run, network, variables = load_trained(source)
        return dataclasses.replace(run, selection="block"), network, variables

    monkeypatch.setattr(workdirs, "load_trained", load)
    out = tmp_path / "policy.json"
    search_workdir(workdir, ["avg_bits=3"], out, Settings(**SMALL))
    policy = load_policy(out, model.names, model.space)
    assert policy[::2].tolist() == policy[1::2].tolist()


# --- fronts ---


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


def test_a_search_needs_no_more_policies_than_it_says(workdir):
    trained = Trained(workdir, Settings(**SMALL))
    problem = Problem(
        space=trained.model.space, groups=trained.groups, objective=trained.costs["bytes"]
    )
    for name in METHODS:
        settings = Settings(method=name, **SMALL)
        trained.settings = settings
        found = trained.search(problem)
        assert len(found.policies) <= trained.method(problem).evaluations(problem)
        assert trained.about_search(found)["evaluations"] == len(found.policies)


def test_a_front_that_cannot_be_written_leaves_no_folder(workdir, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bitmixer_jax.files.write_whole", full)
    out = tmp_path / "new" / "front"
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        front_workdir(workdir, "bytes", out, Settings(images=16, method="greedy"), random=2)
    assert not out.exists()
