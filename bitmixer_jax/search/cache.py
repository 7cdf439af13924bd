"""A cache of the scores of policies on the images of a search, kept in a file.

A search depends only on its seed and on the scores. So a search that was stopped is run again from
its start, and reads the scores that it measured before. Searches of one network on the same images
share the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
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
_BATCH = 32  # policies that are measured between two writes; a search that is killed loses these


class EvaluationCache:
    """Returns scores of policies, and measures each policy only once.

    Attributes:
      measured: how many policies this object measured.
      seconds: time that the measurement of all requested policies took, in this process or before.
      spent: seconds that this object spent on measurements.

    Examples:
      >>> def measure(policies):
      ...     print("measures", policies.tolist())
      ...     loss = policies.mean(axis=-1)
      ...     return Scores(top1=1 / loss, loss=loss)
      >>> cache = EvaluationCache(measure, path=None, about={})
      >>> cache(np.asarray([[2, 4]])).loss
      measures [[2, 4]]
      array([3.])
      >>> cache(np.asarray([[2, 4], [4, 4]])).loss
      measures [[4, 4]]
      array([3., 4.])
    """

    def __init__(self, measure: Measure, path: pathlib.Path | None, about: Mapping[str, Any]):
        """Reads the scores in the file.

        Args:
          measure: returns the scores of policies int32 ``[M, L]``.
          path: the file, of JSON lines; None keeps scores in memory only.
          about: JSON values that identify the network and the images. They are the first line of
            the file.

        Raises:
          UserError: the file is of another network or other images, is damaged, or its folder
            cannot be made.
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
        """Reads the file. Does not write to it, because another process may be writing now."""
        self._header = json.dumps(header)
        self._ready = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = read_bytes(path).split(b"\n") if path.exists() else [b""]
        except OSError as error:
            raise cannot_write(path, error) from None
        if self._lacks_header(lines):
            return
        try:
            header_in_file = parse_json(lines[0])
            for line in lines[1:-1]:
                entry = parse_json(line)
                values = (float(entry["top1"]), float(entry["loss"]), float(entry["seconds"]))
                if not np.isfinite(values).all():
                    raise ValueError("scores must be finite")
                self._known[tuple(entry["widths"])] = values
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UserError(f"{path}: damaged; remove it to measure again", "damaged") from None
        if header_in_file != header:
            raise UserError(
                f"{path}: scores of another network or of other images; remove it", "other-network"
            )

    def _lacks_header(self, lines: list[bytes]) -> bool:
        """Returns whether the file is empty, or was cut off in its first line."""
        return len(lines) == 1 and self._header.encode().startswith(lines[0])

    def _make_ready(self, path: pathlib.Path) -> None:
        """Writes the header, or removes a last line that was cut off. Raises OSError."""
        lines = read_bytes(path).split(b"\n") if path.exists() else [b""]
        if self._lacks_header(lines):
            path.write_text(self._header + "\n")
        elif lines[-1]:
            os.truncate(path, path.stat().st_size - len(lines[-1]))
        self._ready = True

    def __call__(self, policies: np.ndarray) -> Scores:
        """Returns the scores of policies int32 ``[M, L]``; measures those that are not known.

        Raises:
          UserError: the file cannot be written.
        """
        keys = [tuple(policy) for policy in policies.tolist()]
        distinct = dict.fromkeys(keys)
        new = [key for key in distinct if key not in self._known]
        for start in range(0, len(new), _BATCH):
            self._note(new[start : start + _BATCH])
        self.seconds += float(sum(self._known[key][2] for key in distinct))
        values = np.asarray([self._known[key] for key in keys])
        return Scores(values[:, 0], values[:, 1])

    def _note(self, new: list[tuple[int, ...]]) -> None:
        """Measures policies, and adds their scores to the file."""
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
    """Returns a file name that identifies the network and the images in ``about``."""
    text = json.dumps(about, sort_keys=True)
    return f"scores-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"


def writable(path: pathlib.Path) -> pathlib.Path | None:
    """Returns ``path``, and makes its folder; None with a warning if the folder is read-only."""
    try:
        path.parent.mkdir(exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s: cannot write there (%s); scores are not stored, so a search that is stopped has "
            "to start again",
            *(path.parent, error.strerror),
        )
        return None
    return path
