"""How tests check that something is refused: by the code of the error, never by its words."""

import contextlib

import pytest

from bitmixer_jax.errors import UserError


@contextlib.contextmanager
def refused(code, *mentions, kind=UserError):
    """Checks that the block is refused in one line.

    Args:
      code: of the error (`bitmixer_jax.errors.Code`).
      mentions: names and values that the message must hold: what was given, what is allowed. Words
        of the message itself are pinned in tests/messages.txt alone.
      kind: type of the error.
    """
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert caught.value.code == code, message
    check_line(message, *mentions)


def check_line(text, *mentions, start=""):
    """Checks that a text is one line that begins with ``start`` and holds ``mentions``."""
    assert len(text.splitlines()) == 1, text
    assert text.startswith(start), text
    for mention in mentions:
        assert str(mention) in text, text
