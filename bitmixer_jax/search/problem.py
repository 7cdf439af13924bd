"""The search problem: the widths to choose, their costs, and the budget.

Methods work on *genes*: int64 ``[G]``, the index of a choice for each group of layers that share a
width. `Problem` turns genes into policies, which hold widths, and computes their costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitmixer_jax.cost import Cost
from bitmixer_jax.errors import UserError
from bitmixer_jax.policy import BitSpace, closest

_SLACK = 1e-9  # relative: costs are sums of floats, and an average of 3 bits must fit avg_bits=3
_TINY = 1e-30  # avoids division by a limit of 0
_ATTEMPTS = 100  # of solving an integer program again, without a solution that exceeds a limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint:
    """A limit on a cost: cost(policy) <= ``upper_bound``.

    Attributes:
      cost: the cost, from `cost.costs`.
      upper_bound: in the unit of the cost.
    """

    cost: Cost
    upper_bound: float

    def __str__(self) -> str:
        return f"{self.cost.name}={self.upper_bound:g}"


def parse_budget(texts: Sequence[str], costs: Mapping[str, Cost]) -> tuple[Constraint, ...]:
    """Reads a budget from text.

    Args:
      texts: each is one limit or several with commas between, as COST=NUMBER or COST=NUMBER%. A
        percentage is of the cost of the widest policy.
      costs: the known costs by name, from `cost.costs`.

    Returns:
      the limits, at least one.

    Raises:
      UserError: a cost is unknown or limited twice, a limit is not a number from 0, or no policy
        costs as little as a limit.

    Examples:
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10, width=3, image_shape=(8, 8, 1))
      >>> [str(limit) for limit in parse_budget(["avg_bits=3", "bitops=50%"], bm.costs(model))]
      ['avg_bits=3', 'bitops=207360']
    """
    limits: dict[str, Constraint] = {}
    for text in ",".join(texts).split(","):
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UserError(f"budget {text!r}: write COST=NUMBER, such as avg_bits=3 or bytes=60%")
        if name not in costs:
            if name == "latency_ms":
                raise UserError(
                    "budget latency_ms: give a latency file with measured times", "missing-value"
                )
            raise UserError(
                f"budget: unknown cost {name!r}{closest(name, list(costs))}"
                f" (one of {', '.join(costs)})",
                "unknown-name",
            )
        if name in limits:
            raise UserError(f"budget: {name} is limited twice; give one limit per cost", "conflict")
        cost = costs[name]
        try:
            number = float(value.removesuffix("%"))
        except ValueError:
            number = float("nan")
        if not 0 <= number < float("inf"):
            raise UserError(f"budget {name}={value}: not a number (or a percentage)")
        upper_bound = number * cost.widest / 100 if value.endswith("%") else number
        limits[name] = _check_reachable(Constraint(cost=cost, upper_bound=upper_bound))
    return tuple(limits.values())


def _check_reachable(limit: Constraint) -> Constraint:
    """Returns ``limit`` if some policy keeps within it."""
    low, high = limit.cost.range
    if limit.upper_bound < low * (1 - _SLACK):
        raise UserError(
            f"budget {limit}: no policy costs so little; {limit.cost.name} lies in "
            f"[{low:g}, {high:g}] {limit.cost.unit}",
            "out-of-reach",
        )
    return limit


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """The widths to choose for each group of layers, and the budget.

    With constraints, a search minimises the loss within the budget:

      minimise loss(policy)  subject to  cost(policy) <= upper_bound  for each constraint

    Without constraints, it looks for the Pareto front of loss and ``objective``.

    Attributes:
      space: the n choices of each layer.
      groups: ``[L]`` group of each layer, from 0 to G - 1. The layers of a group share a width.
      objective: the cost of a front. Without constraints, savings are counted in it.
      constraints: the budget; () looks for a front.

    Raises:
      UserError: no policy fits all constraints together.

    Examples:
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10, width=3, image_shape=(8, 8, 1))
      >>> average = bm.costs(model)["avg_bits"]
      >>> problem = Problem(space=model.space, groups=model.groups("block"), objective=average)
      >>> problem.widths([0, 1, 2])  # three blocks of two layers
      array([2, 2, 3, 3, 4, 4], dtype=int32)
      >>> bool(problem.within(2.5).fits([0, 1, 2]))
      False
    """

    space: BitSpace
    groups: tuple[int, ...]
    objective: Cost
    constraints: tuple[Constraint, ...] = ()

    def __post_init__(self) -> None:
        if self.constraints and self.cheapest() is None:
            ranges = ", ".join(
                f"{limit} (alone: {self.range(limit.cost)[0]:g} or more)"
                for limit in self.constraints
            )
            raise UserError(f"budget: no policy fits all limits together: {ranges}", "out-of-reach")

    @property
    def size(self) -> int:
        """Number of groups of layers: G."""
        return max(self.groups) + 1

    @property
    def widest(self) -> np.ndarray:
        """Genes ``[G]`` of the widest policy."""
        return np.full(self.size, self.space.n - 1, np.int64)

    def widths(self, genes: Any) -> np.ndarray:
        """Returns the policies int32 ``[..., L]`` of genes ``[..., G]``."""
        return np.asarray(self.space.choices, np.int32)[np.asarray(genes)[..., self.groups]]

    def table(self, cost: Cost) -> np.ndarray:
        """Returns a cost by group and choice: float64 ``[G, n]``."""
        table = np.zeros((self.size, self.space.n))
        np.add.at(table, np.asarray(self.groups), cost.table)
        return table / cost.divisor

    def range(self, cost: Cost) -> tuple[float, float]:
        """Returns the least and the greatest cost of all policies with these groups."""
        table = self.table(cost)
        return float(table.min(1).sum()), float(table.max(1).sum())

    def fits(self, genes: Any) -> np.ndarray:
        """Returns whether genes ``[..., G]`` fit the budget: bool ``[...]``."""
        return self.fits_policy(self.widths(genes))

    def fits_policy(self, policies: Any) -> np.ndarray:
        """Returns whether policies ``[..., L]`` fit the budget: bool ``[...]``."""
        fits = np.ones(np.shape(policies)[:-1], bool)
        for limit in self.constraints:
            fits &= limit.cost(policies) <= limit.upper_bound * (1 + _SLACK)
        return fits

    def narrower(self, genes: np.ndarray) -> np.ndarray:
        """Returns genes ``[M, G]``: in each, one group has its next narrower width."""
        return genes - np.eye(self.size, dtype=np.int64)[genes > 0]

    def saving(self, genes: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Returns the cost that each of ``lower`` ``[M, G]`` saves: float64 ``[M]``.

          sum over exceeded limits of (cost(genes) - cost(lower)) / upper_bound

        A limit is exceeded if ``genes`` ``[G]`` exceed it. If there is none, the cost is the
        objective, in parts of that of the widest policy.
        """
        exceeded = [
            (limit.cost, limit.upper_bound)
            for limit in self.constraints
            if limit.cost(self.widths(genes)) > limit.upper_bound * (1 + _SLACK)
        ] or [(self.objective, self.objective.widest)]
        saved = np.zeros(len(lower))
        for cost, scale in exceeded:
            saved += (cost(self.widths(genes)) - cost(self.widths(lower))) / max(scale, _TINY)
        return saved

    def within(self, most: float) -> Problem:
        """Returns this problem with one more constraint: objective <= ``most``.

        Raises:
          UserError: no policy fits.
        """
        limit = _check_reachable(Constraint(cost=self.objective, upper_bound=most))
        return dataclasses.replace(self, constraints=(*self.constraints, limit))

    def solve_ilp(
        self, table: np.ndarray, near: np.ndarray | None = None, changes: int = 0
    ) -> np.ndarray | None:
        """Solves an integer program: the genes with the least sum of ``table`` within the budget.

          minimise sum over g of table[g, genes[g]]

        Args:
          table: float ``[G, n]``, such as sensitivities.
          near: ``[G]`` genes; None allows all genes.
          changes: in how many groups the solution may differ from ``near``.

        Returns:
          int64 ``[G]``; None if no genes fit the budget.

        Raises:
          UserError: ``table`` has another shape, or values that are not finite.

        Reference: Yao et al., HAWQ-V3: Dyadic Neural Network Quantization, ICML 2021. The solver is
        HiGHS, in scipy.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        shape = (self.size, self.space.n)
        if table.shape != shape or not np.isfinite(table).all():
            raise UserError(f"sensitivities: give finite numbers {shape}, got {table.shape}")
        one_hot = np.eye(self.space.n)
        rules: list[Any] = [LinearConstraint(np.kron(np.eye(self.size), np.ones(shape[1])), 1, 1)]
        for limit in self.constraints:
            # HiGHS has absolute tolerances, about 1e-6, and BitOPs are of order 1e10. So each limit
            # is scaled to 1000.
            costs = self.table(limit.cost).reshape(1, -1)
            unit = 1e-3 * (limit.upper_bound or costs.max() or 1.0)
            rules.append(
                LinearConstraint(costs / unit, -np.inf, limit.upper_bound / unit * (1 + _SLACK))
            )
        if near is not None:
            same = one_hot[near].reshape(1, -1)
            rules.append(LinearConstraint(same, self.size - changes, np.inf))
        for _ in range(_ATTEMPTS):
            solution = milp(
                (table / (np.abs(table).max() or 1.0)).ravel(),
                constraints=rules,
                integrality=np.ones(table.size),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0},
            )
            if solution.x is None:
                return None
            genes = np.asarray(solution.x).reshape(shape).argmax(1)
            if self.fits(genes):
                return genes
            # Within its tolerance, HiGHS may exceed a limit. Exclude these genes and solve again.
            rules.append(LinearConstraint(one_hot[genes].reshape(1, -1), -np.inf, self.size - 1))
        return None

    def cheapest(self) -> np.ndarray | None:
        """Returns the genes ``[G]`` of the least total cost; None if no genes fit the budget.

        The total is a sum over constraints, each in parts of its limit.
        """
        total = np.zeros((self.size, self.space.n))
        for limit in self.constraints:
            total += self.table(limit.cost) / max(limit.upper_bound, _TINY)
        genes = total.argmin(1)
        # Most costs fall with the width. These genes are then the narrowest, and the solver is not
        # needed. With several limits, or a measured latency, they may exceed one of the limits.
        return genes if self.fits(genes) else self.solve_ilp(total)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draws genes ``[G]`` that use the budget up.

        Without a budget, it first draws one, from the whole range of the objective.
        """
        if not self.constraints:
            low, high = self.range(self.objective)
            return self.within(rng.uniform(low, high)).draw(rng)
        genes = rng.integers(self.space.n, size=self.size)
        return self.fill(self.repair(genes, rng), rng)

    def repair(self, genes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Lowers the widths of randomly drawn groups until ``genes`` ``[G]`` fit the budget."""
        genes = genes.copy()
        while not self.fits(genes):
            lower = self.narrower(genes)
            lower = lower[self.saving(genes, lower) > 0]
            if not len(lower):  # a measured latency may rise when the width falls
                cheapest = self.cheapest()
                assert cheapest is not None  # checked at construction
                return cheapest
            genes = lower[rng.integers(len(lower))]
        return genes

    def fill(self, genes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Raises the widths of randomly drawn groups until none fits the budget any more."""
        genes = genes.copy()
        while True:
            higher = genes + np.eye(self.size, dtype=np.int64)[genes < self.space.n - 1]
            higher = higher[self.fits(higher)]
            if not len(higher):
                return genes
            genes = higher[rng.integers(len(higher))]
