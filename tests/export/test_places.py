"""Where exports are written and read: odd paths, two at once, full disks, killed exports."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from bitmixer_jax import files
from bitmixer_jax.errors import UserError
from bitmixer_jax.export import workdir
from bitmixer_jax.export.packed import load_packed, plane_ends
from bitmixer_jax.export.predict import predict_files
from bitmixer_jax.export.raw import load_raw
from bitmixer_jax.export.verify import verify
from bitmixer_jax.export.workdir import Settings, export_workdir
from bitmixer_jax.runtime import Runtime

QUICK = Settings(format="packed", images=20, random=1)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def one_line(call, *arguments, match=None):
    with pytest.raises(UserError, match=match) as caught:
        call(*arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_two_exports_to_one_path_are_refused(trained, tmp_path, monkeypatch):
    out, held = tmp_path / "net", []

    def again(*given):
        held.append(names(tmp_path))
        one_line(export_workdir, str(trained), out, QUICK, True, match="--out .*another process")
        return verify(*given)

    monkeypatch.setattr(workdir, "verify", again)
    export_workdir(str(trained), out, QUICK)
    assert held == [[".net.lock", ".net.partial"]]
    assert names(tmp_path) == ["net", "net.report.json"]


def test_a_killed_export_leaves_what_the_next_one_removes(trained, tmp_path):
    code = (
        "import os, signal, pathlib\n"
        "from bitmixer_jax.export import workdir\n"
        "workdir.verify = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"workdir.export_workdir({str(trained)!r}, pathlib.Path({str(tmp_path / 'net')!r}), "
        "workdir.Settings(format='packed', images=20, random=1))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert set(names(tmp_path)) <= {".net.lock", ".net.partial"}
    export_workdir(str(trained), tmp_path / "net", QUICK)
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
    monkeypatch.setattr(workdir, "write_whole", full)
    one_line(export_workdir, str(trained), tmp_path / "net", QUICK, True, match="make room")
    assert names(tmp_path) == ["net"]
    assert (tmp_path / "net").read_text() == "precious"


def test_odd_places_are_refused_before_the_work(trained, tmp_path, monkeypatch):
    def work(*_):
        raise AssertionError("the work began")

    monkeypatch.setattr(workdir, "Source", work)
    os.mkfifo(tmp_path / "pipe")
    for out in ("gs://bucket/net", "net\0", "x" * 250, "x" * 300, "/", "no/such/folder", "\ud800"):
        place = out if "/" in out or "\0" in out else tmp_path / out
        for form in ("packed", "pytorch"):
            one_line(export_workdir, str(trained), place, Settings(format=form))
    for out in (tmp_path / "pipe", "/dev/null"):
        one_line(export_workdir, str(trained), out, QUICK, True, match="a device or a pipe")
    assert names(tmp_path) == ["pipe"]
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "net").write_text("precious")
    one_line(export_workdir, str(trained), "~/net", QUICK, match=f"{tmp_path}/net: already exists")


@pytest.mark.parametrize("read", [Runtime.load, load_packed, plane_ends, load_raw])
def test_models_that_are_no_files_are_one_line(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "empty", "folder", "none", "x" * 300, "\ud800", "\udcff", "folder/x/y"):
        one_line(read, tmp_path / name)
    for place in ("/dev/zero", "nul\0", "gs://bucket/net", "~nobody-of-this-name/net"):
        one_line(read, place)


@pytest.mark.parametrize("end", ["", ".onnx"])
def test_predict_says_in_one_line_what_is_no_model(end, tmp_path):
    (tmp_path / f"folder{end}").mkdir()
    os.mkfifo(tmp_path / f"pipe{end}")
    for name in ("folder", "pipe", "none", "x" * 300, "\udcff"):
        one_line(predict_files, f"{tmp_path}/{name}{end}", [tmp_path / "x.png"])
    one_line(predict_files, f"nul\0{end}", [tmp_path / "x.png"], match="null character")
    one_line(predict_files, str(tmp_path / "folder"), [], match="name an image")


def test_a_link_is_not_replaced(trained, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "net").symlink_to(tmp_path / "folder")
    settings = dataclasses.replace(QUICK, format="pytorch")
    one_line(export_workdir, str(trained), tmp_path / "net", settings, True, match="a link")
    assert (tmp_path / "net").is_symlink()


def test_a_folder_takes_the_place_of_a_file_that_may_be_overwritten(trained, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "net").write_text("old")
    settings = dataclasses.replace(QUICK, format="pytorch")
    export_workdir(str(trained), tmp_path / "net", settings, True)
    assert (tmp_path / "net" / "model.py").is_file()
