"""The book of scores: measured once, remembered across runs, never confused with another's."""

import json

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.cost import costs
from bitmixer_jax.evaluation import Scores
from bitmixer_jax.search import (
    Constraint,
    EvaluationCache,
    Evolution,
    Greedy,
    IntegerProgram,
    Problem,
    Random,
    search,
)
from bitmixer_jax.search.cache import file_name
from tests.refusals import refused

ABOUT = {"network": "0123abcd", "split": "train[256:]", "images": 64}
MODEL = bm.create_model("resnet8", num_classes=10, width=3, image_shape=(8, 8, 1))


def scores(policies):
    """Losses that no two policies of six layers share, and that decimals do not hold exactly."""
    loss = (policies @ np.asarray([1.0, 0.7, 1.3, 0.9, 0.6, 1.1]) + policies[:, 0] ** 2) ** -1.5
    return Scores(1 - loss / 3, loss)


class Measure:
    """A measurement that remembers what it measured, and breaks after so many calls."""

    def __init__(self, calls=None):
        self.calls, self.seen = calls, []

    def __call__(self, policies):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls = None if self.calls is None else self.calls - 1
        self.seen += [tuple(policy) for policy in policies.tolist()]
        return scores(policies)


def policies_of(*rows):
    return np.asarray(rows, np.int32)


A, B, C = [4] * 6, [2] * 6, [2, 3, 4, 4, 3, 2]


@pytest.fixture
def path(tmp_path):
    """Where a book is kept: a folder that is not there yet."""
    return tmp_path / "search" / "scores.jsonl"


@pytest.fixture
def written(path):
    """The path of a book that knows A and B."""
    EvaluationCache(Measure(), path, ABOUT)(policies_of(A, B))
    return path


# --- what is known ---


@pytest.mark.parametrize("kept", [True, False])
def test_what_was_measured_is_not_measured_again(path, kept):
    measure = Measure()
    book = EvaluationCache(measure, path if kept else None, ABOUT)
    wanted = scores(policies_of(A, B, C))
    book(policies_of(A, B))
    found = book(policies_of(A, B, C))
    assert measure.seen == [tuple(A), tuple(B), tuple(C)]
    assert found.loss.tolist() == wanted.loss.tolist()
    assert found.top1.tolist() == wanted.top1.tolist()
    assert book.measured == 3
    assert path.exists() == kept


def test_a_policy_asked_for_twice_at_once_is_measured_once():
    measure = Measure()
    found = EvaluationCache(measure, None, ABOUT)(policies_of(C, A, C))
    assert measure.seen == [tuple(C), tuple(A)]
    assert found.loss.tolist() == scores(policies_of(C, A, C)).loss.tolist()


def test_another_book_of_the_same_file_knows_it_bit_for_bit(written):
    measure = Measure()
    book = EvaluationCache(measure, written, ABOUT)
    found = book(policies_of(B, C, A))
    assert measure.seen == [tuple(C)]
    assert book.measured == 1
    assert found.loss.tolist() == scores(policies_of(B, C, A)).loss.tolist()
    assert found.top1.tolist() == scores(policies_of(B, C, A)).top1.tolist()
    again = Measure(calls=0)
    assert EvaluationCache(again, written, ABOUT)(policies_of(A, B, C)).loss.shape == (3,)


def test_two_books_of_one_file_at_once_lose_nothing(path):
    one, two = (EvaluationCache(Measure(), path, ABOUT) for _ in range(2))
    one(policies_of(A))
    two(policies_of(B, A))
    one(policies_of(C))
    third = EvaluationCache(Measure(calls=0), path, ABOUT)
    assert third(policies_of(A, B, C)).loss.tolist() == scores(policies_of(A, B, C)).loss.tolist()


def test_a_book_knows_how_long_its_policies_took_when_they_were_measured(written):
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    book = EvaluationCache(Measure(), written, ABOUT)
    assert book.seconds == 0
    book(policies_of(A, B, A))
    assert book.seconds == pytest.approx(sum(line["seconds"] for line in lines[1:]))
    assert book.measured == 0


def test_the_file_says_what_was_measured(written):
    header, *lines = (json.loads(line) for line in written.read_text().splitlines())
    assert header == {"format": "bitmixer-scores", "version": 1, **ABOUT}
    assert [line["widths"] for line in lines] == [A, B]
    assert set(lines[0]) == {"widths", "top1", "loss", "seconds"}


def test_file_names_differ_by_what_was_measured():
    names = {
        file_name({**ABOUT, **change})
        for change in ({}, {"network": "other"}, {"images": 65}, {"seed": 0})
    }
    assert len(names) == 4
    assert file_name(dict(reversed(ABOUT.items()))) == file_name(ABOUT)


# --- files that were cut short, damaged, or are of something else ---


def test_every_cut_of_the_last_line_is_mended(written):
    whole = written.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (*range(last + 1, len(whole), 11), len(whole) - 1):
        written.write_bytes(whole[:cut])
        measure = Measure()
        EvaluationCache(measure, written, ABOUT)(policies_of(A, B))
        assert measure.seen == [tuple(B)]
        assert EvaluationCache(Measure(calls=0), written, ABOUT)(policies_of(A, B)).loss.shape == (
            2,
        )


def test_a_file_that_is_empty_is_begun_anew(path):
    path.parent.mkdir()
    path.write_text("")
    EvaluationCache(Measure(), path, ABOUT)(policies_of(A))
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "other", [{**ABOUT, "network": "other"}, {**ABOUT, "images": 65}, {}, {**ABOUT, "more": 1}]
)
def test_scores_of_something_else_are_refused_and_kept(written, other):
    before = written.read_bytes()
    with refused("other-network", written):
        EvaluationCache(Measure(), written, other)
    assert written.read_bytes() == before


GOOD = {"widths": C, "top1": 0.5, "loss": 0.5, "seconds": 0.1}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"text"',
        *(json.dumps({k: v for k, v in GOOD.items() if k != key}) for key in GOOD),
        *(json.dumps({**GOOD, key: None}) for key in GOOD),
        json.dumps({**GOOD, "loss": "much"}),
        json.dumps({**GOOD, "top1": [0.5]}),
        json.dumps({**GOOD, "widths": 4}),
        json.dumps({**GOOD, "widths": [C]}),
        json.dumps(GOOD) + json.dumps(GOOD),
    ],
)
def test_a_damaged_line_is_refused_with_a_way_out(written, line):
    lines = written.read_text().splitlines()
    written.write_text("\n".join([*lines[:2], line, *lines[2:], ""]))
    with refused("damaged", written):
        EvaluationCache(Measure(), written, ABOUT)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        *((text, "other-network") for text in ("{}\n", "[]\n", "null\n")),
        *((text, "damaged") for text in ("text\n", "\n")),
    ],
)
def test_a_file_of_another_kind_is_refused(path, text, code):
    path.parent.mkdir()
    path.write_text(text)
    with refused(code, path):
        EvaluationCache(Measure(), path, ABOUT)


def test_a_place_that_cannot_be_written_is_one_line_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "scores.jsonl", tmp_path / "folder"):
        with refused("not-writable", place):
            EvaluationCache(Measure(), place, ABOUT)


HEADER = json.dumps({"format": "bitmixer-scores", "version": 1, **ABOUT}) + "\n"


def test_scores_of_another_network_are_said_to_be(path):
    path.parent.mkdir()
    path.write_text(HEADER)
    with refused("other-network", path):
        EvaluationCache(Measure(), path, {**ABOUT, "network": "1"})


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
def test_lines_with_anything_in_them_are_refused(path, line):
    path.parent.mkdir()
    path.write_bytes(HEADER.encode() + line + b"\n")
    with refused("damaged", path):
        EvaluationCache(Measure(), path, ABOUT)


def test_every_cut_of_the_header_is_mended(path):
    path.parent.mkdir()
    for cut in range(len(HEADER)):
        path.write_text(HEADER[:cut])
        EvaluationCache(Measure(), path, ABOUT)(policies_of(A))
        assert path.read_text().startswith(HEADER)
        assert len(path.read_text().splitlines()) == 2
        EvaluationCache(Measure(), path, ABOUT)


def test_scores_that_cannot_be_noted_are_one_line(path):
    path.parent.mkdir()
    book = EvaluationCache(Measure(), path, ABOUT)
    path.mkdir()
    with refused("not-writable", path):
        book(policies_of(A))


# --- searches that were stopped ---


METHODS = {
    "greedy": Greedy(),
    "ilp": IntegerProgram(),
    "evolution": Evolution(policies=60, population=8),
    "random": Random(policies=40, batch=8),
}


def run(method, limits, score):
    of = costs(MODEL)
    found = tuple(Constraint(cost=of[name], upper_bound=most) for name, most in limits)
    groups = MODEL.groups("layer")
    problem = Problem(space=MODEL.space, groups=groups, objective=of["avg_bits"], constraints=found)
    found = search(problem, method, score, seed=3)
    return found.policies.tolist(), found.scores.loss.tolist(), found.best(), found.front()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("limits", [(), (("avg_bits", 2.5),)], ids=["front", "budget"])
def test_a_search_stopped_again_and_again_ends_as_one_that_was_not(path, name, limits):
    whole = Measure()
    wanted = run(METHODS[name], limits, EvaluationCache(whole, None, ABOUT))
    seen, stops = [], 0
    while True:
        measure = Measure(calls=2 if name == "greedy" else 1)
        try:
            found = run(METHODS[name], limits, EvaluationCache(measure, path, ABOUT))
        except KeyboardInterrupt:
            stops += 1
            seen += measure.seen
            with path.open("a") as file:  # and was just writing
                file.write('{"widths": [2, 3')
            continue
        seen += measure.seen
        break
    assert found == wanted
    assert seen == whole.seen
    assert stops >= 1


def test_methods_share_what_they_know(path):
    run(METHODS["random"], (), EvaluationCache(Measure(), path, ABOUT))
    alone, after = Measure(), Measure()
    wanted = run(METHODS["greedy"], (), EvaluationCache(alone, None, ABOUT))
    assert run(METHODS["greedy"], (), EvaluationCache(after, path, ABOUT)) == wanted
    assert set(after.seen) < set(alone.seen)
