"""Pareto fronts: the policies that no other policy beats in both cost and loss; and their files.

Policies are ranked by loss, because on a few thousand images many of them have the same accuracy.
Their mean losses still differ.
"""

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
_LIMIT = 1e300  # of numbers in a file: JSON allows whole numbers that no float can hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One policy of a front, with its cost and its scores.

    Attributes:
      widths: ``[L]`` widths in bits.
      cost: in the unit of the front.
      loss: mean cross-entropy on the images of the search, in nats.
      top1: accuracy on the images of the search, from 0 to 1.
      test_top1: accuracy on the test data, from 0 to 1; None if it was not measured.
    """

    widths: tuple[int, ...]
    cost: float
    loss: float
    top1: float
    test_top1: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Front:
    """Policies of a network in ascending order of cost and strictly descending order of loss.

    Attributes:
      points: the policies, at least one.
      names: ``[L]`` layer names of the network.
      choices: widths of the network, in bits.
      cost: name of the cost, such as "bitops" (a key of `cost.costs`).
      unit: of the cost, such as "BitOPs".
      weights_digest: SHA-256 of the weights that were evaluated (`Trained.weights_digest`).
      notes: more JSON values to store in the file, such as the method, the seed and the images.

    Examples:
      >>> import tempfile
      >>> front = Front(
      ...     points=(
      ...         Point(widths=(2, 3), cost=2.5, loss=0.6, top1=0.8),
      ...         Point(widths=(4, 4), cost=4.0, loss=0.2, top1=0.9),
      ...     ),
      ...     names=("conv1", "conv2"), choices=(2, 3, 4), cost="avg_bits", unit="bits",
      ...     weights_digest="",
      ... )
      >>> front.best(3.0).widths
      (2, 3)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     front.save(f"{folder}/front.json")
      ...     load_front(f"{folder}/front.json", front.names, BitSpace((2, 3, 4))) == front
      True
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
        """The old name of `weights_digest`; deprecated."""
        deprecated.warn("Front.network", "Front.weights_digest")
        return self.weights_digest

    def best(self, budget: float) -> Point | None:
        """Returns the point of least loss that costs at most ``budget``; None if all cost more.

        Args:
          budget: in the unit of the cost.
        """
        affordable = [point for point in self.points if point.cost <= budget]
        return affordable[-1] if affordable else None

    def save(self, path: str | pathlib.Path, *, overwrite: bool = False) -> None:
        """Writes a front file (JSON).

        Args:
          path: the file.
          overwrite: whether to replace a file that has other content.

        Raises:
          UserError: the file exists with other content and ``overwrite`` is false, or it cannot be
            written.
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
    """Returns the Pareto front of two objectives that are both minimised.

    Point i is on the front if no point j has

      costs[j] <= costs[i]  and  losses[j] <= losses[i],  with one of the two strictly less.

    Of points that are equal in both, only the first is kept.

    Args:
      costs: ``[M]``.
      losses: ``[M]``.

    Returns:
      int64 ``[F]`` indices of the front, in ascending order of cost. The losses are then in
      strictly descending order.

    Examples:
      >>> pareto(np.asarray([1.0, 3.0, 2.0, 3.0]), np.asarray([0.9, 0.2, 0.5, 0.7])).tolist()
      [0, 2, 1]
    """
    order = np.lexsort((np.arange(len(costs)), losses, costs))
    front: list[int] = []
    for i in order:
        if not front or losses[i] < losses[front[-1]]:
            front.append(int(i))
    return np.asarray(front, np.int64)


def load_front(
    path: str | pathlib.Path,
    names: Sequence[str],
    space: BitSpace,
    weights_digest: str | None = None,
) -> Front:
    """Reads a front file that was made for the same layers and choices.

    Args:
      path: the file, as `Front.save` wrote it.
      names: ``[L]`` layer names of the network, from ``model.names``.
      space: the widths of the network.
      weights_digest: SHA-256 of the weights that will run (`Trained.weights_digest`). None accepts
        a front of any weights.

    Returns:
      the front. All entries that are not fields of the format are its notes.

    Raises:
      UserError: the file is missing, is not a front file, has no points, is damaged, or was made
        for another network or other weights.

    See `Front` for an example.
    """
    path, content = read_document(path, "front", FRONT_FORMAT, FRONT_VERSION)
    for key, expected in (("choices", list(space.choices)), ("layers", list(names))):
        if content.get(key) != expected:
            raise UserError(f"{path}: made for another network: its {key} differ", "other-network")
    content = deprecated.new_keys(content, {"network": "weights_digest"})
    if weights_digest is not None and content.get("weights_digest") != weights_digest:
        raise UserError(
            f"{path}: made for other weights of this network (trained again since?); search again",
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
        raise UserError(f"{path}: an empty front, without points; search again", "damaged")
    for point in points:
        try:
            space.check(np.asarray(point.widths), len(names))
        except UserError as error:
            raise UserError(f"{path}: {error}", error.code) from None
    front = pareto(np.asarray([p.cost for p in points]), np.asarray([p.loss for p in points]))
    if front.tolist() != list(range(len(points))):
        raise UserError(
            f"{path}: damaged front file (points out of order, or beaten by other points)",
            "damaged",
        )
    fields = {"format", "version", "choices", "layers", "points", *text}
    notes = {key: value for key, value in content.items() if key not in fields}
    return Front(points=points, names=tuple(names), choices=space.choices, notes=notes, **text)


def _point(entry: Any) -> Point:
    """Reads a point of a front file. Raises TypeError or ValueError if it is not a point."""
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
    if not all(type(x) in (int, float) and -_LIMIT < x < _LIMIT for x in numbers):
        raise ValueError("cost, loss and accuracy must be finite numbers")
    if not all(0 <= x <= 1 for x in numbers[2:]):
        raise ValueError("accuracy must lie in 0..1")
    return Point(**{**entry, "widths": tuple(widths)})
