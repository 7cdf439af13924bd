"""Greedy descent from the widest policy, as Bit-Mixer chooses its sub-networks (reported)."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import numpy as np

from bitmixer_jax.search.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """All layers widest; then repeatedly the next narrower width that loses least per bit saved.

    "Bit saved" is whatever the budget limits (`Problem.saving`). Without a budget it goes on until
    all layers are narrowest, and the policies on the way are a front.
    """

    def evaluations(self, problem: Problem) -> int:
        """Policies that it will ask for, at most."""
        steps = problem.size * (problem.space.n - 1)
        # Step k chooses among the groups that are not narrowest yet; the last steps among few.
        return 1 + steps * problem.size

    def run(
        self, problem: Problem, rng: np.random.Generator
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """See `search.search`; draws nothing."""
        genes = problem.widest
        (loss,) = yield genes[None]
        while not problem.constraints or not problem.fits(genes):
            lower = genes - np.eye(problem.size, dtype=np.int64)[genes > 0]
            saved = problem.saving(genes, lower) if len(lower) else np.zeros(0)
            lower, saved = lower[saved > 0], saved[saved > 0]
            if not len(lower):
                return
            losses = yield lower
            pick = int(np.argmin((losses - loss) / saved))
            genes, loss = lower[pick], losses[pick]
