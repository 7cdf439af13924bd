"""Where exports are written and read: odd paths, two at once, full disks, killed exports."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest

from bitmixer_jax import files
from bitmixer_jax.export import export, export_network
from bitmixer_jax.export.packed import load_packed, plane_ends
from bitmixer_jax.export.raw import load_raw
from bitmixer_jax.export.verify import verify
from bitmixer_jax.predict import predict_files
from bitmixer_jax.runtime import Runtime
from tests.refusals import refused

QUICK = dict(format="packed", images=20, random=1)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_exports_to_one_path_are_refused(trained, tmp_path, monkeypatch):
    out, held = tmp_path / "net", []

    def again(*arguments):
        held.append(names(tmp_path))
        with refused("in-use", out):
            export_network(trained, out, **QUICK, overwrite=True)
        return verify(*arguments)

    monkeypatch.setattr(export, "verify", again)
    export_network(trained, out, **QUICK)
    assert held == [[".net.lock", ".net.partial"]]
    assert names(tmp_path) == ["net", "net.report.json"]


@pytest.mark.slow
def test_a_killed_export_leaves_what_the_next_one_removes(trained, tmp_path):
    code = (
        "import os, signal\n"
        "from bitmixer_jax.export import export\n"
        "export.verify = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"export.export_network({str(trained)!r}, {str(tmp_path / 'net')!r}, "
        "format='packed', images=20, random=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert set(names(tmp_path)) <= {".net.lock", ".net.partial"}
    export_network(trained, tmp_path / "net", **QUICK)
    assert names(tmp_path) == ["net", "net.report.json"]
    assert json.loads((tmp_path / "net.report.json").read_text())["passed"]


@pytest.mark.parametrize("which", ["the export", "the report"])
def test_a_full_disk_leaves_what_was_there(which, trained, tmp_path, monkeypatch):
    (tmp_path / "net").write_text("precious")
    whole = files.write_whole

    def full(path, content):
        if (which == "the report") == str(path).endswith(".report.json"):
            raise OSError(28, "No space left on device")
        whole(path, content)

    monkeypatch.setattr(files, "write_whole", full)
    monkeypatch.setattr(export, "write_whole", full)
    with refused("not-writable", tmp_path / "net", "No space left on device"):
        export_network(trained, tmp_path / "net", **QUICK, overwrite=True)
    assert names(tmp_path) == ["net"]
    assert (tmp_path / "net").read_text() == "precious"


def test_odd_places_are_refused_before_the_work(trained, tmp_path, monkeypatch):
    def work(*_):
        raise AssertionError("the work began")

    monkeypatch.setattr(export, "load", work)
    os.mkfifo(tmp_path / "pipe")
    no_paths = ("gs://bucket/net", "net\0", "/")
    not_writable = (
        "no/such/folder",
        *(tmp_path / name for name in ("x" * 250, "x" * 300, "\ud800")),
    )
    for code, places in (("bad-path", no_paths), ("not-writable", not_writable)):
        for place, form in itertools.product(places, ("packed", "pytorch")):
            with refused(code):
                export_network(trained, place, format=form)
    for out in (tmp_path / "pipe", "/dev/null"):
        with refused("bad-path", out):
            export_network(trained, out, **QUICK, overwrite=True)
    assert names(tmp_path) == ["pipe"]
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "net").write_text("precious")
    with refused("exists", tmp_path / "net"):
        export_network(trained, "~/net", **QUICK)


@pytest.mark.parametrize("read", [Runtime.load, load_packed, plane_ends, load_raw])
def test_models_that_are_no_files_are_one_line(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for code, names in (
        ("not-readable", ("pipe", "x" * 300, "\ud800")),
        ("damaged", ("empty",)),
        ("no-such-file", ("none", "\udcff", "folder/x/y")),
        ("no-run" if read == Runtime.load else "not-readable", ("folder",)),
    ):
        for name in names:
            with refused(code, name):
                read(tmp_path / name)
    with refused("not-readable", "/dev/zero"):
        read("/dev/zero")
    for place in ("nul\0", "gs://bucket/net", "~nobody-of-this-name/net"):
        with refused("bad-path", place.rstrip("\0")):
            read(place)


@pytest.mark.parametrize("end", ["", ".onnx"])
def test_predict_says_in_one_line_what_is_no_model(end, tmp_path):
    if end == ".onnx":
        pytest.importorskip("onnxruntime")
    (tmp_path / f"folder{end}").mkdir()
    os.mkfifo(tmp_path / f"pipe{end}")
    absent = "no-such-file"
    for name, code in (
        *(("folder", "no-run"), ("pipe", "not-readable"), ("none", absent)),
        *(("x" * 300, "not-readable"), ("\udcff", absent)),
    ):
        with refused(code, f"{name}{end}"):
            predict_files(f"{tmp_path}/{name}{end}", [tmp_path / "x.png"])
    with refused("bad-path", end):
        predict_files(f"nul\0{end}", [tmp_path / "x.png"])
    with refused("missing-value"):
        predict_files(str(tmp_path / "folder"), [])


def test_a_link_is_not_replaced(trained, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "net").symlink_to(tmp_path / "folder")
    settings = QUICK | dict(format="pytorch", overwrite=True)
    with refused("bad-path", tmp_path / "net"):
        export_network(trained, tmp_path / "net", **settings)
    assert (tmp_path / "net").is_symlink()


def test_a_folder_takes_the_place_of_a_file_that_may_be_overwritten(trained, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "net").write_text("old")
    settings = QUICK | dict(format="pytorch", overwrite=True)
    export_network(trained, tmp_path / "net", **settings)
    assert (tmp_path / "net" / "model.py").is_file()
