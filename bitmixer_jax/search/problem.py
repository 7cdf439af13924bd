"""What a search looks for: a budget, or a whole front, over the widths of a network's layers.

Methods work on *genes*: int64 ``[G]`` positions in the choices, one per group of layers that share
a width. `Problem` turns them into policies and says what they cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitmixer_jax.cost import Cost
from bitmixer_jax.errors import UserError
from bitmixer_jax.policy import BitSpace, closest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint:
    """At most ``upper_bound`` of a cost, in its unit."""

    cost: Cost
    upper_bound: float

    def __str__(self) -> str:
        return f"{self.cost.name}={self.upper_bound:g}"


def parse_budget(texts: Sequence[str], costs: Mapping[str, Cost]) -> tuple[Constraint, ...]:
    """Reads what a person types for a budget: ``["avg_bits=3", "bitops=60%,bytes=40000"]``.

    A percentage is of the policy of the widest width everywhere.

    Raises:
      UserError: unknown cost, no number, a cost given twice, or a limit below all policies.
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
        most = number * cost.widest / 100 if value.endswith("%") else number
        limits[name] = _reachable(Constraint(cost=cost, upper_bound=most))
    if not limits:
        raise UserError("budget: give at least one limit, such as avg_bits=3", "missing-value")
    return tuple(limits.values())


def _reachable(limit: Constraint) -> Constraint:
    low, high = limit.cost.range
    if limit.upper_bound < low * (1 - _SLACK):
        raise UserError(
            f"budget {limit}: no policy costs so little; {limit.cost.name} lies in "
            f"[{low:g}, {high:g}] {limit.cost.unit}",
            "out-of-reach",
        )
    return limit


_TRIES = 100
_TINY = 1e-30  # a limit of 0 is divided by
_SLACK = 1e-9  # sums of floats: an average of exactly 3 bits must fit avg_bits=3


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """The widths to choose, and what is wanted of them.

    Attributes:
      space: the choices.
      groups: ``[L]`` group of each layer; the layers of a group share a width.
      objective: the cost that a front is drawn over, and that saving is counted in.
      constraints: the budget; none: the whole range of ``objective`` is wanted.
    """

    space: BitSpace
    groups: tuple[int, ...]
    objective: Cost
    constraints: tuple[Constraint, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError where no policy fits all limits."""
        if self.constraints and self.cheapest() is None:
            ranges = ", ".join(
                f"{limit} (reachable alone: from {self.range(limit.cost)[0]:g})"
                for limit in self.constraints
            )
            raise UserError(f"budget: no policy fits all limits together: {ranges}", "out-of-reach")

    @property
    def size(self) -> int:
        """G, the number of genes."""
        return max(self.groups) + 1

    @property
    def widest(self) -> np.ndarray:
        """Genes ``[G]`` of the widest policy."""
        return np.full(self.size, self.space.n - 1, np.int64)

    def widths(self, genes: Any) -> np.ndarray:
        """Policies int32 ``[..., L]`` of genes ``[..., G]``."""
        return np.asarray(self.space.choices, np.int32)[np.asarray(genes)][
            ..., np.asarray(self.groups)
        ]

    def table(self, cost: Cost) -> np.ndarray:
        """A cost by group and choice: float64 ``[G, n]``."""
        table = np.zeros((self.size, self.space.n))
        np.add.at(table, np.asarray(self.groups), cost.table)
        return table / cost.divisor

    def range(self, cost: Cost) -> tuple[float, float]:
        """The least and the most of a cost that policies of these groups can have."""
        table = self.table(cost)
        return float(table.min(1).sum()), float(table.max(1).sum())

    def fits(self, genes: Any) -> np.ndarray:
        """Whether genes ``[..., G]`` keep within all limits: bool ``[...]``."""
        return self.fits_policy(self.widths(genes))

    def fits_policy(self, policies: Any) -> np.ndarray:
        """Whether policies ``[..., L]`` keep within all limits: bool ``[...]``."""
        inside = np.ones(np.shape(policies)[:-1], bool)
        for limit in self.constraints:
            inside &= limit.cost(policies) <= limit.upper_bound * (1 + _SLACK)
        return inside

    def saving(self, genes: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """What each of ``lower`` ``[M, G]`` saves against ``genes`` ``[G]``: float64 ``[M]``.

        In parts of the limits that ``genes`` exceed, or of the widest policy's cost on the axis
        where there are none.
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
        """The problem with one limit on the axis."""
        limit = _reachable(Constraint(cost=self.objective, upper_bound=most))
        return dataclasses.replace(self, constraints=(*self.constraints, limit))

    def solve_ilp(
        self, table: np.ndarray, near: np.ndarray | None = None, changes: int = 0
    ) -> np.ndarray | None:
        """Genes ``[G]`` of the least sum of ``table`` ``[G, n]`` that fit; None where none fit.

        An integer programme, solved by HiGHS (scipy).

        Args:
          near, changes: only genes that differ from ``near`` ``[G]`` in at most so many places.

        Raises:
          UserError: the table has another shape, or is not finite.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        shape = (self.size, self.space.n)
        if table.shape != shape or not np.isfinite(table).all():
            raise UserError(f"sensitivities: give finite numbers {shape}, got {table.shape}")
        rules: list[Any] = [LinearConstraint(np.kron(np.eye(self.size), np.ones(shape[1])), 1, 1)]
        for limit in self.constraints:
            # In parts of the limit: HiGHS has absolute tolerances, and BitOPs are of order 1e10.
            row = self.table(limit.cost).reshape(1, -1)
            unit = 1e-3 * (limit.upper_bound or row.max() or 1.0)
            rules.append(
                LinearConstraint(row / unit, -np.inf, limit.upper_bound / unit * (1 + _SLACK))
            )
        if near is not None:
            same = np.zeros(shape)
            same[np.arange(self.size), near] = 1
            rules.append(LinearConstraint(same.reshape(1, -1), self.size - changes, np.inf))
        for _ in range(_TRIES):
            found = milp(
                (table / (np.abs(table).max() or 1.0)).ravel(),
                constraints=rules,
                integrality=np.ones(table.size),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0},
            )
            if found.x is None:
                return None
            genes = np.asarray(found.x).reshape(shape).argmax(1)
            if self.fits(genes):
                return genes
            # HiGHS allows a limit to be exceeded by one part in a million: not this one, then.
            this = np.zeros(shape)
            this[np.arange(self.size), genes] = 1
            rules.append(LinearConstraint(this.reshape(1, -1), -np.inf, self.size - 1))
        return None

    def cheapest(self) -> np.ndarray | None:
        """Genes ``[G]`` that use least of the limits, taken together; None where none fit."""
        use = np.zeros((self.size, self.space.n))
        for limit in self.constraints:
            use += self.table(limit.cost) / max(limit.upper_bound, _TINY)
        genes = use.argmin(1)
        # Nearly always every cost falls with the width: then this is the narrowest, and fits.
        return genes if self.fits(genes) else self.solve_ilp(use)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Random genes ``[G]`` that fit; without limits, spread over the range of the axis."""
        if not self.constraints:
            low, high = self.range(self.objective)
            return self.within(rng.uniform(low, high)).draw(rng)
        genes = rng.integers(self.space.n, size=self.size)
        return self.fill(self.repair(genes, rng), rng)

    def repair(self, genes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Lowers randomly chosen widths until the budget is met."""
        genes = genes.copy()
        while not self.fits(genes):
            lower = genes - np.eye(self.size, dtype=np.int64)[genes > 0]
            helps = lower[self.saving(genes, lower) > 0]
            if not len(helps):  # a measured latency need not fall with the width
                found = self.cheapest()
                assert found is not None  # checked at construction
                return found
            genes = helps[rng.integers(len(helps))]
        return genes

    def fill(self, genes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Raises randomly chosen widths as long as the budget is met."""
        genes = genes.copy()
        while True:
            higher = genes + np.eye(self.size, dtype=np.int64)[genes < self.space.n - 1]
            higher = higher[self.fits(higher)] if len(higher) else higher
            if not len(higher):
                return genes
            genes = higher[rng.integers(len(higher))]
