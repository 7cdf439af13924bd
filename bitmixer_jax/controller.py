"""Runs each batch at the best policy of a front that a budget allows."""

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

MOST_SWITCHES = 10_000  # that a controller remembers
_log = logging.getLogger(__name__)

# A number in the unit of the front's cost, or a function that returns one.
Budget = float | Callable[[], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switch:
    """One change of policy by a `Controller`.

    Attributes:
      call: number of the call of `Controller.choose` that made it, from 0.
      seconds: time since the controller was made.
      budget: the budget in that call, in the unit of the front's cost.
      old: the point before; None in the first call.
      new: the point from then on.
      fits: whether ``new`` costs at most the budget. If not, it is the cheapest point.
    """

    call: int
    seconds: float
    budget: float
    old: Point | None
    new: Point
    fits: bool


class Controller:
    """Runs a network at the best policy that a budget allows, and reads the budget for each batch.

    The policies are the points of a Pareto front. If the current point costs more than the budget,
    the controller moves down at once, to the best point that fits. It moves up only to a point with
    ``cost <= (1 - hysteresis) * budget``. So a budget that varies by less than that fraction does
    not make it switch back and forth. If every point costs more than the budget, it runs the
    cheapest, and the log has one warning until the cheapest point fits again by the same margin.

    Any number of threads may call it. The logger ``bitmixer_jax.controller`` gets each switch.

    Attributes:
      front: the points.
      switches: the last 10,000 changes of policy.

    Examples:
      >>> import bitmixer_jax as bm
      >>> runtime = bm.Runtime.load("runs/digits")  # doctest: +SKIP
      >>> front = bm.load_front("front.json", runtime.names, runtime.space)  # doctest: +SKIP
      >>> controller = bm.Controller(runtime, front, budget=lambda: 2e6)  # doctest: +SKIP
      >>> logits = controller.predict(images)  # doctest: +SKIP
      >>> controller.point.widths  # doctest: +SKIP
      (4, 3, 2, 2, 3, 4)
    """

    def __init__(self, runtime: Runtime, front: Front, budget: Budget, *, hysteresis: float = 0.05):
        """Checks that the front is of this network, and that each of its policies can run.

        Args:
          runtime: the network.
          front: the policies to choose from, of this network with these weights.
          budget: a number in the unit of the front's cost, or a function that returns one. Infinity
            means no limit.
          hysteresis: fraction of the budget, 0 <= h < 1.

        Raises:
          UserError: the front is of another network, one of its policies cannot run, or a number is
            not allowed.
        """
        for what, of_front, of_network in (
            ("layers", tuple(front.names), tuple(runtime.names)),
            ("widths", tuple(front.choices), runtime.space.choices),
            ("weights", front.weights_digest, runtime.weights_digest),
        ):
            if of_front != of_network:
                raise UserError(
                    f"a front of another network: its {what} differ; search again", "other-network"
                )
        costs = [point.cost for point in front.points]
        if not costs or any(b <= a for a, b in itertools.pairwise(costs)):
            raise UserError("the front has no points, or not by ascending cost; search again")
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
            number = self._check_budget(budget)
            self._read = lambda: number
        self._kept = 1 - margin  # share of the budget that a point to move up to may cost
        self._point: Point | None = None
        self._below_all = False  # whether the warning for a budget below every point was given
        self._calls = 0
        self._start = time.monotonic()
        self._lock = threading.Lock()

    @property
    def point(self) -> Point | None:
        """The current point of the front; None before the first call of `choose`."""
        return self._point

    def predict(self, images: Any) -> np.ndarray:
        """Returns the logits of images at the best policy that the budget allows now.

        Args:
          images: uint8 ``[N, H, W, C]``. All run at one policy.

        Returns:
          float32 ``[N, K]``.

        Raises:
          UserError: as `choose` and `Runtime.predict`.
        """
        return self._runtime.predict(images, policy=self.choose().widths)

    def choose(self) -> Point:
        """Reads the budget, and returns the point to run at. It becomes the current point.

        Raises:
          UserError: the budget is not a number. The current point stays.
        """
        # The lock is held while the budget is read. Otherwise a thread that read an old budget
        # could choose after a thread that read a new one.
        with self._lock:
            budget = self._check_budget(self._read())
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
        """Returns the point to run at, and whether it costs at most the budget."""
        old, best = self._point, self.front.best(budget)
        if best is None:
            return self.front.points[0], False
        if old is None or old.cost > budget:
            return best, True
        # Hysteresis: move up only if the point would also fit a budget reduced by the margin.
        higher = self.front.best(self._reduce(budget))
        return (higher if higher is not None and higher.cost > old.cost else old), True

    def _reduce(self, budget: float) -> float:
        """Returns the budget less the margin; of a negative budget, a more negative one."""
        return budget * self._kept if budget > 0 else budget / self._kept

    def _warn(self, budget: float) -> None:
        """Warns that the budget is below every point, once until the cheapest point fits again."""
        cheapest = self.front.points[0].cost
        if self._below_all:
            self._below_all = cheapest > self._reduce(budget)
        elif cheapest > budget:
            self._below_all = True
            _log.warning(
                "budget %g %s is below every point of the front: running the cheapest, at %g",
                budget,
                self.front.unit,
                cheapest,
            )

    def _check_budget(self, budget: Any) -> float:
        number = _number(budget)
        if number is None:
            raise UserError(
                f"budget: got {budget!r}; give a number in {self.front.unit} (infinity: no limit), "
                "or a function that returns one"
            )
        return number


def _number(value: Any) -> float | None:
    """Returns a real number or infinity as a float; None for NaN, bools and everything else."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number too large for a float
        return None
    return None if math.isnan(number) else number
