"""Reports of a run while it trains: JSON lines, TensorBoard files, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.files import parse_json, read_bytes

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Appends records to ``workdir/metrics.jsonl`` and to ``workdir/tensorboard``."""

    def __init__(self, workdir: pathlib.Path, step: int, enabled: bool = True) -> None:
        """Opens the files.

        Args:
          workdir: folder of the run.
          step: where training starts or resumes; TensorBoard drops what it has of later steps.
          enabled: False writes nothing. Of several processes only the first one writes.
        """
        from tensorboardX import SummaryWriter

        self._path = workdir / METRICS_FILE
        self._enabled = enabled
        if not enabled:
            return
        try:
            # "a+": records are appended, and the last line can be read to see whether it is whole.
            self._file = self._path.open("a+", errors="replace")
            _end_cut_line(self._file)
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step)
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot write there ({reason(error)})", "not-writable"
            ) from None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record.

        Args:
          kind: "train" or "evaluate".
          step: number of steps since the run began.
          values: numbers, text, or mappings of them; TensorBoard gets the numbers.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        if not self._enabled:
            return
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()  # a run that is killed keeps its records, and tools can follow it
            for name, value in _numbers(values, kind):
                self._board.add_scalar(name, value, step)
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot write ({reason(error)}); make room", "not-writable"
            ) from None

    def close(self) -> None:
        """Closes the files."""
        if not self._enabled:
            return
        # Every record was flushed when it was written: an error that comes now, on a full disk,
        # would only hide the one that ended the training.
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()


def _end_cut_line(file: TextIO) -> None:
    """Ends a last line that a kill or a full disk cut short, so that a record can follow."""
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        if file.read() != "\n":
            file.write("\n")


def _numbers(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    """Returns the numbers in nested mappings as ("prefix/key/key", number)."""
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}/{name}", value))
    return found


def read_metrics(workdir: pathlib.Path, kind: str) -> list[dict[str, Any]]:
    """Reads the records of one kind from ``workdir/metrics.jsonl``, ordered by step.

    A run that was killed repeats the steps after its last checkpoint; the last record of a step
    counts. Lines that are not whole records are skipped.

    Args:
      workdir: folder of the run.
      kind: "train" or "evaluate".

    Returns:
      JSON objects with "kind", "step" and "stage". "train" has means since the record before:
      "loss" (nats), "accuracy" (0..1), "grad_norm", "rho", and "epoch", "images_per_second".
      "evaluate" has what `evaluation.evaluate` returns. Empty if there is no file.

    Raises:
      UserError: the file cannot be read.

        >>> read_metrics(pathlib.Path("no_such_run"), "train")
        []
    """
    path = pathlib.Path(workdir) / METRICS_FILE
    records: dict[int, dict[str, Any]] = {}
    try:
        text = read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})", "not-readable") from None
    for line in text.splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") == kind:
            step = record.get("step")
            if type(step) is int and 0 <= step < 2**31:  # a bool is an instance of int
                records[step] = record
    return [records[step] for step in sorted(records)]


def number_at(record: Any, *keys: str) -> float | None:
    """Returns the number under ``keys`` in nested mappings, or None where there is none.

    A metrics file may be damaged; plots draw the records that have the number.

        >>> number_at({"random": {"mean": 0.5}}, "random", "mean")
        0.5
    """
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    if type(record) not in (int, float) or not abs(record) < 1e300:
        return None
    return float(record)


class Bar:
    """A progress bar with stage, loss, accuracy, images/s and time left.

    If the output is not a terminal, it prints a plain line every ten seconds instead.
    """

    def __init__(self, total: int, done: int, enabled: bool = True) -> None:
        """Shows the bar.

        Args:
          total: steps of the run.
          done: steps that are done already.
          enabled: False prints nothing.
        """
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(highlight=False, soft_wrap=True, quiet=not enabled)
        self._live = self._console.is_terminal
        self._total = total
        self._printed_at = time.monotonic()
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
        """Moves the bar to ``step`` and shows ``text`` beside it."""
        # Logs of batch systems are no terminals: a bar would fill them with control characters.
        self._progress.update(self._task, completed=step, description=stage, text=text)
        now = time.monotonic()
        if not self._live and now - self._printed_at > 10:
            self.say(f"{stage} {step}/{self._total} {text}")
            self._printed_at = now

    def stop(self) -> None:
        """Removes the bar."""
        self._progress.stop()


class Clock:
    """Measures images per second between two readings."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._last: float | None = None

    def restart(self) -> None:
        """Leaves out the time since the last reading, such as that of an evaluation."""
        if self._last is not None:
            self._last = time.monotonic()

    def rate(self, steps: int) -> float | None:
        """Returns images per second of the ``steps`` since the last reading.

        The first reading returns None, because its time includes the compilation.
        """
        now, last = time.monotonic(), self._last
        self._last = now
        return None if last is None else steps * self._batch_size / max(now - last, 1e-9)


def format_evaluation(result: Mapping[str, Any]) -> str:
    """Returns one line with the accuracies of `evaluation.evaluate`, in percent.

    >>> format_evaluation({"uniform": {"2": 0.9, "4": 0.975}})
    '2 bits 90.00%, 4 bits 97.50%'
    """
    parts = []
    if "float" in result:
        parts.append(f"float {100 * result['float']:.2f}%")
    parts += [f"{w} bits {100 * top1:.2f}%" for w, top1 in result.get("uniform", {}).items()]
    if "random" in result:
        random = result["random"]
        parts.append(
            f"{random['policies']} random policies {100 * random['mean']:.2f}% "
            f"(worst {100 * random['worst']:.2f}%)"
        )
    return ", ".join(parts)


def format_progress(record: Mapping[str, float], images_left: int) -> str:
    """Returns the text beside the bar for a "train" record: loss, accuracy, speed and time left."""
    text = f"loss {record['loss']:.3f}, accuracy {100 * record['accuracy']:.1f}%"
    if rate := record.get("images_per_second"):
        text += f", {rate:.0f} images/s, {_duration(images_left / rate)} left"
    return text


def _duration(seconds: float) -> str:
    """Returns text such as 45 s, 12 min, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
