"""The settings of a search on a trained network."""

from __future__ import annotations

import dataclasses
import pathlib

from bitmixer_jax.errors import UserError
from bitmixer_jax.policy import closest
from bitmixer_jax.search.search import METHODS

SENSITIVITIES = ("measured", "hessian")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The settings of a search.

    Attributes:
      method: "greedy", "ilp", "evolution" or "random".
      seed: of the choice of images, and of the method's random draws.
      evaluations: how many policies "evolution" and "random" evaluate, 1 or more. The number that
        "greedy" and "ilp" evaluate depends on the network alone.
      sensitivity: where "ilp" takes its first sensitivities from: "measured" losses, or the
        "hessian" (see `hessian.sensitivity`).
      images: the most images that score a policy, 1 or more.
      split: the split that they are drawn from, such as "train[45000:]". "": the part of its split
        that training did not use, or all of the split if training used all of it.
      data_dir: the folder of the data sets; None: the folder that training used.
      latency: a latency file, for the cost "latency_ms" (see `cost.load_latency`).

    Raises:
      UserError: a value is not allowed.

    Examples:
      >>> SearchSettings(method="ilp", sensitivity="hessian").images
      2000
    """

    method: str = "greedy"
    seed: int = 0
    evaluations: int = 512
    sensitivity: str = "measured"
    images: int = 2000
    split: str = ""
    data_dir: str | None = None
    latency: str | pathlib.Path | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("method", self.method, tuple(METHODS)),
            ("sensitivity", self.sensitivity, SENSITIVITIES),
        ):
            if value not in allowed:
                raise UserError(
                    f"{name} {value!r}{closest(value, allowed)}: one of {allowed}", "unknown-name"
                )
        if self.sensitivity != "measured" and self.method != "ilp":
            raise UserError(
                f"sensitivity {self.sensitivity}: only method ilp takes it; choose method ilp",
                "conflict",
            )
        for name, number in (("evaluations", self.evaluations), ("images", self.images)):
            if number < 1:
                raise UserError(f"{name} {number}: give 1 or more")
