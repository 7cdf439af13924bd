"""The exception for a mistake of the user, its codes, and how messages quote names and errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_MAX_LISTED = 10  # names in a message: enough to see what they have in common


# What is wrong, for programs: messages may change their words, codes do not change their meaning.
Code = Literal[
    # what was given
    "bad-value",  # a setting, flag or argument has a value that is not allowed
    "unknown-name",  # of a setting, model, layer, method, cost, format, data set or split
    "missing-value",  # something that is needed was not given
    "conflict",  # two things that were given do not go together
    "bad-shape",  # images, arrays or batches of another shape or type than the network takes
    # policies
    "policy-form",  # not widths, not a policy
    "policy-length",  # another number of widths than layers
    "policy-width",  # a width that is not one of the network's choices
    "no-widths",  # a full-precision baseline, or stage 1, has no (weight) widths
    "uncalibrated",  # the policy needs a pair of widths that training never visited
    # files
    "bad-path",  # not a path, or one that cannot be used
    "no-such-file",
    "not-readable",  # the file is there, but cannot be read now
    "not-writable",  # no permission, no room, or something else is there
    "exists",  # it would be overwritten
    "in-use",  # by another process
    "wrong-format",  # a file of another kind or version
    "damaged",  # a file that does not hold what was written
    # what does not belong together
    "other-network",  # made for other layers, widths, weights or shapes
    "other-data",  # data of other classes or image shape than in training
    "other-run",  # the workdir holds a run of another configuration
    # training, search, export
    "no-run",  # no run, no checkpoint or no such stage
    "not-finite",  # the loss, the weights or the logits
    "out-of-reach",  # no policy fits the budget
    "test-data",  # a search on test data
    "no-data",  # the data set is not there or not prepared, or a split is empty
    "bad-image",  # an image file that cannot be read
    "mismatch",  # an export does not agree with its network
    # the machine
    "not-installed",  # an optional package
    "processes",  # the other processes of a run
]


class UserError(ValueError):
    """Something the user gave is wrong, and the message says what to do about it.

    The message is one line. The command line prints it without a traceback and exits with status 2.

    Attributes:
      code: what is wrong, for programs: one of `Code`.
    """

    default_code: ClassVar[Code] = "bad-value"

    def __init__(self, message: str, code: Code | None = None) -> None:
        super().__init__(message)
        self.code: Code = code or self.default_code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.code)


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
