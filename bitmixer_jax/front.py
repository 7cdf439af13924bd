"""Pareto fronts: the policies that no other beats in both accuracy and cost, and their files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitmixer_jax import deprecated
from bitmixer_jax.errors import UserError, shown
from bitmixer_jax.files import read_document, write_new
from bitmixer_jax.policy import BitSpace

FRONT_FORMAT = "bitmixer-front"
FRONT_VERSION = 1
_MOST = 1e300  # of a number in a file: whole numbers can be too large for float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One policy of a front.

    Attributes:
      widths: ``[L]`` bits.
      cost: in the unit of the front.
      loss: mean cross-entropy (nats) on the images of the search.
      top1: accuracy on them, 0..1.
      test_top1: accuracy on test data, 0..1, where it was measured.
    """

    widths: tuple[int, ...]
    cost: float
    loss: float
    top1: float
    test_top1: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Front:
    """Policies of a network by ascending cost and descending loss, none beaten in both.

    Attributes:
      points: at least one.
      names: ``[L]`` layer names.
      choices: widths of the network.
      cost: what is meant by cost, such as "bitops" (a key of `cost.costs`).
      unit: of the cost.
      weights_digest: digest of the weights that were evaluated (`checkpoints.digest`).
      notes: further JSON values kept in the file: method, seed, images, ...
    """

    points: tuple[Point, ...]
    names: tuple[str, ...]
    choices: tuple[int, ...]
    cost: str
    unit: str
    weights_digest: str
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def network(self) -> str:
        """Deprecated: `weights_digest`."""
        deprecated.warn("Front.network", "Front.weights_digest")
        return self.weights_digest

    def best(self, budget: float) -> Point | None:
        """The best point that costs at most ``budget``; None if all cost more."""
        fitting = [point for point in self.points if point.cost <= budget]
        return fitting[-1] if fitting else None

    def save(self, path: str | pathlib.Path, *, overwrite: bool = False) -> None:
        """Writes a front file (JSON).

        Raises:
          UserError: the file is there with other content and ``overwrite`` is false, or it cannot
            be written.
        """
        content = {
            **self.notes,
            "format": FRONT_FORMAT,
            "version": FRONT_VERSION,
            "weights_digest": self.weights_digest,
            "cost": self.cost,
            "unit": self.unit,
            "choices": list(self.choices),
            "layers": list(self.names),
            "points": [dataclasses.asdict(point) for point in self.points],
        }
        write_new(path, json.dumps(content, indent=1) + "\n", overwrite=overwrite)


def pareto(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Which points no other beats: indices by ascending cost, of strictly descending loss.

    Args:
      costs, losses: ``[M]``, both better when smaller. Of equal points the first is kept.
    """
    order = np.lexsort((np.arange(len(costs)), losses, costs))
    kept: list[int] = []
    for i in order:
        if not kept or losses[i] < losses[kept[-1]]:
            kept.append(int(i))
    return np.asarray(kept, np.int64)


def load_front(
    path: str | pathlib.Path,
    names: Sequence[str],
    space: BitSpace,
    weights_digest: str | None = None,
) -> Front:
    """Reads a front file made for the network whose layers are called ``names``.

    Args:
      weights_digest: digest of the weights that will run; None accepts a front of other weights.

    Raises:
      UserError: the file is missing, not a front, empty, damaged, or of another network.
    """
    path, content = read_document(path, "front", FRONT_FORMAT, FRONT_VERSION)
    for key, mine in (("choices", list(space.choices)), ("layers", list(names))):
        if content.get(key) != mine:
            raise UserError(
                f"{path}: a front of another network: its {key} differ", "other-network"
            )
    content = deprecated.new_keys(content, {"network": "weights_digest"})
    if weights_digest is not None and content.get("weights_digest") != weights_digest:
        raise UserError(
            f"{path}: a front of other weights of this network (retrained since?); search again",
            "other-network",
        )
    try:
        points = tuple(_point(entry) for entry in content["points"])
        text = {key: content[key] for key in ("cost", "unit", "weights_digest")}
        if not all(isinstance(value, str) for value in text.values()):
            raise TypeError("cost, unit and weights_digest must be text")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged front file ({error})", "damaged") from None
    if not points:
        raise UserError(f"{path}: an empty front; search again", "damaged")
    for point in points:
        try:
            space.check(np.asarray(point.widths), len(names))
        except UserError as error:
            raise UserError(f"{path}: {error}", error.code) from None
    kept = pareto(np.asarray([p.cost for p in points]), np.asarray([p.loss for p in points]))
    if kept.tolist() != list(range(len(points))):
        raise UserError(
            f"{path}: damaged front file (points out of order, or beaten by others)", "damaged"
        )
    known = {"format", "version", "choices", "layers", "points", *text}
    notes = {key: value for key, value in content.items() if key not in known}
    return Front(points=points, names=tuple(names), choices=space.choices, notes=notes, **text)


def _point(entry: Any) -> Point:
    """Reads a point; raises TypeError, ValueError or KeyError where it is none."""
    if not isinstance(entry, Mapping):
        raise TypeError(f"{shown(entry)} is not a point")
    if set(entry) != {field.name for field in dataclasses.fields(Point)}:
        raise ValueError(f"a point has the fields {shown(sorted(entry))}")
    widths = entry["widths"]
    if not isinstance(widths, list) or not all(type(w) is int for w in widths):
        raise ValueError("widths must be whole numbers")
    numbers = [entry[key] for key in ("cost", "loss", "top1")]
    if entry["test_top1"] is not None:
        numbers.append(entry["test_top1"])
    if not all(type(x) in (int, float) and -_MOST < x < _MOST for x in numbers):
        raise ValueError("cost, loss and accuracy must be finite numbers")
    if not all(0 <= x <= 1 for x in numbers[2:]):
        raise ValueError("accuracy must lie in 0..1")
    return Point(**{**entry, "widths": tuple(widths)})
