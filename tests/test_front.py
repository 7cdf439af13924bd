"""Pareto fronts: which points are kept, and files that hold them, whole or damaged."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.front import Front, Point, load_front, pareto

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
        network="0123abcd",
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


def load(path, network="0123abcd"):
    return load_front(path, NAMES, SPACE, network)


@pytest.fixture
def file(tmp_path):
    """A front file."""
    path = tmp_path / "front.json"
    make().save(path)
    return path


def test_a_front_reads_back(file):
    assert load(file) == make()
    assert load(str(file), network=None) == make()


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
    with pytest.raises(bm.UserError, match="already"):
        make(cost="bytes").save(file)
    assert load(file) == make()
    make(cost="bytes").save(file, overwrite=True)
    assert load(file).cost == "bytes"
    assert [path.name for path in file.parent.iterdir()] == ["front.json"]


def test_a_front_that_cannot_be_written_is_one_line(tmp_path):
    for path in (tmp_path / "none" / "front.json", tmp_path):
        with pytest.raises(bm.UserError, match="cannot write"):
            make().save(path)


def changed_point(i=1, **values):
    entries = [dataclasses.asdict(point) for point in POINTS]
    entries[i].update(values)
    return {"points": entries}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "bitmixer-policy"}, "not a front file"),
        ({"version": 2}, "front version 2"),
        ({"version": None}, "front version None"),
        ({"choices": [2, 4, 8]}, "another network: its choices differ"),
        ({"layers": list(NAMES[:2])}, "another network: its layers differ"),
        ({"layers": None}, "another network: its layers differ"),
        ({"network": "other"}, "other weights"),
        ({"network": None}, "other weights"),
        ({"points": []}, "empty front"),
        ({"points": None}, "damaged"),
        ({"points": {}}, "empty front"),
        ({"points": 3}, "damaged"),
        ({"points": "points"}, "damaged"),
        ({"points": [None]}, "damaged"),
        ({"points": [{}]}, "damaged"),
        ({"points": [["widths", "cost", "loss", "top1", "test_top1"]]}, "damaged"),
        ({"cost": None}, "damaged"),
        ({"unit": 5}, "damaged"),
        (changed_point(extra=1), "damaged"),
        (changed_point(widths=[2, 3]), "2 widths for a network of 3"),
        (changed_point(widths=[]), "policy"),
        (changed_point(widths=[2, 3, 5]), "width 5"),
        (changed_point(widths=[2, 3, 2**70]), "policy"),
        (changed_point(widths=[2, 3, 2.0]), "damaged"),
        (changed_point(widths=[True, 3, 2]), "damaged"),
        (changed_point(widths=[[2, 3, 2]]), "damaged"),
        (changed_point(widths="232"), "damaged"),
        (changed_point(widths=None), "damaged"),
        (changed_point(cost="150"), "damaged"),
        (changed_point(cost=True), "damaged"),
        (changed_point(cost=None), "damaged"),
        (changed_point(loss=float("nan")), "is not JSON"),
        (changed_point(cost=float("inf")), "is not JSON"),
        (changed_point(top1=float("-inf")), "is not JSON"),
        (changed_point(test_top1="0.5"), "damaged"),
        (changed_point(cost=401.0), "out of order"),
        (changed_point(cost=100.0), "out of order, or beaten"),
        (changed_point(loss=0.75), "out of order, or beaten"),
        (changed_point(loss=0.25), "out of order, or beaten"),
        ({"points": [dataclasses.asdict(POINTS[0])] * 2}, "out of order, or beaten"),
        ({"points": [dataclasses.asdict(point) for point in POINTS[::-1]]}, "out of order"),
    ],
)
def test_a_front_file_that_does_not_fit_is_one_line_with_its_name(file, changes, message):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(bm.UserError, match=message) as caught:
        load(file)
    said = str(caught.value)
    assert said.startswith(f"{file}: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("key", ["format", "version", "choices", "layers", "points", "cost"])
def test_a_front_file_without_a_field_is_refused(file, key):
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))
    with pytest.raises(bm.UserError):
        load(file)


@pytest.mark.parametrize("key", ["widths", "cost", "loss", "top1", "test_top1"])
def test_a_point_without_a_field_is_refused(file, key):
    content = json.loads(file.read_text())
    del content["points"][1][key]
    file.write_text(json.dumps(content))
    with pytest.raises(bm.UserError, match="damaged"):
        load(file)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'"text"', b"[" * 100_000])
def test_a_file_that_holds_no_front_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(bm.UserError, match="not a front file"):
        load(file)


def test_a_front_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    with pytest.raises(bm.UserError, match="no such front file"):
        load(tmp_path / "none.json")
    with pytest.raises(bm.UserError, match="not a front file"):
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
        said = str(error)
    assert len(said.splitlines()) == 1
    return None


def test_a_front_file_with_anything_in_it_is_refused_or_is_a_front(file):
    original, rng = file.read_text(), np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        file.write_bytes(mutated(original, rng))
        front = attempt(lambda: load(file))
        if front is None:
            refused += 1
            continue
        for point in front.points:
            SPACE.check(point.widths, len(NAMES))
            numbers = [point.cost, point.loss, point.top1]
            assert all(math.isfinite(x) for x in [*numbers, point.test_top1 or 0])
        for one, two in zip(front.points, front.points[1:], strict=False):
            assert one.cost < two.cost
            assert one.loss > two.loss
        assert (front.names, front.choices, front.network) == (NAMES, (2, 3, 4), "0123abcd")
    assert 1000 < refused < 2000


def test_a_policy_file_with_anything_in_it_is_refused_or_is_a_policy(tmp_path):
    path, rng = tmp_path / "policy.json", np.random.default_rng(1)
    bm.save_policy(path, [4, 3, 2], NAMES, SPACE, loss=0.5, search={"method": "ilp"})
    original = path.read_text()
    refused = 0
    for _ in range(2000):
        path.write_bytes(mutated(original, rng))
        policy = attempt(lambda: bm.load_policy(path, NAMES, SPACE))
        if policy is None:
            refused += 1
            continue
        assert policy.dtype == np.int32
        assert policy.shape == (3,)
        assert set(policy.tolist()) <= {2, 3, 4}
    assert 1000 < refused < 2000


def test_notes_do_not_replace_what_a_front_file_says(tmp_path):
    make(notes={"points": [], "about": 1}).save(tmp_path / "front.json")
    assert load_front(tmp_path / "front.json", NAMES, SPACE).points == POINTS


@pytest.mark.parametrize("number", ["1" + "0" * 400, "9" * 5000], ids=["1e400", "5000 digits"])
@pytest.mark.parametrize("old", ["150.5", "0.25", "0.625"])
def test_numbers_too_large_for_a_front_are_refused(tmp_path, number, old):
    path = tmp_path / "front.json"
    make().save(path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, number))
    with pytest.raises(bm.UserError, match="front file"):
        load_front(path, NAMES, SPACE)
