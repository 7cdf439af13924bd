"""Greedy descent from the widest policy, as Bit-Mixer finds its sub-networks (reported)."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import numpy as np

from bitmixer_jax.search.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """Starts from the widest policy and lowers one group of layers at a time.

    Each step gives one group its next narrower width. It takes the group g with the least

      (loss after g is lowered - loss now) / (cost that this saves)

    until the policy fits the budget, or until no step saves cost. The cost is that of the
    constraints that are not met yet (`Problem.saving`). Without a budget, the search continues to
    the narrowest policy, and the front is found among all policies on the way.

    That Bit-Mixer searches greedily is reported. This ratio is our reading.

    `search.search` has an example.

    Reference: Bulat and Tzimiropoulos, Bit-Mixer, ICCV 2021.
    """

    def evaluations(self, problem: Problem) -> int:
        """Returns the most policies that the method asks for."""
        # G (n - 1) steps lead to the narrowest policy. Each step asks for at most G policies.
        return 1 + problem.size * (problem.space.n - 1) * problem.size

    def run(
        self, problem: Problem, rng: np.random.Generator
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """Runs as `search.search` describes. Draws nothing."""
        genes = problem.widest
        (loss,) = yield genes[None]
        while not problem.constraints or not problem.fits(genes):
            lower = problem.narrower(genes)
            saved = problem.saving(genes, lower)
            lower, saved = lower[saved > 0], saved[saved > 0]
            if not len(lower):
                return
            losses = yield lower
            best = int(np.argmin((losses - loss) / saved))
            genes, loss = lower[best], losses[best]
