"""Evolution of policies: by loss within a budget, by non-dominated sorting (NSGA-II) without."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable

import numpy as np

from bitmixer_jax.front import pareto
from bitmixer_jax.search.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution:
    """Improves a population of policies by selection, crossover and mutation.

    Each round sorts the population, keeps the best members, and breeds children. A parent is the
    better of two members drawn at random. A child takes each gene from either parent with
    probability 1/2, and then redraws each gene with probability ``mutation / G``.

    Within a budget, members are sorted by loss, and children are repaired so that they fit.
    Without a budget, members are sorted as in NSGA-II: first by the rank of non-dominated sorting,
    then by the distance between their neighbours of the same rank. So the population spreads along
    the front. No policy is evaluated twice.

    Attributes:
      policies: how many policies to evaluate, 1 or more.
      population: how many members are kept after each round, 1 or more.
      mutation: how many genes of a child are redrawn on average, 0 or more.

    `search.search` has an example.

    Reference: Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, IEEE
    Transactions on Evolutionary Computation, 2002.
    """

    policies: int = 512
    population: int = 32
    mutation: float = 1.5

    def evaluations(self, problem: Problem) -> int:
        """Returns the most policies that the method asks for."""
        return self.policies

    def run(
        self, problem: Problem, rng: np.random.Generator
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """Runs as `search.search` describes. Draws from ``rng``."""
        uniform = [np.full(problem.size, i, np.int64) for i in range(problem.space.n)]
        first = [problem.fill(problem.repair(genes, rng), rng) for genes in uniform]
        if not problem.constraints:
            first = uniform
        seen: set[bytes] = set()
        members = np.zeros((0, problem.size), np.int64)
        losses = np.zeros(0)
        left = self.policies
        while left > 0:
            wanted = min(self.population, left)
            if not len(members):
                children = _unseen(first, wanted, seen)
                drawn = (problem.draw(rng) for _ in range(8 * wanted))
                children += _unseen(drawn, wanted - len(children), seen)
            else:
                best = _order(problem, members, losses)[: self.population]
                members, losses = members[best], losses[best]
                bred = (self._child(problem, members, rng) for _ in range(16 * wanted))
                children = _unseen(bred, wanted, seen)
            if not children:  # all policies near the members have been evaluated
                return
            left -= len(children)
            child_losses = yield np.stack(children)
            members = np.concatenate([members, children])
            losses = np.concatenate([losses, child_losses])

    def _child(self, problem: Problem, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws a child of members ``[M, G]`` that are sorted, best first."""
        # The smaller of two random indices is the better of two random members.
        mother, father = members[rng.integers(len(members), size=(2, 2)).min(1)]
        genes = np.where(rng.random(problem.size) < 0.5, mother, father)
        changes = rng.random(problem.size) < self.mutation / problem.size
        genes = np.where(changes, rng.integers(problem.space.n, size=problem.size), genes)
        if problem.constraints:
            genes = problem.repair(genes, rng)
            # Wider layers mostly lower the loss, so half of the children use the budget up. The
            # other half does not, because the best policy may leave some of it.
            if rng.random() < 0.5:
                genes = problem.fill(genes, rng)
        return genes


def _unseen(candidates: Iterable[np.ndarray], wanted: int, seen: set[bytes]) -> list[np.ndarray]:
    """Returns the first ``wanted`` candidates that are not in ``seen``, and adds them to it."""
    unseen: list[np.ndarray] = []
    for genes in candidates:
        if len(unseen) >= wanted:
            break
        key = genes.tobytes()
        if key not in seen:
            seen.add(key)
            unseen.append(genes)
    return unseen


def _order(problem: Problem, members: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Returns the indices of the members, best first."""
    if problem.constraints:
        return np.argsort(losses, kind="stable")
    costs = problem.objective(problem.widths(members))
    left, order = np.arange(len(members)), []
    while len(left):
        rank = left[pareto(costs[left], losses[left])]  # in ascending order of cost
        order.append(rank[np.argsort(-_crowding(costs[rank], losses[rank]), kind="stable")])
        left = np.setdiff1d(left, rank)
    return np.concatenate(order)


def _crowding(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Returns the crowding distance of NSGA-II: ``[M]``.

    For each point of one rank, sorted by cost, it is the distance between its two neighbours:
    infinite at both ends, and else a sum over cost and loss, each in parts of its range.
    """
    distance = np.full(len(costs), np.inf)
    if len(costs) > 2:
        distance[1:-1] = sum(
            np.abs(values[2:] - values[:-2]) / (np.ptp(values) or 1.0) for values in (costs, losses)
        )
    return distance
