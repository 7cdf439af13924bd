"""The integer program of HAWQ-V3: the best widths, if the losses of layers add up.

Let s[g, c] be the loss that choice c costs group g, and x[g, c] in {0, 1} whether g takes c:

    minimise    sum over g, c of s[g, c] x[g, c]
    subject to  sum over c of x[g, c] = 1                     for each group g
                sum over g, c of cost[g, c] x[g, c] <= limit  for each constraint

HiGHS solves it (`Problem.solve_ilp`). That losses add up is an assumption, so the solution is
evaluated like any other policy.

Reference: Yao et al., HAWQ-V3: Dyadic Neural Network Quantization, ICML 2021.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import numpy as np

from bitmixer_jax.search.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class IntegerProgram:
    """Measures the loss of each width in each group alone, and solves the integer program.

    The first measurement starts from the widest policy, and changes one group at a time.

    Within a budget, the method then improves the solution in a trust region (our addition to
    HAWQ-V3). It measures again around the best policy so far, and solves for a policy that differs
    from it in at most K groups. K is a third of the groups at first, and is halved each time the
    loss does not fall. The search ends at K = 0, when the solution is the best policy itself, or
    when it would have to measure more than ``rounds`` times.

    The trust region is needed because losses do not quite add up: the batch norm of a layer, for
    example, depends on the width of its predecessor. So measured losses are only right near the
    policy around which they were measured.

    Without a budget, the method solves the program for ``points`` budgets, spread over the range of
    the objective, and does not measure again.

    Attributes:
      sensitivity: float ``[G, n]``, to use in place of the first measurement, in nats (see
        `hessian.sensitivity`). None: measure.
      rounds: how often to measure around a solution, 0 or more. 0: the program of HAWQ-V3 alone.
      points: how many budgets to solve for if there is none, 1 or more.

    `search.search` has an example.

    Reference: Yao et al., HAWQ-V3: Dyadic Neural Network Quantization, ICML 2021.
    """

    sensitivity: np.ndarray | None = None
    rounds: int = 3
    points: int = 32

    def evaluations(self, problem: Problem) -> int:
        """Returns the most policies that the method asks for."""
        around = problem.size * (problem.space.n - 1)
        first = 0 if self.sensitivity is not None else 1 + around
        if not problem.constraints:
            return first + self.points
        steps = self.rounds + self._radius(problem).bit_length() if self.rounds else 0
        return first + 1 + self.rounds * around + steps

    def run(
        self, problem: Problem, rng: np.random.Generator
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """Runs as `search.search` describes. Draws nothing."""
        sensitivity = self.sensitivity
        if sensitivity is None:
            (loss,) = yield problem.widest[None]
            sensitivity = yield from _measure(problem, problem.widest, loss)
        if not problem.constraints:
            low, high = problem.range(problem.objective)
            budgets = [problem.within(most) for most in np.linspace(low, high, self.points)]
            solved = [one.solve_ilp(_prefer_wider(sensitivity)) for one in budgets]
            yield np.unique([genes for genes in solved if genes is not None], axis=0)
            return
        best = problem.solve_ilp(_prefer_wider(sensitivity))
        if best is None:
            return
        (least,) = yield best[None]
        rounds, centre, radius = self.rounds, None, self._radius(problem)
        while radius:
            if centre is not best:
                if not rounds:
                    return
                rounds -= 1
                centre = best
                sensitivity = yield from _measure(problem, centre, least)
            genes = problem.solve_ilp(_prefer_wider(sensitivity), centre, radius)
            assert genes is not None  # the centre is a solution
            if (genes == centre).all():
                return
            (loss,) = yield genes[None]
            if loss < least:
                best, least = genes, loss
            else:
                radius //= 2

    @staticmethod
    def _radius(problem: Problem) -> int:
        """Returns how many groups the first step may change: a third of them, rounded up."""
        return -(-problem.size // 3)


def _measure(
    problem: Problem, genes: np.ndarray, loss: float
) -> Generator[np.ndarray, np.ndarray, np.ndarray]:
    """Measures what each change of one group adds to ``loss``, the loss of ``genes``: ``[G, n]``.

    Args:
      genes: ``[G]``.
    """
    groups, choices = np.nonzero(np.arange(problem.space.n) != genes[:, None])
    changed = np.repeat(genes[None], len(groups), axis=0)
    changed[np.arange(len(groups)), groups] = choices
    losses = yield changed
    sensitivity = np.zeros((problem.size, problem.space.n))
    sensitivity[groups, choices] = losses - loss
    return sensitivity


def _prefer_wider(sensitivity: np.ndarray) -> np.ndarray:
    """Lowers the sensitivities of wider widths slightly, so that of ties the wider width wins.

    Sensitivities can be zero or noise. A wider width is then the safer choice.
    """
    n = sensitivity.shape[1]
    return sensitivity - 1e-6 * (np.ptp(sensitivity) or 1.0) * np.arange(n) / n
