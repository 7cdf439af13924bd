"""Follows a budget: before each batch, the best policy of a front that the budget allows."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import math
import numbers
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.front import Front, Point
from bitmixer_jax.runtime import Runtime

MOST_SWITCHES = 10_000
_log = logging.getLogger(__name__)

Budget = float | Callable[[], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switch:
    """One change of policy.

    Attributes:
      call: which choice made it, from 0.
      seconds: since the controller was made.
      budget: that was read, in the unit of the front's cost.
      old: point in force before; None at the first choice.
      new: point in force from then on.
      fits: whether ``new`` is within the budget; if not, it is the cheapest.
    """

    call: int
    seconds: float
    budget: float
    old: Point | None
    new: Point
    fits: bool


class Controller:
    """Runs a network at the best policy that a budget allows, read anew before each batch.

    A point in force that costs more than the budget gives way at once, to the best that fits. The
    controller moves up only to a point that would still fit were the budget smaller by the fraction
    ``hysteresis``: so a budget that trembles by less than that does not make it flap. Below every
    point it runs the cheapest and warns once, until the cheapest fits by the same margin again.

    Any number of threads may call it. Switches go to the logger ``bitmixer_jax.controller``.

    Attributes:
      switches: the last 10,000 changes of policy.
    """

    def __init__(self, runtime: Runtime, front: Front, budget: Budget, *, hysteresis: float = 0.05):
        """Checks that front and network belong together, and every policy of the front.

        Args:
          budget: a number, or a function that returns one, in the unit of the front's cost;
            infinity is no limit.
          hysteresis: fraction of the budget, at least 0 and less than 1.

        Raises:
          UserError: a front of another network, a policy that cannot run, or a bad number.
        """
        for what, its, own in (
            ("layers", tuple(front.names), tuple(runtime.names)),
            ("widths", tuple(front.choices), runtime.space.choices),
            ("weights", front.weights_digest, runtime.weights_digest),
        ):
            if its != own:
                raise UserError(
                    f"a front of another network: its {what} differ; search again", "other-network"
                )
        costs = [point.cost for point in front.points]
        if not costs or any(b <= a for a, b in itertools.pairwise(costs)):
            raise UserError("a front of no points, or not by ascending cost; search again")
        for point in front.points:
            runtime.check(point.widths)
        margin = _number(hysteresis)
        if margin is None or not 0 <= margin < 1:
            raise UserError(f"hysteresis: got {hysteresis!r}; give a fraction, 0 <= h < 1")
        self.front = front
        self.switches: collections.deque[Switch] = collections.deque(maxlen=MOST_SWITCHES)
        self._runtime = runtime
        self._read: Callable[[], Any]
        if callable(budget):
            self._read = budget
        else:
            number = self._checked(budget)
            self._read = lambda: number
        self._keep = 1 - margin
        self._point: Point | None = None
        self._below = False
        self._calls = 0
        self._start = time.monotonic()
        self._lock = threading.Lock()

    @property
    def point(self) -> Point | None:
        """The point in force; None before the first choice."""
        return self._point

    def predict(self, images: Any) -> np.ndarray:
        """Logits float32 ``[N, num_classes]`` of ``images`` uint8 ``[N, H, W, C]``.

        All N images run at the policy that the budget allows as the call begins.

        Raises:
          UserError: as `choose` and `Runtime.predict`.
        """
        return self._runtime.predict(images, policy=self.choose().widths)

    def choose(self) -> Point:
        """Reads the budget and returns the point to run at, which is in force from then on.

        Raises:
          UserError: the budget is not a number; the point in force stays.
        """
        with self._lock:  # held while the budget is read: of two readings, the later counts
            budget = self._checked(self._read())
            call, old = self._calls, self._point
            self._calls += 1
            new, fits = self._next(budget)
            self._warn(budget)
            self._point = new
            if new is not old:
                seconds = time.monotonic() - self._start
                self.switches.append(
                    Switch(call=call, seconds=seconds, budget=budget, old=old, new=new, fits=fits)
                )
                _log.info(
                    "call %d: budget %g %s, from cost %s to %g, widths %s",
                    call,
                    budget,
                    self.front.unit,
                    "nothing" if old is None else f"{old.cost:g}",
                    new.cost,
                    ",".join(map(str, new.widths)),
                )
            return new

    def _next(self, budget: float) -> tuple[Point, bool]:
        """The point to run at, and whether it fits."""
        old, best = self._point, self.front.best(budget)
        if best is None:
            return self.front.points[0], False
        if old is None or old.cost > budget:
            return best, True
        higher = self.front.best(self._smaller(budget))
        return (higher if higher is not None and higher.cost > old.cost else old), True

    def _smaller(self, budget: float) -> float:
        """The budget less the margin."""
        return budget * self._keep if budget > 0 else budget / self._keep

    def _warn(self, budget: float) -> None:
        """Says once per spell that the budget is below every point."""
        cheapest = self.front.points[0].cost
        if self._below:
            self._below = cheapest > self._smaller(budget)
        elif cheapest > budget:
            self._below = True
            _log.warning(
                "budget %g %s is below every point of the front: running the cheapest, at %g",
                budget,
                self.front.unit,
                cheapest,
            )

    def _checked(self, budget: Any) -> float:
        number = _number(budget)
        if number is None:
            raise UserError(
                f"budget: got {budget!r}; give a number in {self.front.unit} (infinity: no limit), "
                "or a function that returns one"
            )
        return number


def _number(value: Any) -> float | None:
    """A real number, infinity included, as a float; None of anything else, NaN or a bool."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number too large for a float
        return None
    return None if math.isnan(number) else number
