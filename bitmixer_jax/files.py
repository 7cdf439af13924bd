"""Reads regular files up to a size limit, writes files atomically, and locks them.

Files are overwritten only on request. Only regular files are read: reading a pipe or a device may
block for ever.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import pathlib
import socket
import stat
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from bitmixer_jax.errors import UserError, reason, shown

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_JSON_LIMIT = 64 * 2**20  # bytes
# What flock says on file systems that know no locks, such as Lustre mounted without them.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def user_path(text: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path that a user gave, with ``~`` expanded.

    Raises:
      UserError: the path is empty, names a service (``gs://bucket/run``), holds a null character,
        or starts with the ``~`` of a user without a home folder.
    """
    given = os.fspath(text)
    scheme, separator, _ = given.partition("://")
    if separator and scheme.isalnum():
        raise UserError(
            f"{given}: paths of {scheme}:// are not supported; give a folder of a mounted file "
            "system (for gs:// gcsfuse mounts a bucket)",
            "bad-path",
        )
    if not given:
        raise UserError("an empty path; for the current folder give .", "bad-path")
    if "\0" in given:
        raise UserError(f"{given!r}: a path cannot hold a null character", "bad-path")
    try:
        return pathlib.Path(given).expanduser()
    except RuntimeError:
        raise UserError(
            f"{given}: this user has no home folder; give the whole path", "bad-path"
        ) from None


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a regular file for reading, without waiting.

    Raises:
      OSError: as `open`; also where the path is a pipe, a device or a folder.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a null character
        raise OSError(errno.EINVAL, str(error)) from None
    try:
        mode = os.fstat(number).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_bytes(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """Reads a regular file of at most ``limit`` bytes. Raises OSError as `open_file`."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes; at most {limit:,} are read")
        return file.read() if limit is None else file.read(limit)


def read_json(path: str | os.PathLike[str], limit: int = _JSON_LIMIT) -> Any:
    """Reads a JSON file.

    Raises:
      OSError: as `read_bytes`.
      ValueError: not UTF-8, or not JSON.
    """
    return parse_json(read_bytes(path, limit))


def parse_json(text: str | bytes) -> Any:
    """Parses JSON; whatever is wrong with it raises ValueError.

    Infinity and NaN, which Python's reader accepts, are no JSON and are refused.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_user_file(
    given: str | os.PathLike[str], what: str = "file", limit: int | None = None
) -> tuple[pathlib.Path, bytes]:
    """Reads a file that a user named.

    Args:
      given: its path; ``~`` is expanded.
      what: kind of file, for messages, such as "packed file".
      limit: most bytes that it may have.

    Returns:
      its path and its content.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    path = user_path(given)
    try:
        return path, read_bytes(path, limit)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}", "no-such-file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})", "not-readable") from None


def read_document(
    given: str | os.PathLike[str], what: str, format: str, version: int
) -> tuple[pathlib.Path, Mapping[str, Any]]:
    """Reads a JSON file that names its format and version: a policy, a front, a latency table.

    Args:
      given: its path; ``~`` is expanded.
      what: kind of file, for messages, such as "policy".
      format, version: what its "format" and "version" must be.

    Returns:
      its path and its content.

    Raises:
      UserError: the file is missing, is no regular file, or is of another format or version.
    """
    path, text = read_user_file(given, f"{what} file", _JSON_LIMIT)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: not a {what} file ({error})", "wrong-format") from None
    if not isinstance(content, Mapping) or content.get("format") != format:
        raise UserError(f'{path}: not a {what} file ("format" must be "{format}")', "wrong-format")
    found = content.get("version")
    if type(found) is not int or found != version:
        raise UserError(
            f"{path}: {what} version {shown(found)}; this library reads {version}", "wrong-format"
        )
    return path, content


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file atomically. Replaces a file that exists and keeps its permissions.

    Raises:
      OSError: it cannot be written; a file that exists is unchanged.
    """
    path = pathlib.Path(path)
    data = content.encode() if isinstance(content, str) else content
    device = pathlib.Path("/dev") in path.absolute().parents  # such as /dev/stdout, a file or not
    if device or (path.exists() and not path.is_file()):
        path.write_bytes(data)
        return
    path = pathlib.Path(os.path.realpath(path))  # a link stays a link
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            if path.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_new(
    path: str | os.PathLike[str], content: str | bytes, *, overwrite: bool = False
) -> None:
    """Writes a file atomically. Writing the content that it has already is no change.

    Raises:
      UserError: the file exists with other content and ``overwrite`` is false, or it cannot be
        written.
    """
    path = user_path(path)
    data = content.encode() if isinstance(content, str) else content
    check_new(path)
    try:
        if path.exists() and not overwrite:
            if path.stat().st_size == len(data) and read_bytes(path) == data:
                return
            raise UserError(
                f"{path}: already exists; choose another path, or ask to overwrite", "exists"
            )
        write_whole(path, data)
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: str | os.PathLike[str], error: OSError, what: str = "") -> UserError:
    """Returns the error that says why ``path`` cannot be written.

    Args:
      what: the flag that named the path, for the message.
    """
    advice = "; make room and try again" if error.errno in _DISK_FULL else ""
    return UserError(
        f"{what} {path}".strip() + f": cannot write there ({reason(error)}){advice}", "not-writable"
    )


def check_new(path: pathlib.Path, what: str = "") -> None:
    """Checks that a file can be written, so that a command fails before its work.

    Args:
      what: the flag that named it, for the message.

    Raises:
      UserError: no such folder, no permission, or the path is a folder.
    """
    named = f"{what} {path}".strip()
    try:
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
            raise UserError(f"{named}: cannot write in {path.parent}", "not-writable")
        if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
            raise UserError(f"{named}: cannot write to it; name a file", "not-writable")
    except OSError as error:  # such as a name that is too long
        raise cannot_write(path, error, what) from None


def check_free(
    path: pathlib.Path, overwrite: bool = False, what: str = "--out", folder: bool = False
) -> None:
    """Checks that a file, or a folder, can be written and does not exist: see `check_new`."""
    try:
        if not (folder and path.is_dir()):
            check_new(path, what)
        exists = path.exists()
    except OSError as error:  # such as a name that is too long
        raise cannot_write(path, error, what) from None
    if exists and not overwrite:
        raise UserError(
            f"{what} {path}: already exists; choose another path, or give --overwrite", "exists"
        )


def check_folder(path: pathlib.Path, what: str = "--out") -> None:
    """Checks that a folder can be made, or written in. Raises UserError."""
    try:
        there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
        usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError as error:
        raise cannot_write(path, error, what) from None
    if not usable:
        raise UserError(f"{what} {path}: cannot write there", "not-writable")


@contextlib.contextmanager
def hold(path: pathlib.Path, what: str) -> Iterator[None]:
    """Holds the lock file ``path`` while the block runs, so that no second process enters it.

    The operating system frees the lock when the process ends, however it ends. On NFS the server
    holds it, so it works between machines. On a file system without locks the block runs without
    one, with a warning. The file is removed at the end of the block.

    Args:
      path: the lock file; its folder exists.
      what: what is locked, for the message.

    Raises:
      UserError: another process holds the lock, or the file cannot be written.
    """
    try:
        number = _locked(path)
    except BlockingIOError:
        raise UserError(
            f"{what}: in use by another process{_holder(path)}; wait until it ends", "in-use"
        ) from None
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the note
            os.ftruncate(number, 0)
            os.write(number, f"{os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_open_as(number, path):  # another process may have made it anew
                path.unlink()
        os.close(number)


def _locked(path: pathlib.Path) -> int:
    """Opens and locks a file. Raises BlockingIOError where it is locked already."""
    import fcntl

    for _ in range(100):
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logging.getLogger(__name__).warning(
                    "%s: this file system has no locks (%s); do not start a second process there",
                    *(path, error.strerror),
                )
                return number
            os.close(number)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BlockingIOError(errno.EWOULDBLOCK, "locked") from None
            raise
        # The process that held the lock may have removed the file in between: then open it anew.
        if _is_open_as(number, path):
            return number
        os.close(number)
    raise OSError(errno.EAGAIN, "the lock file changes all the time", os.fspath(path))


def _is_open_as(number: int, path: pathlib.Path) -> bool:
    """Returns whether the open file ``number`` is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: pathlib.Path) -> str:
    """Returns " (12 on HOST)", the process that holds a lock, or "" if it is not known."""
    try:
        text = read_bytes(path, 1000).decode(errors="replace")
    except OSError:
        return ""
    return f" ({text})" if text else ""
