"""Output streams that do not end a command when they are closed, full, or limited to ASCII."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO


class Output(io.TextIOBase):
    """Passes text on to a stream until that fails; then it drops text, and the work goes on.

    Attributes:
      failure: why text was lost; None if none was, or if the reader closed the pipe.
    """

    def __init__(self, stream: TextIO) -> None:
        """Characters that the stream cannot encode become escapes such as \\xe9."""
        self._stream = stream
        self._lost = False
        self.failure: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "ascii"

    @property
    def buffer(self) -> object:
        """The stream of bytes below."""
        return getattr(self._stream, "buffer", None)

    def writable(self) -> bool:
        """Always true."""
        return True

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return not self._lost and self._stream.isatty()

    def fileno(self) -> int:
        """File descriptor of the stream."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Writes text, or drops it where the stream has failed."""
        if not self._lost:
            try:
                self._stream.write(text)
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Passes on what is buffered, or drops it where the stream has failed."""
        if not self._lost:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._lost = True
        if not isinstance(error, BrokenPipeError):
            self.failure = error
        # What is still buffered would fail again when the interpreter ends.
        with contextlib.suppress(OSError), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self._stream.fileno())


def fill_closed() -> None:
    """Opens the null device in place of standard streams that were closed by the caller.

    Otherwise the next file that is opened would get number 1 or 2, and text that is printed would
    go into it.
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
