"""Sorts orbax's failures: a full disk, a machine that cannot read now, or a damaged checkpoint.

Orbax and tensorstore raise many types for one cause, so the text of an error decides as well.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.files import read_json

_FULL_CODES = (errno.ENOSPC, errno.EDQUOT)
_FULL_SIGNS = ("No space left", "Disk quota", "OS error 28")
_WRITE_SIGNS = ("Permission denied", "RESOURCE_EXHAUSTED", "File too large", "OS error")
_MACHINE_CODES = (
    *(errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)
_MACHINE_SIGNS = (
    *("RESOURCE_EXHAUSTED", "ut of memory", "PERMISSION_DENIED", "Permission denied"),
    *("Too many open files", "Input/output error", "Stale file handle", "UNAVAILABLE"),
)


class Damaged(UserError):
    """A checkpoint cannot be read, or holds other values than were saved."""

    default_code = "damaged"


def is_disk_full(error: BaseException) -> bool:
    """Returns whether a write failed because the disk, or the user's share of it, is full."""
    code = getattr(error, "errno", None)
    return code in _FULL_CODES or _has_sign(error, _FULL_SIGNS)


def is_disk_error(error: BaseException) -> bool:
    """Returns whether the disk, not the program, made a write fail."""
    return is_disk_full(error) or isinstance(error, OSError) or _has_sign(error, _WRITE_SIGNS)


@contextlib.contextmanager
def read_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns what orbax raises while it reads the checkpoint ``path`` into a `UserError`.

    Raises:
      Damaged: the checkpoint is damaged.
      UserError: the machine, not the checkpoint, made the read fail, such as an input error of the
        disk, a missing permission, or too little memory.
    """
    restore_output = silence()
    try:
        yield
    except UserError:
        restore_output()
        raise
    except Exception as error:
        # The output stays silenced. Reads that were under way when one failed end later, on other
        # threads, and each prints a traceback about a closed event loop.
        code = getattr(error, "errno", None)
        if (
            code in _MACHINE_CODES
            or isinstance(error, MemoryError)
            or _has_sign(error, _MACHINE_SIGNS)
        ):
            raise UserError(
                f"{path}: cannot be read now ({reason(error)})", "not-readable"
            ) from None
        raise damaged(path, reason(error)) from None
    restore_output()


def damaged(path: pathlib.Path, why: str) -> Damaged:
    """Returns the error of a damaged checkpoint, with what to do about it."""
    return Damaged(
        f"{path}: damaged checkpoint ({why}). Remove {path} to go back to the checkpoint before it"
    )


def with_damaged_metadata(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the first checkpoint in ``folder`` whose metadata file orbax cannot use, or None."""
    for path in sorted(folder.glob("*/_CHECKPOINT_METADATA")):
        try:
            found = read_json(path)
        except (OSError, ValueError):  # orbax goes on without it
            continue
        nested = ("item_handlers", "metrics", "custom_metadata")
        if not isinstance(found, dict) or not all(
            isinstance(found.get(key) or {}, dict) for key in nested
        ):
            return path.parent
    return None


# The hooks are global to the process. That is right here: the threads that print belong to
# tensorstore, and no context of ours encloses them.
def silence() -> Callable[[], None]:
    """Drops what threads of orbax and tensorstore print after a failure that is raised anyway.

    Returns:
      a function that undoes it.
    """
    logger = logging.getLogger("asyncio")
    level, unraisable, uncaught = logger.level, sys.unraisablehook, sys.excepthook

    def drop_unraisable(found: Any) -> None:
        about = f"{found.exc_value} {found.object!r}"
        if "Event loop is closed" not in about and "_read_" not in about:
            unraisable(found)

    def drop_uncaught(kind: Any, error: BaseException, trace: Any) -> None:
        if "Event loop is closed" not in str(error):
            uncaught(kind, error, trace)

    def undo() -> None:
        logger.setLevel(level)
        sys.unraisablehook, sys.excepthook = unraisable, uncaught

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook, sys.excepthook = drop_unraisable, drop_uncaught
    return undo


def _has_sign(error: BaseException, signs: tuple[str, ...]) -> bool:
    text = str(error)
    return any(sign in text for sign in signs)
