"""Reads regular files up to a size limit, writes files atomically, and locks them.

Only regular files are read, because reading a pipe or a device may never end. An existing file is
replaced only if the caller asks for it.
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
# Errors of flock on file systems without locks, such as Lustre mounted without them.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def user_path(text: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path that a user gave, with ``~`` expanded.

    Args:
      text: the path.

    Raises:
      UserError: the path is empty, is a URL (``gs://bucket/run``), holds a null character, or
        starts with ``~`` and the user has no home folder.

    Examples:
      >>> user_path("runs/digits")
      PosixPath('runs/digits')
      >>> user_path("gs://bucket/run")
      Traceback (most recent call last):
      bitmixer_jax.errors.UserError: gs://bucket/run: paths of gs:// are not supported; ...
    """
    name = os.fspath(text)
    scheme, separator, _ = name.partition("://")
    if separator and scheme.isalnum():
        raise UserError(
            f"{name}: paths of {scheme}:// are not supported; give a folder of a mounted file "
            "system (gcsfuse mounts a gs:// bucket)",
            "bad-path",
        )
    if not name:
        raise UserError("the path is empty; give . for the current folder", "bad-path")
    if "\0" in name:
        raise UserError(f"{name!r}: a path cannot contain a null character", "bad-path")
    try:
        return pathlib.Path(name).expanduser()
    except RuntimeError:
        raise UserError(
            f"{name}: this user has no home folder; give the whole path", "bad-path"
        ) from None


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a regular file for reading, without waiting.

    Raises:
      OSError: as `open`; also if the path is a pipe, a device or a folder.
    """
    try:
        # Without O_NONBLOCK the call would wait until another process writes to a pipe.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a null character, or one that file names cannot encode
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
    """Reads a regular file.

    Args:
      path: of the file.
      limit: largest size in bytes; None: no limit.

    Raises:
      OSError: as `open_file`; also if the file is larger.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes; at most {limit:,} are read")
        return file.read() if limit is None else file.read(limit)


def read_json(path: str | os.PathLike[str], limit: int = _JSON_LIMIT) -> Any:
    """Reads a JSON file of at most ``limit`` bytes.

    Raises:
      OSError: as `read_bytes`.
      ValueError: the content is not UTF-8, or not JSON.
    """
    return parse_json(read_bytes(path, limit))


def parse_json(text: str | bytes) -> Any:
    """Parses JSON strictly. Raises ValueError for any mistake in it.

    Infinity and NaN are refused: they are not JSON, but Python's parser accepts them.

    Examples:
      >>> parse_json('{"choices": [2, 3, 4]}')
      {'choices': [2, 3, 4]}
      >>> parse_json("NaN")
      Traceback (most recent call last):
      ValueError: NaN is not JSON
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_user_file(
    name: str | os.PathLike[str], what: str = "file", limit: int | None = None
) -> tuple[pathlib.Path, bytes]:
    """Reads a file that a user named.

    Args:
      name: path of the file; ``~`` is expanded.
      what: kind of file, for messages, such as "packed file".
      limit: largest size in bytes; None: no limit.

    Returns:
      the path and the content.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    path = user_path(name)
    try:
        return path, read_bytes(path, limit)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}", "no-such-file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})", "not-readable") from None


def read_document(
    name: str | os.PathLike[str], what: str, format: str, version: int
) -> tuple[pathlib.Path, Mapping[str, Any]]:
    """Reads a JSON file that states its format and version: a policy, a front or a latency table.

    Args:
      name: path of the file; ``~`` is expanded.
      what: kind of file, for messages, such as "policy".
      format: what the entry "format" must be.
      version: what the entry "version" must be.

    Returns:
      the path and the content.

    Raises:
      UserError: there is no such file, it cannot be read, or it has another format or version.

    Examples:
      >>> text = '{"format": "bitmixer-policy", "version": 1, "choices": [2, 4], "layers": {}}'
      >>> write_new("policy.json", text)
      >>> path, content = read_document("policy.json", "policy", "bitmixer-policy", 1)
      >>> content["choices"]
      [2, 4]
    """
    path, text = read_user_file(name, f"{what} file", _JSON_LIMIT)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: not a {what} file ({error})", "wrong-format") from None
    if not isinstance(content, Mapping) or content.get("format") != format:
        raise UserError(f'{path}: not a {what} file ("format" must be "{format}")', "wrong-format")
    stated = content.get("version")
    if type(stated) is not int or stated != version:
        raise UserError(
            f"{path}: {what} version {shown(stated)}; this library reads {version}", "wrong-format"
        )
    return path, content


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file atomically: a reader sees the old content or the new, never a part.

    An existing file is replaced and keeps its permissions.

    Args:
      path: of the file.
      content: bytes, or text that is written as UTF-8.

    Raises:
      OSError: the file cannot be written. An existing file is unchanged.

    Examples:
      >>> write_whole("notes.txt", "old")
      >>> write_whole("notes.txt", "new")
      >>> read_bytes("notes.txt")
      b'new'
    """
    path = pathlib.Path(path)
    data = content.encode() if isinstance(content, str) else content
    # Devices, such as /dev/stdout, and pipes cannot be replaced. /dev/stdout may be a regular file.
    device = pathlib.Path("/dev") in path.absolute().parents
    if device or (path.exists() and not path.is_file()):
        path.write_bytes(data)
        return
    # A rename replaces a link itself, so the new file is written beside the file behind the link.
    path = pathlib.Path(os.path.realpath(path))
    # Not named after the file: with a suffix, the longest allowed name would be too long.
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            if path.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the rename, also if the power fails
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_new(
    path: str | os.PathLike[str], content: str | bytes, *, overwrite: bool = False
) -> None:
    """Writes a file atomically, and refuses to replace other content.

    Args:
      path: of the file; ``~`` is expanded.
      content: bytes, or text that is written as UTF-8.
      overwrite: replace a file that exists.

    Raises:
      UserError: the file exists with other content and ``overwrite`` is false, or it cannot be
        written.

    Examples:
      >>> write_new("widths.txt", "2,3,4")
      >>> write_new("widths.txt", "2,3,4")  # the same content is no mistake
      >>> write_new("widths.txt", "2,2,2")
      Traceback (most recent call last):
      bitmixer_jax.errors.UserError: widths.txt: already exists; choose another path, ...
    """
    path = user_path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        size = path.stat().st_size if path.is_file() else None
        if not overwrite and size == len(data) and read_bytes(path) == data:
            return
        check_new(path, overwrite=overwrite)
        write_whole(path, data)
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: str | os.PathLike[str], error: Exception, what: str = "") -> UserError:
    """Returns the UserError that says why ``path`` cannot be written.

    Args:
      path: of the file or folder.
      error: what the operating system said.
      what: name of the argument that gave the path, for the message.
    """
    full = getattr(error, "errno", None) in _DISK_FULL
    advice = "; make room and try again" if full else ""
    return UserError(
        f"{what} {path}".strip() + f": cannot write there ({reason(error)}){advice}", "not-writable"
    )


def check_new(
    path: pathlib.Path,
    what: str = "",
    *,
    overwrite: bool = True,
    folder: bool = False,
    parents: bool = False,
) -> None:
    """Checks that a file can be written, so that a command fails before its work and not after.

    Args:
      path: of the file.
      what: name of the argument that gave the path, for the message.
      overwrite: whether the file may exist.
      folder: whether the path may be a folder that exists.
      parents: whether missing folders above the file will be made.

    Raises:
      UserError: the folder is missing or not writable, the path is a folder, or the file exists and
        may not be overwritten.
    """
    named = f"{what} {path}".strip()
    parent = path.parent
    try:
        while parents and not parent.exists():
            parent = parent.parent
        usable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
        mode = path.stat().st_mode if usable else 0
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise cannot_write(path, error, what) from None
    if not usable:
        raise UserError(f"{named}: cannot write in {parent}", "not-writable")
    if (stat.S_ISDIR(mode) and not folder) or not os.access(path, os.W_OK):
        raise UserError(f"{named}: cannot write to it; name a file", "not-writable")
    if not overwrite:
        raise UserError(f"{named}: already exists; choose another path, or overwrite it", "exists")


@contextlib.contextmanager
def hold(path: pathlib.Path, what: str) -> Iterator[None]:
    """Holds the lock file ``path`` while the block runs, so that no other process runs the block.

    The operating system frees the lock when the process ends, also after a crash. On NFS the server
    holds the lock, so it works between machines. On a file system without locks the block runs
    without a lock, and the log has a warning. The file is removed at the end of the block.

    Args:
      path: of the lock file; its folder must exist.
      what: what is locked, for the message.

    Raises:
      UserError: another process holds the lock, or the file cannot be written.

    Examples:
      >>> with hold(pathlib.Path(".lock"), "workdir runs/digits"):
      ...     pathlib.Path(".lock").exists()
      True
      >>> pathlib.Path(".lock").exists()
      False
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
        with contextlib.suppress(OSError):  # on a full disk the lock works without this note
            os.ftruncate(number, 0)
            os.write(number, f"{os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            # Somebody may have removed the workdir, and another process may hold a new lock file.
            if _is_open_as(number, path):
                path.unlink()
        os.close(number)


def _locked(path: pathlib.Path) -> int:
    """Opens and locks a file. Raises BlockingIOError if another process has locked it."""
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
        # The process that held the lock removes the file. If that happened after our `os.open`, we
        # hold a lock on a removed file, which protects nothing: open the path again.
        if _is_open_as(number, path):
            return number
        os.close(number)
    raise OSError(errno.EAGAIN, "the lock file is removed again and again", os.fspath(path))


def _is_open_as(number: int, path: pathlib.Path) -> bool:
    """Returns whether the open file ``number`` is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: pathlib.Path) -> str:
    """Returns " (12 on HOST)" for the process that holds a lock, or "" if it is not known."""
    try:
        text = read_bytes(path, 1000).decode(errors="replace")
    except OSError:
        return ""
    return f" ({text})" if text else ""
