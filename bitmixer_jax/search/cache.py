"""The scores of policies on the images of a search, remembered in a file.

A search is a function of its seed and of the scores, so one that was stopped goes on by running
again: scores that are in the file are not measured twice. Searches of one network on the same
images share the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Scores
from bitmixer_jax.files import cannot_write, parse_json, read_bytes

Measure = Callable[[np.ndarray], Scores]
SCORES_FORMAT = "bitmixer-scores"
_PART = 32  # policies measured between two writes: a kill loses no more


class EvaluationCache:
    """Scores by policy, measured when they are not known yet.

    Attributes:
      measured: how many policies were measured here.
      seconds: how long all policies that were asked for took when they were measured.
      spent: seconds spent here.
    """

    def __init__(self, measure: Measure, path: pathlib.Path | None, about: Mapping[str, Any]):
        """Reads what is known.

        Args:
          measure: gives the scores of policies int32 ``[M, L]``.
          path: the file, JSON lines; None keeps scores in memory alone.
          about: JSON values that say what was measured: network, images. They open the file.

        Raises:
          UserError: the file is of something else, damaged, or cannot be written.
        """
        self.measured = 0
        self.seconds = 0.0
        self.spent = 0.0
        self._measure = measure
        self._path = path
        self._known: dict[tuple[int, ...], tuple[float, float, float]] = {}
        if path is not None:
            self._open(path, {"format": SCORES_FORMAT, "version": 1, **about})

    def _open(self, path: pathlib.Path, header: Mapping[str, Any]) -> None:
        """Reads the file. Writes nothing: another process may be writing to it."""
        self._header = json.dumps(header)
        self._ready = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = read_bytes(path).split(b"\n") if path.exists() else [b""]
        except OSError as error:
            raise cannot_write(path, error) from None
        if self._no_header(lines):
            return
        try:
            found = parse_json(lines[0])
            for line in lines[1:-1]:
                entry = parse_json(line)
                values = (float(entry["top1"]), float(entry["loss"]), float(entry["seconds"]))
                if not np.isfinite(values).all():
                    raise ValueError("scores are finite")
                self._known[tuple(entry["widths"])] = values
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UserError(f"{path}: damaged; remove it to measure again", "damaged") from None
        if found != header:
            raise UserError(
                f"{path}: scores of another network or of other images; remove it", "other-network"
            )

    def _no_header(self, lines: list[bytes]) -> bool:
        """Whether a file is empty, or was cut short in its first line."""
        return len(lines) == 1 and self._header.encode().startswith(lines[0])

    def _make_ready(self, path: pathlib.Path) -> None:
        """Writes the header, or takes away a last line that a kill cut short. Raises OSError."""
        lines = read_bytes(path).split(b"\n") if path.exists() else [b""]
        if self._no_header(lines):
            path.write_text(self._header + "\n")
        elif lines[-1]:
            os.truncate(path, path.stat().st_size - len(lines[-1]))
        self._ready = True

    def __call__(self, policies: np.ndarray) -> Scores:
        """Scores of policies int32 ``[M, L]``; measures those not known, and notes them."""
        keys = [tuple(policy) for policy in policies.tolist()]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        for start in range(0, len(new), _PART):
            self._note(new[start : start + _PART])
        rows = np.asarray([self._known[key] for key in keys])
        self.seconds += float(sum(self._known[key][2] for key in dict.fromkeys(keys)))
        return Scores(rows[:, 0], rows[:, 1])

    def _note(self, new: list[tuple[int, ...]]) -> None:
        """Measures policies and writes what was found."""
        start = time.perf_counter()
        scores = self._measure(np.asarray(new, np.int32))
        spent = time.perf_counter() - start
        self.spent += spent
        self.measured += len(new)
        each = spent / len(new)
        lines = []
        for key, top1, loss in zip(new, scores.top1, scores.loss, strict=True):
            self._known[key] = (float(top1), float(loss), each)
            entry = {"widths": key, "top1": float(top1), "loss": float(loss), "seconds": each}
            lines.append(json.dumps(entry) + "\n")
        if self._path is None:
            return
        try:
            if not self._ready:
                self._make_ready(self._path)
            with self._path.open("a") as file:
                file.write("".join(lines))
        except OSError as error:
            raise cannot_write(self._path, error) from None


def file_name(about: Mapping[str, Any]) -> str:
    """A file name for scores of what ``about`` says."""
    text = json.dumps(about, sort_keys=True)
    return f"scores-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
