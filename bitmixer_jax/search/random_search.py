"""Random policies that use up the budget: a baseline for the other methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import numpy as np

from bitmixer_jax.search.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
    """Draws policies that fit the budget and have no room left in it (`Problem.draw`).

    Without a budget, the policies are spread over the whole range of the objective.

    Attributes:
      policies: how many policies to evaluate, 1 or more.
      batch: how many policies to ask for at a time, 1 or more.

    `search.search` has an example.
    """

    policies: int = 512
    batch: int = 32

    def evaluations(self, problem: Problem) -> int:
        """Returns the most policies that the method asks for."""
        return self.policies

    def run(
        self, problem: Problem, rng: np.random.Generator
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """Runs as `search.search` describes. Draws from ``rng``."""
        for start in range(0, self.policies, self.batch):
            number = min(self.batch, self.policies - start)
            yield np.stack([problem.draw(rng) for _ in range(number)])
