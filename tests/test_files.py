"""Files: what is no regular file is refused, writing is whole, and a lock keeps others out."""

import errno
import fcntl
import logging
import os
import stat
import subprocess
import sys

import pytest

from bitmixer_jax.files import (
    hold,
    open_file,
    parse_json,
    read_bytes,
    user_path,
    write_new,
    write_whole,
)
from tests.refusals import refused


@pytest.mark.parametrize(("make", "number"), [(os.mkfifo, errno.EINVAL), (os.mkdir, errno.EISDIR)])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make, number):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(OSError, match="thing") as error:
        open_file(path)
    assert error.value.errno == number


def test_devices_are_refused():
    with pytest.raises(OSError, match="/dev/zero") as error:
        open_file("/dev/zero")
    assert error.value.errno == errno.EINVAL


def test_a_file_beyond_the_limit_is_refused(tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 11)
    assert read_bytes(tmp_path / "large", 11) == b"x" * 11
    with pytest.raises(OSError, match=r"\b11\b.*\b10\b") as error:
        read_bytes(tmp_path / "large", 10)
    assert error.value.errno == errno.EFBIG


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", '{"a": Infinity}', "{", b"\xff"])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(user_path("~/runs")) == "/home/someone/runs"


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "a\0b"])
def test_a_path_that_cannot_be_used_is_refused(path):
    with refused("bad-path", repr(path)[1:-1]):
        user_path(path)


def test_a_file_is_not_overwritten_in_silence(tmp_path):
    write_new(tmp_path / "a", "one")
    write_new(tmp_path / "a", "one")
    with refused("exists", tmp_path / "a"):
        write_new(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_keeps_its_permissions_and_a_link_stays_a_link(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("one")
    file.chmod(0o640)
    link.symlink_to(file)
    write_whole(link, "two")
    assert link.is_symlink()
    assert file.read_text() == "two"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_name_as_long_as_the_system_takes_is_written(tmp_path):
    name = "\N{CJK UNIFIED IDEOGRAPH-5BBD}" * 85  # 255 bytes
    write_whole(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("one")

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_whole(tmp_path / "file", "two")
    assert (tmp_path / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_said_in_one_line():
    with refused("not-writable", "/dev/full", os.strerror(errno.ENOSPC)):
        write_new("/dev/full", "text", overwrite=True)


def test_a_lock_keeps_a_second_holder_out_and_is_removed(tmp_path):
    path = tmp_path / ".lock"
    with hold(path, "workdir w"):
        with refused("in-use", "workdir w", f"{os.getpid()} on"), hold(path, "workdir w"):
            pass
        assert path.exists()
    assert not path.exists()
    with hold(path, "workdir w"):
        pass


def test_a_lock_dies_with_its_process(tmp_path):
    path = tmp_path / ".lock"
    program = (
        "import os, pathlib, signal, sys\n"
        "from bitmixer_jax.files import hold\n"
        "with hold(pathlib.Path(sys.argv[1]), 'it'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert path.exists()
    with hold(path, "it"):
        pass


def test_the_lock_of_another_process_stays(tmp_path):
    """A workdir may be removed and made anew while a process works in it."""
    path = tmp_path / ".lock"
    with hold(path, "old"):
        path.unlink()
        with hold(path, "new"):
            pass
        path.write_text("of a third")
    assert path.read_text() == "of a third"


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def none(number, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING), hold(tmp_path / ".lock", "it"):
        pass
    (record,) = caplog.records
    assert str(tmp_path / ".lock") in record.getMessage()
    assert os.strerror(errno.ENOSYS) in record.getMessage()
    assert not list(tmp_path.iterdir())
