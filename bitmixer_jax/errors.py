"""The exception for a mistake of the user, and how its message quotes names, values and errors."""

import re
from collections.abc import Sequence
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_MAX_LISTED = 10  # names in a message: enough to see what they have in common


class UserError(ValueError):
    """Something the user gave is wrong, and the message says what to do about it.

    The message is one line. The command line prints it without a traceback and exits with status 2.
    """


def one_line(text: object) -> str:
    """Returns a text with its line breaks and other control characters escaped."""
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], str(text))


def shown(value: Any) -> str:
    """Returns a value as a message quotes it: one line of at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(names: Sequence[str]) -> str:
    """Returns names as a message lists them: the first ten, and how many more there are."""
    more = len(names) - _MAX_LISTED
    return one_line(", ".join(names[:_MAX_LISTED])) + f", and {more} more" * (more > 0)


def reason(error: BaseException) -> str:
    """Returns why something failed, for a message: one line of at most 200 characters.

    This is the operating system's text of an OSError, else the first line of the error's text that
    is not empty, else the name of its type.
    """
    text = str(getattr(error, "strerror", None) or error)
    lines = (one_line(line.strip()) for line in text.splitlines())
    return next(filter(None, lines), type(error).__name__)[:200]
