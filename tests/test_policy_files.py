"""Policies in files, as a person types them, and with some layers changed."""

import hashlib
import json

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.policy import parse_changes, parse_policy, with_widths
from tests.refusals import refused

SPACE = bm.BitSpace((2, 3, 4))
NAMES = ("stage1.conv1", "stage1.conv2", "stage2.conv1")


# --- policy files ---


@pytest.fixture
def saved(tmp_path):
    """A policy file, and a function that changes its content."""
    path = tmp_path / "policy.json"
    bm.save_policy(path, [4, 3, 2], NAMES, SPACE, accuracy=0.5)

    def change(**values):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return path

    return change


def test_a_policy_file_reads_back(saved):
    assert bm.load_policy(saved(), NAMES, SPACE).tolist() == [4, 3, 2]


def test_a_width_changed_in_the_file_is_noticed_by_its_checksum(saved):
    path = saved()
    path.write_text(path.read_text().replace(": 4", ": 2"))
    with refused("damaged", path, '"sha256"'):
        bm.load_policy(path, NAMES, SPACE)


def test_a_policy_written_by_hand_needs_no_checksum(saved):
    path = saved()
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content | {"share": 1}))
    assert bm.load_policy(path, NAMES, SPACE).tolist() == [4, 3, 2]


def test_a_policy_file_holds_what_the_format_says_and_the_notes(saved):
    layers = dict(sorted(zip(NAMES, (4, 3, 2), strict=True)))
    said = json.dumps([[2, 3, 4], layers])
    assert json.loads(saved().read_text()) == {
        "format": "bitmixer-policy",
        "version": 1,
        "choices": [2, 3, 4],
        "layers": dict(zip(NAMES, (4, 3, 2), strict=True)),
        "accuracy": 0.5,
        "sha256": hashlib.sha256(said.encode()).hexdigest(),
    }


def test_a_policy_file_may_list_its_layers_in_any_order(saved):
    path = saved(layers=dict(zip(reversed(NAMES), (2, 3, 4), strict=True)))
    assert bm.load_policy(path, NAMES, SPACE).tolist() == [4, 3, 2]


def test_an_unknown_layer_name_brings_up_the_nearest(saved):
    path = saved(layers={"stage1.conv1": 4, "stage1.covn2": 3, "stage2.conv1": 2})
    with refused("unknown-name", path, "'stage1.covn2'", "did you mean stage1.conv2"):
        bm.load_policy(path, NAMES, SPACE)


FULL = dict.fromkeys(NAMES, 4)


@pytest.mark.parametrize(
    ("values", "code", "mentions"),
    [
        ({"layers": {"stage1.conv1": 4}}, "other-network", ("'stage1.conv2'", 2)),
        ({"choices": [2, 4, 8]}, "other-network", ([2, 4, 8], [2, 3, 4])),
        ({"version": 2}, "wrong-format", (2, 1)),
        ({"version": None}, "wrong-format", (None, 1)),
        ({"format": "other"}, "wrong-format", ('"bitmixer-policy"',)),
        ({"layers": [4, 3, 2]}, "damaged", ('"layers"',)),
        ({"layers": {**FULL, "stage1.conv1": True}}, "damaged", ((2, 3, 4),)),
        ({"layers": {**FULL, "stage1.conv1": 3.0}}, "damaged", ((2, 3, 4),)),
        ({"layers": {**FULL, "stage1.conv1": "3"}}, "damaged", ((2, 3, 4),)),
        ({"layers": {**FULL, "stage1.conv1": 5}}, "policy-width", (5, (2, 3, 4))),
    ],
)
def test_a_policy_file_that_does_not_fit_is_refused_with_its_path(saved, values, code, mentions):
    path = saved(**values)
    with refused(code, path, *mentions):
        bm.load_policy(path, NAMES, SPACE)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'"text"', b"[" * 100_000])
def test_a_file_that_is_no_policy_is_refused(tmp_path, content):
    path = tmp_path / "policy.json"
    path.write_bytes(content)
    with refused("wrong-format", path):
        bm.load_policy(path, NAMES, SPACE)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with refused("no-such-file", tmp_path / "none.json"):
        bm.load_policy(tmp_path / "none.json", NAMES, SPACE)
    with refused("not-readable", tmp_path):
        bm.load_policy(tmp_path, NAMES, SPACE)


def test_save_does_not_overwrite_another_policy_unasked(tmp_path):
    path = tmp_path / "policy.json"
    bm.save_policy(path, [4, 3, 2], NAMES, SPACE)
    bm.save_policy(path, [4, 3, 2], NAMES, SPACE)  # the same content again is no loss
    with refused("exists", path):
        bm.save_policy(path, [2, 2, 2], NAMES, SPACE)
    assert bm.load_policy(path, NAMES, SPACE).tolist() == [4, 3, 2]
    bm.save_policy(path, [2, 2, 2], NAMES, SPACE, overwrite=True)
    assert bm.load_policy(path, NAMES, SPACE).tolist() == [2, 2, 2]


def test_save_does_not_overwrite_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\xff")
    with refused("exists", path):
        bm.save_policy(path, [4, 3, 2], NAMES, SPACE)
    assert path.read_bytes() == b"\x89PNG\xff"


@pytest.mark.parametrize(
    ("policy", "code"),
    [([4, 3], "policy-length"), ([4, 3, 7], "policy-width"), ([4.0, 3.0, 2.0], "policy-form")],
)
def test_save_refuses_a_policy_that_does_not_fit_and_writes_nothing(tmp_path, policy, code):
    with refused(code):
        bm.save_policy(tmp_path / "policy.json", policy, NAMES, SPACE)
    assert list(tmp_path.iterdir()) == []


# --- what a person types ---


@pytest.mark.parametrize(
    ("text", "policy"), [("3", [3, 3, 3]), ("4,3,2", [4, 3, 2]), (" 4, 3 ,2 ", [4, 3, 2])]
)
def test_parse_policy_reads_one_width_or_one_per_layer(text, policy):
    assert parse_policy(text, NAMES, SPACE).tolist() == policy


def test_parse_policy_reads_a_file(saved):
    assert parse_policy(str(saved()), NAMES, SPACE).tolist() == [4, 3, 2]


@pytest.mark.parametrize(
    ("text", "code", "mentions"),
    [
        ("5", "policy-width", (5, (2, 3, 4))),
        ("4,3", "policy-length", (2, 3)),
        ("4,3,7", "policy-width", (7, (2, 3, 4))),
        *(
            (text, "policy-form", (repr(text[:80]),))
            for text in ("", "4,,3", "3.5", "-3", "three", "4;3;2", "9" * 30, "4 3 2 " * 50)
        ),
    ],
)
def test_parse_policy_refuses_anything_else(text, code, mentions):
    with refused(code, *mentions):
        parse_policy(text, NAMES, SPACE)


# --- some layers changed ---


@pytest.mark.parametrize(
    ("changes", "policy"),
    [
        ({}, [4, 3, 2]),
        ({"stage1.conv2": 2}, [4, 2, 2]),
        ({"stage1.*": 2}, [2, 2, 2]),
        ({"*.conv1": 3}, [3, 3, 3]),
        ({"*": 3}, [3, 3, 3]),
        ({"stage?.conv[2]": 4}, [4, 4, 2]),
        ({"stage[!1]*": 4}, [4, 3, 4]),
        ({"*": 2, "stage1.*": 3, "stage1.conv1": 4}, [4, 3, 2]),
        ({"stage1.conv1": 2, "*": 3}, [3, 3, 3]),
    ],
)
def test_with_widths_changes_the_layers_of_a_name_or_pattern_in_order(changes, policy):
    assert with_widths([4, 3, 2], changes, NAMES, SPACE).tolist() == policy


def test_with_widths_leaves_the_policy_it_was_given():
    policy = np.asarray([4, 3, 2], np.int32)
    changed = with_widths(policy, {"*": 2}, NAMES, SPACE)
    assert policy.tolist() == [4, 3, 2]
    assert changed.dtype == np.int32


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("stage1.covn2", "did you mean stage1.conv2"),
        ("stag1.*", "did you mean stage1.*"),
        ("*.cnov1", "did you mean *.conv1"),
        ("stage1", "did you mean stage1.*"),
        ("head", "stage1.conv1, ..., stage2.conv1"),
        ("", "stage1.conv1, ..., stage2.conv1"),
        ("STAGE1.CONV1", "stage1.conv1, ..., stage2.conv1"),
        ("stage1.conv[", "did you mean stage1.conv"),
    ],
)
def test_with_widths_names_the_nearest_of_an_unknown_layer(name, hint):
    with refused("unknown-name", repr(name), hint):
        with_widths([4, 3, 2], {"stage2.conv1": 3, name: 2}, NAMES, SPACE)


@pytest.mark.parametrize("width", [1, 5, 0, -2, True, 2.0, "2", None, 2**70])
def test_with_widths_refuses_a_width_that_is_not_a_choice(width):
    with refused("policy-width", f"stage1.*={width!r}", (2, 3, 4)):
        with_widths([4, 3, 2], {"stage1.*": width}, NAMES, SPACE)


@pytest.mark.parametrize(
    ("policy", "code"),
    [([4, 3], "policy-length"), ([4, 3, 5], "policy-width"), ([4.0, 3.0, 2.0], "policy-form")],
)
def test_with_widths_refuses_a_policy_that_does_not_fit(policy, code):
    with refused(code):
        with_widths(policy, {"*": 2}, NAMES, SPACE)


def test_parse_changes_reads_layers_and_widths_in_order():
    found = parse_changes(["stage1.*=2", "last=4", "a=b=3"])
    assert list(found.items()) == [("stage1.*", 2), ("last", 4), ("a=b", 3)]
    assert parse_changes([]) == {}


def test_of_two_changes_of_one_name_the_later_counts_in_its_place():
    found = parse_changes(["stage1.conv1=2", "*=3", "stage1.conv1=4"])
    assert list(found.items()) == [("*", 3), ("stage1.conv1", 4)]
    assert with_widths([2, 2, 2], found, NAMES, SPACE).tolist() == [4, 3, 3]


@pytest.mark.parametrize(
    "text", ["", "=", "=3", "stage1", "stage1=", "stage1=three", "stage1=-3", "stage1=3.0", "a=3="]
)
def test_parse_changes_refuses_anything_else(text):
    with refused("bad-value", text, "stage2.block1.conv1=2"):
        parse_changes(["stage1.*=2", text])


@pytest.mark.parametrize(
    ("number", "code"),
    [("1" + "0" * 400, "policy-form"), ("9" * 5000, "wrong-format")],
    ids=["1e400", "5000 digits"],
)
def test_numbers_too_large_for_a_policy_are_refused(saved, number, code):
    path = saved()
    text = path.read_text()
    path.write_text(text.replace('"stage1.conv1": 4', f'"stage1.conv1": {number}'))
    assert path.read_text() != text
    with refused(code, path):
        bm.load_policy(path, NAMES, SPACE)
    with refused("policy-form", repr(number[:80])):
        parse_policy(number, NAMES, SPACE)
    with refused("bad-value", "stage1.conv1="):
        parse_changes([f"stage1.conv1={number}"])
