"""Random policies that use up the budget: what any other method has to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import numpy as np

from bitmixer_jax.search.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
    """Draws policies that fit and use the budget up; without one, over the whole range of cost.

    Attributes:
      policies: how many to evaluate.
      batch: how many are asked for at a time.
    """

    policies: int = 512
    batch: int = 32

    def evaluations(self, problem: Problem) -> int:
        """Policies that it will ask for, at most."""
        return self.policies

    def run(
        self, problem: Problem, rng: np.random.Generator
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """See `search.search`; draws from ``rng``."""
        for start in range(0, self.policies, self.batch):
            number = min(self.batch, self.policies - start)
            yield np.stack([problem.draw(rng) for _ in range(number)])
