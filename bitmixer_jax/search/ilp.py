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
    """Measures what each width costs each layer while all others stay widest, then solves.

    Attributes:
      sensitivity: ``[G, n]`` instead of the measured one (`hessian.sensitivity`).
      points: how many budgets a front is solved for.
    """

    sensitivity: np.ndarray | None = None
    points: int = 32

    def evaluations(self, problem: Problem) -> int:
        """Policies that it will ask for, at most."""
        measured = 0 if self.sensitivity is not None else 1 + problem.size * (problem.space.n - 1)
        return measured + (1 if problem.limits else self.points)

    def run(
        self, problem: Problem, rng: np.random.Generator
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """See `search.search`; draws nothing."""
        sensitivity = self.sensitivity
        if sensitivity is None:
            sensitivity = yield from _measure(problem)
        if problem.limits:
            problems = [problem]
        else:
            low, high = problem.range(problem.axis)
            problems = [problem.within(most) for most in np.linspace(low, high, self.points)]
        # Of widths that seem equally good, the wider: sensitivities can be zero or noise.
        spread = np.ptp(sensitivity) or 1.0
        preferred = sensitivity - 1e-6 * spread * np.arange(problem.space.n) / problem.space.n
        solutions = [one.minimise(preferred) for one in problems]
        solved = [s for s in solutions if s is not None]
        if solved:
            yield np.unique(solved, axis=0)


def _measure(problem: Problem) -> Generator[np.ndarray, np.ndarray, np.ndarray]:
    """Loss above that of the widest policy with one group at each width: ``[G, n]``."""
    widest, n = problem.widest, problem.space.n
    asked = [widest]
    for group in range(problem.size):
        for choice in range(n - 1):
            genes = widest.copy()
            genes[group] = choice
            asked.append(genes)
    losses = yield np.stack(asked)
    table = np.zeros((problem.size, n))
    table[:, :-1] = (losses[1:] - losses[0]).reshape(problem.size, n - 1)
    return table
