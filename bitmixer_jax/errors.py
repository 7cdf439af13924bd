"""The exception for a mistake of the user, and how its message stays on one line."""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


class UserError(ValueError):
    """Something the user gave is wrong, and the message says what to do about it.

    The message is one line. The command line prints it without a traceback and exits with status 2.
    """


def one_line(text: object) -> str:
    """Returns a text with its line breaks and other control characters escaped."""
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], str(text))
