"""What a run tells: JSON lines, TensorBoard files, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from bitmixer_jax.errors import UserError
from bitmixer_jax.files import parse_json, read_bytes

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Appends records to ``workdir/metrics.jsonl`` and to ``workdir/tensorboard``."""

    def __init__(self, workdir: pathlib.Path, step: int, write: bool = True) -> None:
        """Opens both; TensorBoard is told that ``step`` is where this start goes on.

        Without ``write`` nothing is: of several processes one alone does.
        """
        from tensorboardX import SummaryWriter

        self._path = workdir / METRICS_FILE
        self._write = write
        if not write:
            return
        try:
            self._file = self._path.open("a+", errors="replace")
            _end_cut_line(self._file)
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step)
        except OSError as error:
            raise UserError(f"{self._path}: cannot write there ({error.strerror})") from None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Records ``values`` (numbers, or mappings of them) under "train", "evaluate", ..."""
        if not self._write:
            return
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
            for name, value in _numbers(values, kind):
                self._board.add_scalar(name, value, step)
        except OSError as error:
            raise UserError(f"{self._path}: cannot write ({error.strerror}); make room") from None

    def close(self) -> None:
        """Writes what is buffered."""
        if not self._write:
            return
        # Every record was flushed when it was written: an error that comes now, on a full disk,
        # would only hide the one that ended the training.
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()


def _end_cut_line(file: TextIO) -> None:
    """Keeps the first new record off a line that a kill or a full disk cut short."""
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        if file.read() != "\n":
            file.write("\n")


def _numbers(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}/{name}", value))
    return found


def read_metrics(workdir: pathlib.Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind, in order of steps.

    A run that was killed repeats the steps after its last checkpoint: the last record of a step
    counts. A line cut short by the kill is left out.
    """
    path = pathlib.Path(workdir) / METRICS_FILE
    records: dict[int, dict[str, Any]] = {}
    try:
        text = read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for line in text.splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") == kind:
            step = record.get("step")
            if type(step) is int and 0 <= step < 2**31:
                records[step] = record
    return [records[step] for step in sorted(records)]


def number_at(record: Any, *keys: str) -> float | None:
    """Returns the number under ``keys`` in nested mappings; None where there is none.

    A metrics file may be damaged; a plot draws the records that are whole.
    """
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    if type(record) not in (int, float) or not abs(record) < 1e300:
        return None
    return float(record)


class Bar:
    """A progress bar: stage, loss, accuracy, images/s and time left.

    Where the output is not a terminal, a plain line every ten seconds instead.
    """

    def __init__(self, total: int, done: int, speak: bool = True) -> None:
        """Without ``speak`` it says nothing."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(highlight=False, soft_wrap=True, quiet=not speak)
        self._live = self._console.is_terminal
        self._total = total
        self._spoken = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", total=total, completed=done, text="")
        self._progress.start()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False)
        sys.stdout.flush()

    def show(self, step: int, stage: str, text: str) -> None:
        """Moves to ``step`` and shows ``text`` beside the bar."""
        self._progress.update(self._task, completed=step, description=stage, text=text)
        now = time.monotonic()
        if not self._live and now - self._spoken > 10:
            self.say(f"{stage} {step}/{self._total} {text}")
            self._spoken = now

    def stop(self) -> None:
        """Takes the bar away."""
        self._progress.stop()
