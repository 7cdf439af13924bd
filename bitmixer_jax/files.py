"""Files that users made are never overwritten in silence."""

from __future__ import annotations

import os
import pathlib

from bitmixer_jax.errors import UserError


def write_new(path: str | pathlib.Path, content: str | bytes, *, overwrite: bool = False) -> None:
    """Writes a file whole or not at all; the same content again is no change.

    Raises:
      UserError: it is there with other content and ``overwrite`` is false, or it cannot be written.
    """
    path = pathlib.Path(path)
    data = content.encode() if isinstance(content, str) else content
    check_new(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        if path.exists() and not overwrite:
            if path.read_bytes() == data:
                return
            raise UserError(
                f"{path}: a file is there already; take another name or ask to overwrite"
            )
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror})") from None


def check_new(path: pathlib.Path, what: str = "") -> None:
    """Says before the work, not after it, that a file could not be written.

    Args:
      what: the flag that named it, for the message.

    Raises:
      UserError: no such folder, no permission, or the path is a folder.
    """
    named = f"{what} {path}".strip()
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UserError(f"{named}: cannot write in {path.parent}")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(f"{named}: cannot write to it; name a file")


def check_free(
    path: pathlib.Path, overwrite: bool = False, what: str = "--out", folder: bool = False
) -> None:
    """Says before the work that a file, or folder, cannot be written or is there: `check_new`."""
    if not (folder and path.is_dir()):
        check_new(path, what)
    if path.exists() and not overwrite:
        raise UserError(f"{what} {path}: it is there already; name another, or --overwrite")


def check_folder(path: pathlib.Path, what: str = "--out") -> None:
    """Says before the work that a folder could not be made, or written in. Raises UserError."""
    there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"{what} {path}: cannot write there")
