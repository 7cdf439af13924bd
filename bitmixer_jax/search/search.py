"""The loop of a search: a method proposes policies, and receives their losses.

A method is a generator. It yields genes ``[M, G]``, and is sent the losses ``[M]`` of their
policies. The result is chosen among all policies that were evaluated, whichever method proposed
them.
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
    """A search method. The object holds settings; the generator holds the state of the search."""

    def evaluations(self, problem: Problem) -> int:
        """Returns the most policies that the method asks for."""

    def run(
        self, problem: Problem, rng: np.random.Generator
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """Yields genes int64 ``[M, G]``, M > 0, and is sent their losses float64 ``[M]``."""


METHODS: dict[str, Callable[..., Method]] = {
    "greedy": Greedy,
    "ilp": IntegerProgram,
    "evolution": Evolution,
    "random": Random,
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """The policies that a search evaluated, each once, in the order of their evaluation.

    Attributes:
      policies: int32 ``[M, L]`` widths in bits.
      scores: loss and accuracy of each policy on the images of the search.
      costs: float64 ``[M]``, the objective of the problem.
      fits: bool ``[M]``, whether the policy fits the budget.

    `search` has an example.
    """

    policies: np.ndarray
    scores: Scores
    costs: np.ndarray
    fits: np.ndarray

    def point(self, i: int) -> Point:
        """Returns policy ``i`` with its cost and its scores."""
        return Point(
            widths=tuple(self.policies[i].tolist()),
            cost=float(self.costs[i]),
            loss=float(self.scores.loss[i]),
            top1=float(self.scores.top1[i]),
        )

    def best(self) -> Point:
        """Returns the policy of least loss within the budget.

        The loss ranks policies, because many policies have the same accuracy on a few thousand
        images.

        Raises:
          UserError: no policy that was evaluated fits the budget.
        """
        if not self.fits.any():
            raise UserError(
                "search: none of the policies that were evaluated fits the budget; "
                "try method ilp, or more evaluations",
                "out-of-reach",
            )
        return self.point(int(np.argmin(np.where(self.fits, self.scores.loss, np.inf))))

    def front(self) -> tuple[Point, ...]:
        """Returns the Pareto front of cost and loss, in ascending order of cost."""
        return tuple(self.point(int(i)) for i in pareto(self.costs, self.scores.loss))


def search(
    problem: Problem,
    method: Method,
    score: Callable[[np.ndarray], Scores],
    *,
    seed: int = 0,
    on_scores: Callable[[int, float], Any] = lambda number, least: None,
) -> SearchResult:
    """Runs a search method to its end.

    Args:
      problem: the widths to choose, and the budget.
      method: such as `Greedy`, `IntegerProgram`, `Evolution` or `Random`.
      score: returns the scores of policies int32 ``[M, L]``, such as an `EvaluationCache`.
      seed: of the method's random draws.
      on_scores: called after each step of the method, with the number of policies evaluated so far
        and the least loss within the budget (infinity if no policy fits yet).

    Returns:
      all policies that were evaluated, with their scores and costs.

    Raises:
      UserError: the sensitivities of an `IntegerProgram` do not fit the problem, or as ``score``.

    Examples:
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10, width=3, image_shape=(8, 8, 1))
      >>> average = bm.costs(model)["avg_bits"]
      >>> problem = Problem(space=model.space, groups=model.groups(), objective=average).within(3)
      >>> def score(policies):  # in place of a network: later layers matter more
      ...     loss = ((4 - policies) * [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).sum(axis=-1)
      ...     return Scores(top1=1 / (1 + loss), loss=loss)
      >>> for method in (Greedy(), IntegerProgram(), Evolution(policies=128), Random(policies=8)):
      ...     result = search(problem, method, score)
      ...     print(type(method).__name__, result.best().widths, result.best().loss)
      Greedy (2, 2, 2, 4, 4, 4) 12.0
      IntegerProgram (2, 2, 2, 4, 4, 4) 12.0
      Evolution (2, 2, 2, 4, 4, 4) 12.0
      Random (4, 2, 3, 2, 3, 4) 20.0
    """
    run = method.run(problem, np.random.default_rng(seed))
    evaluated: dict[tuple[int, ...], tuple[float, float]] = {}
    least, losses = np.inf, None
    while True:
        try:
            genes = next(run) if losses is None else run.send(losses)
        except StopIteration:
            break
        policies = problem.widths(genes)
        top1, losses = score(policies)
        fits = problem.fits_policy(policies)
        for policy, accuracy, loss in zip(policies.tolist(), top1, losses, strict=True):
            evaluated.setdefault(tuple(policy), (accuracy, loss))
        if fits.any():
            least = min(least, float(losses[fits].min()))
        on_scores(len(evaluated), least)
    policies = np.asarray(list(evaluated), np.int32)
    values = np.asarray(list(evaluated.values()))
    return SearchResult(
        policies=policies,
        scores=Scores(values[:, 0], values[:, 1]),
        costs=problem.objective(policies),
        fits=problem.fits_policy(policies),
    )
