"""JSON files that name their format and version: policies, fronts, latency tables."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from bitmixer_jax.errors import UserError, shown
from bitmixer_jax.files import read_json, user_path

__all__ = ["read_document", "shown"]


def read_document(
    given: str | pathlib.Path, what: str, form: str, version: int
) -> tuple[pathlib.Path, Mapping[str, Any]]:
    """Reads a JSON file of one of this library's formats.

    Args:
      given: its path; ``~`` is expanded.
      what: kind of file, for messages, such as "policy".
      form, version: what its "format" and "version" must be.

    Returns:
      its path and its content.

    Raises:
      UserError: the file is missing, is no regular file, or is of another format or version.
    """
    path = user_path(given)
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what} file") from None
    except OSError as error:
        raise UserError(f"{path}: not a {what} file ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{path}: not a {what} file ({error})") from None
    if not isinstance(content, Mapping) or content.get("format") != form:
        raise UserError(f'{path}: not a {what} file ("format" must be "{form}")')
    found = content.get("version")
    if type(found) is not int or found != version:
        raise UserError(f"{path}: {what} version {shown(found)}; this library reads {version}")
    return path, content
