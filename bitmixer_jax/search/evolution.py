"""Evolution of policies: under a budget by loss, without one by non-dominated sorting (NSGA-II)."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable

import numpy as np

from bitmixer_jax.front import pareto
from bitmixer_jax.search.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution:
    """Keeps a population; the better of two random members breed by crossover and mutation.

    Under a budget the better is the one of smaller loss, and children are repaired to fit. Without
    one, ranks of non-dominated sorting decide, then the distance to neighbours on the same rank
    (NSGA-II: Deb et al., IEEE TEC 2002), so that the population spreads along the front.

    Attributes:
      policies: how many to evaluate.
      population: members kept.
      mutation: genes that a child changes, on average.
    """

    policies: int = 512
    population: int = 32
    mutation: float = 1.5

    def evaluations(self, problem: Problem) -> int:
        """Policies that it will ask for, at most."""
        return self.policies

    def run(
        self, problem: Problem, rng: np.random.Generator
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """See `search.search`; draws from ``rng``."""
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
                fresh = _new(first, wanted, seen)
                fresh += _new(
                    (problem.draw(rng) for _ in range(8 * wanted)), wanted - len(fresh), seen
                )
            else:
                order = _order(problem, members, losses)
                members, losses = members[order], losses[order]
                members, losses = members[: self.population], losses[: self.population]
                children = (self._child(problem, members, rng) for _ in range(16 * wanted))
                fresh = _new(children, wanted, seen)
            if not fresh:  # everything near has been seen
                return
            left -= len(fresh)
            found = yield np.stack(fresh)
            members = np.concatenate([members, fresh])
            losses = np.concatenate([losses, found])

    def _child(self, problem: Problem, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Members are in order, best first: of two drawn, the smaller index wins.
        mother, father = members[rng.integers(len(members), size=(2, 2)).min(1)]
        genes = np.where(rng.random(problem.size) < 0.5, mother, father)
        changes = rng.random(problem.size) < self.mutation / problem.size
        genes = np.where(changes, rng.integers(problem.space.n, size=problem.size), genes)
        if problem.constraints:
            genes = problem.repair(genes, rng)
            if rng.random() < 0.5:  # what the budget leaves is mostly worth taking
                genes = problem.fill(genes, rng)
        return genes


def _new(candidates: Iterable[np.ndarray], wanted: int, seen: set[bytes]) -> list[np.ndarray]:
    """The first ``wanted`` candidates not seen before; notes them as seen."""
    found: list[np.ndarray] = []
    for genes in candidates:
        if len(found) >= wanted:
            break
        key = genes.tobytes()
        if key not in seen:
            seen.add(key)
            found.append(genes)
    return found


def _order(problem: Problem, members: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices of the members, best first."""
    if problem.constraints:
        return np.argsort(losses, kind="stable")
    costs = problem.objective(problem.widths(members))
    left, order = np.arange(len(members)), []
    while len(left):
        rank = left[pareto(costs[left], losses[left])]  # by ascending cost
        order.append(rank[np.argsort(-_crowding(costs[rank], losses[rank]), kind="stable")])
        left = np.setdiff1d(left, rank)
    return np.concatenate(order)


def _crowding(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Distance between the neighbours of each point of a rank, sorted by cost; ends: infinite."""
    distance = np.full(len(costs), np.inf)
    if len(costs) > 2:
        distance[1:-1] = sum(
            np.abs(values[2:] - values[:-2]) / (np.ptp(values) or 1.0) for values in (costs, losses)
        )
    return distance
