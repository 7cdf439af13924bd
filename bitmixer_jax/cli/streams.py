"""Output streams that do not stop a command when they are closed, full, or limited to ASCII."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO


class Output(io.TextIOBase):
    """Passes text on to a stream until the stream fails, and then drops text.

    Attributes:
      failure: why text was lost; None if no text was lost, or if the reader closed the pipe.
    """

    def __init__(self, stream: TextIO) -> None:
        """Takes a stream. Characters that it cannot encode become escapes such as \\xe9."""
        self._stream = stream
        self._lost = False
        self.failure: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "ascii"

    @property
    def buffer(self) -> object:
        """The stream of bytes below this one, or None."""
        return getattr(self._stream, "buffer", None)

    def writable(self) -> bool:
        """Returns True."""
        return True

    def isatty(self) -> bool:
        """Returns whether the stream is a terminal."""
        return not self._lost and self._stream.isatty()

    def fileno(self) -> int:
        """Returns the file descriptor of the stream."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Writes text, or drops it if the stream has failed. Returns the length of the text."""
        if not self._lost:
            try:
                self._stream.write(text)
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, unless it has failed."""
        if not self._lost:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._lost = True
        if not isinstance(error, BrokenPipeError):
            self.failure = error
        # The interpreter flushes the stream when it ends. With the null device that cannot fail.
        with contextlib.suppress(OSError), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self._stream.fileno())


def fill_closed() -> None:
    """Opens the null device in place of standard streams that the caller has closed.

    Otherwise the next file that is opened would get their number, 1 or 2, and text that is printed
    would go into that file.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
