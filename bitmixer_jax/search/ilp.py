"""The integer programme: the widths that a sum of per-layer sensitivities says are best.

With s[g, c] the loss that width c costs group g, and x[g, c] in {0, 1} whether g takes c:

    minimise  sum s x    subject to  sum_c x[g, c] = 1 for each g
                                 sum cost x <= limit for each limit

as in HAWQ-V3 (Yao et al., ICML 2021), solved by HiGHS. That effects of layers add up is an
assumption; the solution is evaluated like any other policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import numpy as np

from bitmixer_jax.search.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class IntegerProgram:
    """Measures what each width costs each layer while all others stay as they are, then solves.

    First all others are widest. Effects do not quite add up (the batch norm of a layer depends on
    the width before it), so under a budget it goes on from the solution: measures again around
    it, and solves for the best that differs from it in at most a third of the layers. Where that is
    no better, it halves how many may differ (a trust region: linear models, each believed near
    where it was made).

    Attributes:
      sensitivity: ``[G, n]`` instead of the first measurement (`hessian.sensitivity`).
      rounds: how often it goes on from a solution; 0: the plain integer programme.
      points: how many budgets a front is solved for.
    """

    sensitivity: np.ndarray | None = None
    rounds: int = 3
    points: int = 32

    def evaluations(self, problem: Problem) -> int:
        """Policies that it will ask for, at most."""
        around = problem.size * (problem.space.n - 1)
        first = 0 if self.sensitivity is not None else 1 + around
        if not problem.constraints:
            return first + self.points
        steps = self.rounds + self._radius(problem).bit_length() if self.rounds else 0
        return first + 1 + self.rounds * around + steps

    def run(
        self, problem: Problem, rng: np.random.Generator
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """See `search.search`; draws nothing."""
        sensitivity = self.sensitivity
        if sensitivity is None:
            (loss,) = yield problem.widest[None]
            sensitivity = yield from _around(problem, problem.widest, loss)
        if not problem.constraints:
            low, high = problem.range(problem.objective)
            budgets = [problem.within(most) for most in np.linspace(low, high, self.points)]
            solved = [one.solve_ilp(_wider(sensitivity)) for one in budgets]
            yield np.unique([genes for genes in solved if genes is not None], axis=0)
            return
        best = problem.solve_ilp(_wider(sensitivity))
        if best is None:
            return
        (least,) = yield best[None]
        rounds, centre, changes = self.rounds, None, self._radius(problem)
        while changes:
            if centre is not best:
                if not rounds:
                    return
                rounds -= 1
                centre = best
                sensitivity = yield from _around(problem, centre, least)
            genes = problem.solve_ilp(_wider(sensitivity), centre, changes)
            assert genes is not None  # the centre itself fits
            if (genes == centre).all():
                return
            (loss,) = yield genes[None]
            if loss < least:
                best, least = genes, loss
            else:
                changes //= 2

    @staticmethod
    def _radius(problem: Problem) -> int:
        """How many groups the first step beyond a solution may change: a third of them."""
        return -(-problem.size // 3)


def _around(
    problem: Problem, genes: np.ndarray, loss: float
) -> Generator[np.ndarray, np.ndarray, np.ndarray]:
    """What it adds to ``loss``, that of ``genes`` ``[G]``, to change one group: ``[G, n]``."""
    choices = np.arange(problem.space.n)
    places = np.argwhere(choices != genes[:, None])
    asked = np.repeat(genes[None], len(places), axis=0)
    asked[np.arange(len(places)), places[:, 0]] = places[:, 1]
    losses = yield asked
    table = np.zeros((problem.size, problem.space.n))
    table[places[:, 0], places[:, 1]] = losses - loss
    return table


def _wider(sensitivity: np.ndarray) -> np.ndarray:
    """Of widths that seem equally good, the wider: sensitivities can be zero, or noise."""
    n = sensitivity.shape[1]
    return sensitivity - 1e-6 * (np.ptp(sensitivity) or 1.0) * np.arange(n) / n
