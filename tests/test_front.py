"""Pareto fronts: which points are kept, and files that hold them, whole or damaged."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.front import Front, Point, load_front, pareto
from tests.refusals import check_line, refused

SPACE = bm.BitSpace((2, 3, 4))
NAMES = ("stage1.conv1", "stage1.conv2", "stage2.conv1")
POINTS = (
    Point(widths=(2, 2, 2), cost=100.0, loss=0.75, top1=0.5, test_top1=0.25),
    Point(widths=(2, 3, 2), cost=150.5, loss=0.5, top1=0.625),
    Point(widths=(4, 4, 4), cost=400.0, loss=0.25, top1=0.75, test_top1=1.0),
)


def make(**changes):
    front = Front(
        points=POINTS,
        names=NAMES,
        choices=SPACE.choices,
        cost="bitops",
        unit="BitOPs",
        weights_digest="0123abcd",
        notes={"search": {"method": "ilp", "seed": 0}, "uniform": []},
    )
    return dataclasses.replace(front, **changes)


# --- which points are kept ---


def beaten(i, costs, losses):
    """Whether another point is at least as good in both and better in one, or equal and before."""
    return any(
        costs[j] <= costs[i]
        and losses[j] <= losses[i]
        and (costs[j] < costs[i] or losses[j] < losses[i] or j < i)
        for j in range(len(costs))
        if j != i
    )


@pytest.mark.parametrize("values", [2, 5, 20, 10_000])
def test_the_front_is_what_no_other_point_beats(values):
    rng = np.random.default_rng(values)
    for size in (1, 2, 3, 10, 60):
        for _ in range(10):
            costs, losses = rng.integers(values, size=(2, size)) / values
            kept = pareto(costs, losses)
            wanted = [i for i in range(size) if not beaten(i, costs, losses)]
            assert sorted(kept.tolist()) == wanted
            assert (np.diff(costs[kept]) > 0).all()
            assert (np.diff(losses[kept]) < 0).all()


def test_of_equal_points_the_first_is_kept():
    assert pareto(np.asarray([2.0, 1.0, 1.0]), np.asarray([0.5, 0.5, 0.5])).tolist() == [1]


def test_of_no_points_none_is_kept():
    assert pareto(np.zeros(0), np.zeros(0)).tolist() == []


def test_best_is_the_last_point_within_the_budget():
    front = make()
    found = {cost: front.best(cost) for cost in (99.9, 100, 150, 150.5, 1e9)}
    assert found[99.9] is None
    assert found[100] == found[150] == POINTS[0]
    assert found[150.5] == POINTS[1]
    assert found[1e9] == POINTS[2]


# --- files ---


def load(path, weights_digest="0123abcd"):
    return load_front(path, NAMES, SPACE, weights_digest)


@pytest.fixture
def file(tmp_path):
    """A front file."""
    path = tmp_path / "front.json"
    make().save(path)
    return path


def test_a_front_reads_back(file):
    assert load(file) == make()
    assert load(str(file), weights_digest=None) == make()


def test_a_front_file_holds_what_the_format_says_and_the_notes(file):
    content = json.loads(file.read_text())
    assert content["format"] == "bitmixer-front"
    assert content["version"] == 1
    assert content["choices"] == [2, 3, 4]
    assert content["layers"] == list(NAMES)
    assert content["points"][1] == {
        "widths": [2, 3, 2],
        "cost": 150.5,
        "loss": 0.5,
        "top1": 0.625,
        "test_top1": None,
    }
    assert content["search"] == {"method": "ilp", "seed": 0}


def test_a_front_that_is_there_is_not_overwritten_unasked(file):
    make().save(file)  # the same content again is no loss
    with refused("exists", file):
        make(cost="bytes").save(file)
    assert load(file) == make()
    make(cost="bytes").save(file, overwrite=True)
    assert load(file).cost == "bytes"
    assert [path.name for path in file.parent.iterdir()] == ["front.json"]


def test_a_front_that_cannot_be_written_is_one_line(tmp_path):
    for path in (tmp_path / "none" / "front.json", tmp_path):
        with refused("not-writable", path):
            make().save(path)


def changed_point(i=1, **values):
    entries = [dataclasses.asdict(point) for point in POINTS]
    entries[i].update(values)
    return {"points": entries}


@pytest.mark.parametrize(
    ("changes", "code", "mentions"),
    [
        ({"format": "bitmixer-policy"}, "wrong-format", ('"bitmixer-front"',)),
        ({"version": 2}, "wrong-format", (2, 1)),
        ({"version": None}, "wrong-format", (None, 1)),
        ({"choices": [2, 4, 8]}, "other-network", ("choices",)),
        ({"layers": list(NAMES[:2])}, "other-network", ("layers",)),
        ({"layers": None}, "other-network", ("layers",)),
        ({"weights_digest": "other"}, "other-network", ("weights",)),
        ({"weights_digest": None}, "other-network", ("weights",)),
        ({"points": []}, "damaged", ()),
        ({"points": None}, "damaged", ()),
        ({"points": {}}, "damaged", ()),
        ({"points": 3}, "damaged", ()),
        ({"points": "points"}, "damaged", ("'p'",)),
        ({"points": [None]}, "damaged", (None,)),
        ({"points": [{}]}, "damaged", ("[]",)),
        ({"points": [["widths", "cost", "loss", "top1", "test_top1"]]}, "damaged", ("'widths'",)),
        ({"cost": None}, "damaged", ("cost, unit and weights_digest",)),
        ({"unit": 5}, "damaged", ("cost, unit and weights_digest",)),
        (changed_point(extra=1), "damaged", ("'extra'",)),
        (changed_point(widths=[2, 3]), "policy-length", (2, 3)),
        (changed_point(widths=[]), "policy-form", ((2, 3, 4),)),
        (changed_point(widths=[2, 3, 5]), "policy-width", (5, (2, 3, 4))),
        (changed_point(widths=[2, 3, 2**70]), "policy-form", ((2, 3, 4),)),
        (changed_point(widths=[2, 3, 2.0]), "damaged", ("widths",)),
        (changed_point(widths=[True, 3, 2]), "damaged", ("widths",)),
        (changed_point(widths=[[2, 3, 2]]), "damaged", ("widths",)),
        (changed_point(widths="232"), "damaged", ("widths",)),
        (changed_point(widths=None), "damaged", ("widths",)),
        (changed_point(cost="150"), "damaged", ("cost, loss",)),
        (changed_point(cost=True), "damaged", ("cost, loss",)),
        (changed_point(cost=None), "damaged", ("cost, loss",)),
        (changed_point(loss=float("nan")), "wrong-format", ("NaN",)),
        (changed_point(cost=float("inf")), "wrong-format", ("Infinity",)),
        (changed_point(top1=float("-inf")), "wrong-format", ("-Infinity",)),
        (changed_point(test_top1="0.5"), "damaged", ("cost, loss",)),
        (changed_point(top1=1.5), "damaged", ("0..1",)),
        (changed_point(cost=401.0), "damaged", ()),
        (changed_point(cost=100.0), "damaged", ()),
        (changed_point(loss=0.75), "damaged", ()),
        (changed_point(loss=0.25), "damaged", ()),
        ({"points": [dataclasses.asdict(POINTS[0])] * 2}, "damaged", ()),
        ({"points": [dataclasses.asdict(point) for point in POINTS[::-1]]}, "damaged", ()),
    ],
)
def test_a_front_file_that_does_not_fit_is_one_line_with_its_name(file, changes, code, mentions):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with refused(code, *mentions) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("key", "code"),
    [
        *(("format", "wrong-format"), ("version", "wrong-format")),
        *(("choices", "other-network"), ("layers", "other-network")),
        *(("points", "damaged"), ("cost", "damaged")),
    ],
)
def test_a_front_file_without_a_field_is_refused(file, key, code):
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))
    with refused(code, file, key):
        load(file)


@pytest.mark.parametrize("key", ["widths", "cost", "loss", "top1", "test_top1"])
def test_a_point_without_a_field_is_refused(file, key):
    content = json.loads(file.read_text())
    del content["points"][1][key]
    file.write_text(json.dumps(content))
    with refused("damaged", file):
        load(file)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'"text"', b"[" * 100_000])
def test_a_file_that_holds_no_front_is_refused(file, content):
    file.write_bytes(content)
    with refused("wrong-format", file):
        load(file)


def test_a_front_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    with refused("no-such-file", tmp_path / "none.json"):
        load(tmp_path / "none.json")
    with refused("not-readable", tmp_path):
        load(tmp_path)


# --- files with anything in them ---

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 5, 2**31, 2**63, -(2**70), 10**30),
    *(0.0, -0.0, 2.0, 2.5, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *("", "2", "x" * 1000, "\ud800", [], [2, 3, 4], [[2]], {}, {"2": 3}, [None] * 3),
)


def places(tree, path=()):
    """Paths of all values of a JSON tree."""
    yield path
    items = enumerate(tree) if isinstance(tree, list) else getattr(tree, "items", dict)()
    for key, branch in items:
        yield from places(branch, (*path, key))


def mutated(original, rng):
    """Bytes of a JSON file with something wrong: text damaged, or a value of another kind."""
    text = original.encode()
    kind = rng.integers(6)
    if kind == 0:  # bytes flipped
        damaged = bytearray(text)
        for place in rng.integers(len(text), size=rng.integers(1, 4)):
            damaged[place] ^= 1 << rng.integers(8)
        return bytes(damaged)
    if kind == 1:
        return text[: rng.integers(len(text))]
    if kind == 2:  # a part repeated or left out
        start, stop, other = rng.integers(len(text), size=3)
        return text[:start] + text[min(other, stop) :]
    content = json.loads(original)
    options = list(places(content))
    *path, last = (None, *options[rng.integers(1, len(options))])
    parent = content
    for key in path[1:]:
        parent = parent[key]
    if kind == 3:
        del parent[last]
    elif kind == 4:  # something else of the file
        other = content
        for key in options[rng.integers(len(options))]:
            other = other[key]
        parent[last] = copy.deepcopy(other)
    else:
        value = VALUES[rng.integers(len(VALUES))]
        for _ in range(rng.choice([0, 0, 0, 1, 50, 500])):
            value = [value] if rng.random() < 0.5 else {"points": value}
        parent[last] = value
    return json.dumps(content).encode()


def attempt(load):
    """What ``load`` gives, or None where it refuses in one line."""
    try:
        return load()
    except bm.UserError as error:
        check_line(str(error))
    return None


def test_a_front_file_with_anything_in_it_is_refused_or_is_a_front(file):
    original, rng = file.read_text(), np.random.default_rng(0)
    found = 0
    for _ in range(2000):
        file.write_bytes(mutated(original, rng))
        front = attempt(lambda: load(file))
        if front is None:
            found += 1
            continue
        for point in front.points:
            SPACE.check(point.widths, len(NAMES))
            numbers = [point.cost, point.loss, point.top1]
            assert all(math.isfinite(x) for x in [*numbers, point.test_top1 or 0])
        for one, two in zip(front.points, front.points[1:], strict=False):
            assert one.cost < two.cost
            assert one.loss > two.loss
        assert (front.names, front.choices, front.weights_digest) == (NAMES, (2, 3, 4), "0123abcd")
    assert 1000 < found < 2000


def test_a_policy_file_with_anything_in_it_is_refused_or_is_a_policy(tmp_path):
    path, rng = tmp_path / "policy.json", np.random.default_rng(1)
    bm.save_policy(path, [4, 3, 2], NAMES, SPACE, loss=0.5, search={"method": "ilp"})
    original = path.read_text()
    found = 0
    for _ in range(2000):
        path.write_bytes(mutated(original, rng))
        policy = attempt(lambda: bm.load_policy(path, NAMES, SPACE))
        if policy is None:
            found += 1
            continue
        assert policy.dtype == np.int32
        assert policy.shape == (3,)
        assert set(policy.tolist()) <= {2, 3, 4}
    assert 1000 < found < 2000


def test_notes_do_not_replace_what_a_front_file_says(tmp_path):
    make(notes={"points": [], "about": 1}).save(tmp_path / "front.json")
    assert load_front(tmp_path / "front.json", NAMES, SPACE).points == POINTS


@pytest.mark.parametrize(
    ("number", "code"),
    [("1" + "0" * 400, "damaged"), ("9" * 5000, "wrong-format")],
    ids=["1e400", "5000 digits"],
)
@pytest.mark.parametrize("old", ["150.5", "0.25", "0.625"])
def test_numbers_too_large_for_a_front_are_refused(tmp_path, number, code, old):
    path = tmp_path / "front.json"
    make().save(path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, number))
    with refused(code, path):
        load_front(path, NAMES, SPACE)
