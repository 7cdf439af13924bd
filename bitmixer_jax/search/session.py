"""Searches on a trained network: `search_policy` within a budget, and `search_front`.

Policies are scored on training data: by default on images that training left out of its split, and
if it left out none, on images that it used. The test data are read once, when the search has ended,
so that no choice depends on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax.cost import Cost, activation_peak, costs
from bitmixer_jax.data import Dataset, normalize
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Evaluator, make_evaluator, random_policies
from bitmixer_jax.files import hold
from bitmixer_jax.front import Front, Point
from bitmixer_jax.policy import closest, save_policy
from bitmixer_jax.search import hessian
from bitmixer_jax.search.cache import EvaluationCache, file_name, writable
from bitmixer_jax.search.images import search_split
from bitmixer_jax.search.problem import Constraint, Problem, parse_budget
from bitmixer_jax.search.search import METHODS, Method, SearchResult, search
from bitmixer_jax.search.settings import SearchSettings
from bitmixer_jax.trained import Trained, load

# Called with the number of policies evaluated, the most that there will be, and the least loss
# within the budget so far.
OnScores = Callable[[int, int, float], Any]
_HESSIAN_IMAGES = 512  # second derivatives keep the activations of all images in memory


class SearchSession:
    """A trained network, the images that score its policies, and a cache of the scores.

    The scores are stored in ``WORKDIR/search``. A search that was stopped reads them when it is run
    again.

    Attributes:
      trained: the network, from `trained.load`.
      settings: of the search.
      costs: the costs of the network's policies, by name.
      split: the split that the images are drawn from.
      data: the images that score policies.
      cache: returns the scores of policies, and stores them.
      seconds: time of the last search; stored scores count with the time of their measurement.

    Examples:
      >>> import bitmixer_jax as bm
      >>> trained = bm.load("runs/digits")  # doctest: +SKIP
      >>> session = SearchSession(trained, SearchSettings(method="ilp"))  # doctest: +SKIP
      >>> problem = session.problem(session.costs["bitops"]).within(6e6)  # doctest: +SKIP
      >>> session.search(problem).best().widths  # doctest: +SKIP
    """

    def __init__(self, trained: Trained, settings: SearchSettings):
        """Opens the images and the stored scores.

        Args:
          trained: a network whose layers have widths.
          settings: of the search.

        Raises:
          UserError: the network is a full-precision baseline; the split has images of the test
            data, or does not exist; or the latency file or the stored scores cannot be used.
        """
        trained.require_widths("search")
        self.trained, self.settings = trained, settings
        self.seconds = 0.0
        self.costs = costs(trained.model, settings.latency)
        self.split = search_split(trained, settings)
        data = trained.load_split(self.split, settings.data_dir)
        rows = np.random.default_rng(settings.seed).permutation(len(data))[: settings.images]
        self.data: Dataset = data.subset(rows)
        evaluator = Evaluator(
            trained.model,
            self.data,
            self.data.mean,
            self.data.std,
            batch_size=trained.run.evaluate_batch,
        )
        about = {
            "network": trained.weights_digest,
            "dataset": trained.run.dataset,
            "split": self.split,
            "images": len(self.data),
            "seed": settings.seed,
        }
        self._file = writable(trained.folder / "search" / file_name(about))
        self.cache = EvaluationCache(
            lambda policies: evaluator.scores(trained.variables, policies), self._file, about
        )

    @property
    def seen_in_training(self) -> bool:
        """True if training used the images; False if the settings name their split."""
        return not self.settings.split and self.split == self.trained.run.train_split

    def problem(self, objective: Cost, constraints: tuple[Constraint, ...] = ()) -> Problem:
        """Returns the search problem of this network.

        Args:
          objective: a cost, from ``costs``.
          constraints: the budget; () looks for a front.
        """
        return Problem(
            space=self.trained.model.space,
            groups=self.trained.groups,
            objective=objective,
            constraints=constraints,
        )

    def method(self, problem: Problem) -> Method:
        """Returns the method that the settings name, with its settings."""
        settings = self.settings
        if settings.method in ("evolution", "random"):
            return METHODS[settings.method](policies=settings.evaluations)
        if settings.sensitivity == "hessian":
            few = slice(0, min(_HESSIAN_IMAGES, len(self.data)))
            table = hessian.sensitivity(
                problem,
                self.trained.model,
                self.trained.variables,
                normalize(jnp.asarray(self.data.images[few]), self.data.mean, self.data.std),
                jnp.asarray(self.data.labels[few]),
                jax.random.key(settings.seed),
            )
            return METHODS[settings.method](sensitivity=table)
        return METHODS[settings.method]()

    def search(self, problem: Problem, on_scores: OnScores = lambda *_: None) -> SearchResult:
        """Searches with the method that the settings name.

        Args:
          problem: from `problem`.
          on_scores: called after each step with the number of policies evaluated, the most that
            there will be, and the least loss within the budget.

        Returns:
          all policies that were evaluated.

        Raises:
          UserError: another process uses the same file of scores, or the file cannot be written.
        """
        with self._locked():
            start, before, spent = time.perf_counter(), self.cache.seconds, self.cache.spent
            method = self.method(problem)
            total = method.evaluations(problem)
            result = search(
                problem,
                method,
                self.cache,
                seed=self.settings.seed,
                on_scores=lambda number, least: on_scores(number, total, least),
            )
            # A resumed search reports the time of the whole search: that of the method, and that of
            # all measurements, which the file of scores holds.
            method_seconds = time.perf_counter() - start - (self.cache.spent - spent)
            self.seconds = method_seconds + self.cache.seconds - before
            return result

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from using the file of scores."""
        if self._file is None:
            return contextlib.nullcontext()
        lock = self._file.with_name(f".{self._file.name}.lock")
        return hold(lock, f"search scores {self._file}")

    def about(self, result: SearchResult) -> dict[str, Any]:
        """Returns how a result was found, as JSON values for a policy file or a front file."""
        return {
            "method": self.settings.method,
            "seed": self.settings.seed,
            "split": self.split,
            "images": len(self.data),
            "evaluations": len(result.policies),
            "seconds": round(self.seconds, 3),
        }

    def top1_on_test(self, policies: Any) -> tuple[np.ndarray, int]:
        """Measures the accuracy of policies on the test data.

        Args:
          policies: ``[M, L]`` widths in bits.

        Returns:
          accuracies float64 ``[M]``, from 0 to 1, and the number of test images.
        """
        evaluator = make_evaluator(self.trained, self.settings.data_dir)
        top1 = evaluator.top1(self.trained.variables, np.asarray(policies, np.int32))
        return top1, evaluator.examples


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FoundPolicy:
    """The best policy within a budget, and what it was compared with.

    Attributes:
      point: widths, cost (of the first constraint), loss and accuracies of the policy.
      constraints: the budget.
      uniform: test accuracy of each uniform policy, from 0 to 1, by width in bits.
      examples: number of test images.
      result: all policies that were evaluated.
      session: the session of the search.

    `search_policy` has an example.
    """

    point: Point
    constraints: tuple[Constraint, ...]
    uniform: dict[int, float]
    examples: int
    result: SearchResult
    session: SearchSession

    def save(self, path: str | pathlib.Path, *, overwrite: bool = False) -> None:
        """Writes a policy file that also stores the costs, the budget, the search and the test.

        Args:
          path: the file.
          overwrite: whether to replace a file that has other content.

        Raises:
          UserError: as `policy.save_policy`.
        """
        session, widths = self.session, np.asarray(self.point.widths)
        model = session.trained.model
        cost = {name: float(cost(widths)) for name, cost in session.costs.items()}
        save_policy(
            path,
            widths,
            model.names,
            model.space,
            overwrite=overwrite,
            weights_digest=session.trained.weights_digest,
            budget={limit.cost.name: limit.upper_bound for limit in self.constraints},
            cost={**cost, "activation_peak": float(activation_peak(model, widths))},
            search={
                **session.about(self.result),
                "loss": self.point.loss,
                "top1": self.point.top1,
            },
            test={"examples": self.examples, "top1": self.point.test_top1},
        )


def search_policy(
    source: Trained | str | pathlib.Path,
    budget: str | Sequence[str],
    *,
    on_scores: OnScores = lambda *_: None,
    **settings: Any,
) -> FoundPolicy:
    """Finds the best policy of a trained network within a budget.

      minimise loss(policy)  subject to  cost(policy) <= limit  for each limit of the budget

    The loss is the mean cross-entropy on training images. The policy of least loss and the uniform
    policies are then tested once on the test data.

    Args:
      source: WORKDIR, WORKDIR@STAGE, or a network from `trained.load`.
      budget: text, or several texts, as `parse_budget` reads them: "avg_bits=3", or
        ["bitops=60%", "bytes=40000"].
      on_scores: called after each step of the search with the number of policies evaluated, the
        most that there will be, and the least loss within the budget.
      settings: the attributes of `SearchSettings`, such as ``method`` and ``images``.

    Returns:
      the policy of least loss that was evaluated.

    Raises:
      UserError: a setting or the budget is not allowed, no policy fits the budget, or as
        `trained.load` and `SearchSession`.

    Examples:
      >>> import bitmixer_jax as bm
      >>> found = bm.search_policy("runs/digits", "bitops=60%", method="ilp")  # doctest: +SKIP
      >>> found.point.widths, found.point.test_top1  # doctest: +SKIP
      >>> found.save("policy.json")  # doctest: +SKIP

    Reference: Bulat and Tzimiropoulos, Bit-Mixer, ICCV 2021 (greedy); Yao et al., HAWQ-V3, ICML
    2021 (ilp).
    """
    checked = SearchSettings(**settings)  # a mistake is found before the network is loaded
    session = SearchSession(load(source), checked)
    model, space = session.trained.model, session.trained.model.space
    texts = [budget] if isinstance(budget, str) else budget
    constraints = parse_budget(texts, session.costs)
    result = session.search(session.problem(constraints[0].cost, constraints), on_scores)
    best = result.best()
    uniform = [space.uniform(width, model.num_layers) for width in space.choices]
    top1, examples = session.top1_on_test(np.stack([np.asarray(best.widths), *uniform]))
    return FoundPolicy(
        point=dataclasses.replace(best, test_top1=float(top1[0])),
        constraints=constraints,
        uniform=dict(zip(space.choices, top1[1:].tolist(), strict=True)),
        examples=examples,
        result=result,
        session=session,
    )


def search_front(
    source: Trained | str | pathlib.Path,
    cost: str = "bitops",
    *,
    random: int = 100,
    on_scores: OnScores = lambda *_: None,
    **settings: Any,
) -> tuple[Front, SearchSession]:
    """Finds the Pareto front of loss and a cost, over the whole range of the cost.

    The policies of the front, the uniform policies and random policies are then tested once on the
    test data.

    Args:
      source: WORKDIR, WORKDIR@STAGE, or a network from `trained.load`.
      cost: a key of `cost.costs`.
      random: how many random policies to test for comparison, 0 or more.
      on_scores: as in `search_policy`.
      settings: the attributes of `SearchSettings`, such as ``method`` and ``images``.

    Returns:
      the front and the session of the search. The notes of the front hold the test accuracies of
      the uniform policies and of the random policies.

    Raises:
      UserError: a setting or the cost is not allowed, or as `trained.load` and `SearchSession`.

    Examples:
      >>> import bitmixer_jax as bm
      >>> front, session = bm.search_front("runs/digits", "bitops")  # doctest: +SKIP
      >>> front.best(6e6).widths  # doctest: +SKIP
      >>> front.save("front.json")  # doctest: +SKIP

    Reference: Deb et al., NSGA-II, IEEE Transactions on Evolutionary Computation, 2002 (evolution).
    """
    checked = SearchSettings(**settings)  # a mistake is found before the network is loaded
    session = SearchSession(load(source), checked)
    model, space = session.trained.model, session.trained.model.space
    if cost not in session.costs:
        known = list(session.costs)
        hint = " (give a latency file)" if cost == "latency_ms" else closest(cost, known)
        raise UserError(f"cost {cost!r}: unknown{hint}; one of {', '.join(known)}", "unknown-name")
    objective = session.costs[cost]
    result = session.search(session.problem(objective), on_scores)
    points = result.front()
    drawn = random_policies(model, random, checked.seed, session.trained.groups)
    uniform = np.stack([space.uniform(width, model.num_layers) for width in space.choices])
    top1, examples = session.top1_on_test(
        np.concatenate([[point.widths for point in points], uniform, drawn])
    )

    def tested(policies: np.ndarray, accuracies: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"widths": policy.tolist(), "cost": float(objective(policy)), "test_top1": float(t)}
            for policy, t in zip(policies, accuracies, strict=True)
        ]

    of_points, of_uniform, of_drawn = np.split(top1, [len(points), len(points) + len(uniform)])
    front = Front(
        points=tuple(
            dataclasses.replace(point, test_top1=float(t))
            for point, t in zip(points, of_points, strict=True)
        ),
        names=model.names,
        choices=space.choices,
        cost=objective.name,
        unit=objective.unit,
        weights_digest=session.trained.weights_digest,
        notes={
            "search": session.about(result),
            "test": {"examples": examples},
            "uniform": tested(uniform, of_uniform),
            "random": tested(drawn, of_drawn),
        },
    )
    return front, session
