"""Names of classes and files in messages, those that are not UTF-8 too; reasons of errors."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import PIL.Image
import pytest

import bitmixer_jax
from bitmixer_jax.data import find_images, read_images, require_classes
from bitmixer_jax.errors import one_line, reason, shown
from bitmixer_jax.preparation import prepare
from tests.data.streams import CLASSES, SKIP, opened
from tests.refusals import refused

KNOWN = ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("found", "mentions"),
    [
        ([*KNOWN, "dog"], (1, "(dog)")),
        (["ant", "bee"], (1, "(cat)")),
        (["ant", "Bee", "cat"], ("(Bee)", "(bee)")),
        (["ant", "cat", "bee"], (1, "cat", "bee")),
        ([*KNOWN, "cat"], (4, 3)),
        ([*KNOWN, *map(str, range(1000))], (1000, "(0, 1, 2, 3, 4")),
        ([*KNOWN, "x\ny"], (r"(x\ny)",)),
    ],
)
def test_other_classes_are_named(found, mentions):
    require_classes(list(KNOWN), KNOWN, "folder:x train")
    with refused("other-data", *mentions) as caught:
        require_classes(found, KNOWN, "folder:x train")
    said = str(caught.value)
    assert said.startswith("folder:x train: ")
    assert len(said) < 400


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError(2, "No such file or directory", "/x"), "No such file or directory"),
        (OSError("it is too large"), "it is too large"),
        (ValueError("\n \n what is wrong \n where"), "what is wrong"),
        (KeyError(), "KeyError"),
        (ValueError("a\x1bb"), r"a\x1bb"),
        (ValueError("x" * 1000), "x" * 200),
    ],
)
def test_reason_of_an_error(error, expected):
    assert reason(error) == expected


def test_values_are_shown_on_one_short_line():
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 1000)) == 80


ODD = [b"\xff\xfe", "été".encode("latin-1"), b"a\nb"]


@pytest.fixture
def odd(pictures):
    """The pictures, with classes and files of odd names; the folder of training."""
    train = os.fsencode(pictures / "pictures/train")
    for i, name in enumerate(ODD):
        os.rename(train + b"/n%04d" % i, train + b"/" + name)
        one = sorted(os.listdir(train + b"/" + name))[0]
        os.rename(train + b"/" + name + b"/" + one, train + b"/" + name + b"/" + name + b".JPEG")
    shutil.rmtree(pictures / "pictures/val")
    return pictures


def test_names_that_are_not_utf8_are_read_and_kept(odd):
    data = opened(("folder:pictures", odd))
    assert sorted(map(os.fsencode, data.classes)) == sorted(ODD)
    assert json.loads(json.dumps(data.classes)) == list(data.classes)
    assert {data.source.read(i)[1] for i in range(len(data))} == set(range(CLASSES))
    assert next(data.evaluation(45)).labels.min() >= 0


def test_messages_of_odd_names_are_one_line(odd):
    train = os.fsencode(odd / "pictures/train")
    for name in ODD:
        with open(train + b"/" + name + b"/" + name + b".JPEG", "wb"):
            pass
    with refused("bad-image", 3, 45):
        next(opened(("folder:pictures", odd)).evaluation(45))
    (odd / "pictures/validation").mkdir()
    (odd / "pictures/validation/x\ny").mkdir()
    with refused("other-data", r"x\ny"):
        opened(("folder:pictures", odd), "validation", SKIP)


def test_images_of_odd_names_are_found_and_refused_in_one_line(tmp_path):
    for name in ODD:
        path = os.fsencode(tmp_path) + b"/" + name
        PIL.Image.new("L", (4, 4)).save(path + b".png")
    os.mkfifo(tmp_path / "pipe.png")
    found = find_images(tmp_path)
    assert sorted(os.fsencode(path.stem) for path in found) == sorted(ODD)
    assert read_images(found, (4, 4, 1)).shape == (3, 4, 4, 1)
    for path in found:
        path.write_bytes(b"")
        with refused("bad-image", one_line(path)):
            read_images([path], (4, 4, 1))


def test_records_refuse_classes_that_they_cannot_hold(odd, tmp_path):
    shutil.copytree(odd / "pictures/train", odd / "pictures/val")
    with refused("bad-value", ascii("a\nb")):
        prepare("imagenet", odd / "pictures", tmp_path / "records")


@pytest.mark.parametrize("place", ["~nobody-of-this-name/x", "gs://bucket/x", "a\0b"])
def test_folders_that_cannot_be(place):
    for form in (("folder:pictures", place), (f"folder:{place}", ".")):
        with refused("bad-path", repr(place)[1:-1]):
            opened(form)


# --- scripts that decoding processes cannot import ---

_SCRIPT = """
import sys
from bitmixer_jax.data import StreamSettings, open_split

how = StreamSettings(size=16, resize=20)
data = open_split("folder:pictures", "train", sys.argv[1], stream=how, workers=int(sys.argv[2]))
print(len(next(data.evaluation(8)).labels))
"""


@pytest.mark.parametrize("way", ["standard input", "no guard", "no workers"])
def test_a_missing_main_guard_is_named(pristine, tmp_path, way):
    (tmp_path / "script.py").write_text(_SCRIPT)
    source = "-" if way == "standard input" else str(tmp_path / "script.py")
    done = subprocess.run(
        [sys.executable, source, str(pristine), "0" if way == "no workers" else "1"],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(bitmixer_jax.__file__).parents[1])},
        input=_SCRIPT,
        capture_output=True,
        text=True,
        check=False,
    )
    if way == "no workers":
        assert done.stdout.split() == ["8"]
        return
    last = done.stderr.splitlines()[-1]
    assert 'if __name__ == "__main__"' in last
    assert "config.workers=0" in last
    assert ("<stdin>" in last) == (way == "standard input")
    assert ("script.py" in last) == (way == "no guard")
