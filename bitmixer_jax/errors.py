"""The exception for mistakes of the user, its codes, and how messages quote names and errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_MAX_LISTED = 10  # names in a message: enough to see what they have in common


# What is wrong, for programs. The words of a message may change; the meaning of a code does not.
Code = Literal[
    # values
    "bad-value",  # a setting, flag or argument has a value that is not allowed
    "unknown-name",  # no setting, model, layer, method, cost, format or data has this name
    "missing-value",  # a required value was not given
    "conflict",  # two values do not go together
    "bad-shape",  # images, arrays or batches have another shape or type than the network takes
    # policies
    "policy-form",  # not widths, and not a policy
    "policy-length",  # the number of widths is not the number of layers
    "policy-width",  # a width that is not one of the network's choices
    "no-widths",  # a full-precision baseline, or the weights of stage 1, have no widths
    "uncalibrated",  # the policy uses a pair of widths that training never visited
    # files
    "bad-path",  # not a path, or a path of a kind that cannot be used
    "no-such-file",
    "not-readable",  # the file exists, but cannot be read
    "not-writable",  # no permission, no room, or the path is a folder
    "exists",  # writing would replace a file that exists
    "in-use",  # another process is using it
    "wrong-format",  # a file of another kind or version
    "damaged",  # the content is not what was written
    # things that do not belong together
    "other-network",  # made for other layers, widths, weights or shapes
    "other-data",  # the classes or the image shape are not those of the training data
    "other-run",  # the workdir holds a run of another configuration
    # training, search, export
    "no-run",  # no run, no checkpoint or no such stage
    "not-finite",  # the loss, the weights or the logits are infinite or NaN
    "out-of-reach",  # no policy fits the budget
    "test-data",  # a search may not use test data
    "no-data",  # the data set is missing or not prepared, or a split is empty
    "bad-image",  # an image file that cannot be read
    "mismatch",  # an export gives other answers than its network
    # the machine
    "not-installed",  # an optional package is missing
    "processes",  # another process failed, or the number of processes is wrong
]


class UserError(ValueError):
    """A mistake of the user. The message says in one line what is wrong and what to do.

    The command line prints the message without a traceback and exits with status 2.

    Attributes:
      code: what is wrong, for programs: one of `Code`.

    Examples:
      >>> import bitmixer_jax as bm
      >>> try:
      ...     bm.create_model("resnet19", num_classes=10)
      ... except bm.UserError as error:
      ...     error.code
      'unknown-name'
    """

    default_code: ClassVar[Code] = "bad-value"

    def __init__(self, message: str, code: Code | None = None) -> None:
        super().__init__(message)
        self.code: Code = code or self.default_code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.code)


def one_line(text: object) -> str:
    r"""Returns a text with line breaks and other control characters escaped.

    >>> print(one_line("two\nlines"))
    two\nlines
    """
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], str(text))


def shown(value: Any) -> str:
    """Returns a value as a message quotes it: one line of at most 80 characters.

    >>> shown({"width": 4})
    "{'width': 4}"
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(names: Sequence[str]) -> str:
    """Returns names as a message lists them: the first ten, and how many more there are.

    >>> listed([f"conv{i}" for i in range(12)])
    'conv0, conv1, conv2, conv3, conv4, conv5, conv6, conv7, conv8, conv9, and 2 more'
    """
    more = len(names) - _MAX_LISTED
    return one_line(", ".join(names[:_MAX_LISTED])) + f", and {more} more" * (more > 0)


def reason(error: BaseException) -> str:
    """Returns why something failed, for a message: one line of at most 200 characters.

    For an OSError this is the text of the operating system. For other errors it is the first line
    of the text that is not empty, or the name of the type if there is none.

    >>> reason(FileNotFoundError(2, "No such file or directory", "net.onnx"))
    'No such file or directory'
    >>> reason(KeyError())
    'KeyError'
    """
    text = str(getattr(error, "strerror", None) or error)
    lines = (one_line(line.strip()) for line in text.splitlines())
    return next(filter(None, lines), type(error).__name__)[:200]
