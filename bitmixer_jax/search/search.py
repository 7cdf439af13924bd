"""The search itself: a method proposes policies, learns their scores, proposes again.

A method is a generator: it yields genes ``[M, G]`` and receives the losses ``[M]`` of what it
proposed. The best policy, and the front, are chosen among all that were evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, Protocol

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Scores
from bitmixer_jax.front import Point, pareto
from bitmixer_jax.search.evolution import Evolution
from bitmixer_jax.search.greedy import Greedy
from bitmixer_jax.search.ilp import IntegerProgram
from bitmixer_jax.search.problem import Problem
from bitmixer_jax.search.random_search import Random


class Method(Protocol):
    """A way to search. Frozen settings; all state lives in the generator."""

    def evaluations(self, problem: Problem) -> int:
        """Policies that it will ask for, at most."""

    def run(
        self, problem: Problem, rng: np.random.Generator
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """Yields genes ``[M, G]``, M > 0, and is sent their losses float64 ``[M]``."""


METHODS: dict[str, Callable[..., Method]] = {
    "greedy": Greedy,
    "ilp": IntegerProgram,
    "evolution": Evolution,
    "random": Random,
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """All that a search evaluated, each policy once, in the order in which it was asked for.

    Attributes:
      policies: int32 ``[M, L]``.
      scores: of each, on the images of the search.
      costs: float64 ``[M]`` on the axis.
      fits: bool ``[M]``, within the budget.
    """

    policies: np.ndarray
    scores: Scores
    costs: np.ndarray
    fits: np.ndarray

    def point(self, i: int) -> Point:
        """Policy ``i`` as a point of a front."""
        return Point(
            widths=tuple(self.policies[i].tolist()),
            cost=float(self.costs[i]),
            loss=float(self.scores.loss[i]),
            top1=float(self.scores.top1[i]),
        )

    def best(self) -> Point:
        """The policy of least loss within the budget.

        Raises:
          UserError: none of those evaluated keeps within it.
        """
        if not self.fits.any():
            raise UserError(
                "search: none of the policies that were evaluated fits the budget; "
                "try method ilp, or more evaluations",
                "out-of-reach",
            )
        return self.point(int(np.argmin(np.where(self.fits, self.scores.loss, np.inf))))

    def front(self) -> tuple[Point, ...]:
        """The policies that no other beats in both loss and cost, by ascending cost."""
        return tuple(self.point(int(i)) for i in pareto(self.costs, self.scores.loss))


def search(
    problem: Problem,
    method: Method,
    score: Callable[[np.ndarray], Scores],
    *,
    seed: int = 0,
    on_scores: Callable[[int, float], Any] = lambda number, best: None,
) -> SearchResult:
    """Runs a method to its end.

    Args:
      score: gives the scores of policies int32 ``[M, L]``, such as `scores.EvaluationCache`.
      seed: of the method's draws.
      on_scores: called with the number of policies evaluated so far and the least loss within the
        budget, to show how far it is.
    """
    run = method.run(problem, np.random.default_rng(seed))
    known: dict[tuple[int, ...], tuple[float, float]] = {}
    best, losses = np.inf, None
    while True:
        try:
            genes = next(run) if losses is None else run.send(losses)
        except StopIteration:
            break
        policies = problem.widths(genes)
        top1, losses = score(policies)
        fits = problem.fits_policy(policies)
        for policy, accuracy, loss in zip(policies.tolist(), top1, losses, strict=True):
            known.setdefault(tuple(policy), (accuracy, loss))
        if fits.any():
            best = min(best, float(losses[fits].min()))
        on_scores(len(known), best)
    policies = np.asarray(list(known), np.int32)
    values = np.asarray(list(known.values()))
    return SearchResult(
        policies=policies,
        scores=Scores(values[:, 0], values[:, 1]),
        costs=problem.objective(policies),
        fits=problem.fits_policy(policies),
    )
