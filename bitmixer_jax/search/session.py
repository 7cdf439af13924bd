"""Searches on a trained network: the images that score policies, `search_policy`, `search_front`.

Searches see training data alone: by default what training left out of its split, else the images
that it trained on. Test data are read once, when the search has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax.cost import Cost, activation_peak, costs
from bitmixer_jax.data import Dataset, normalize
from bitmixer_jax.data.splits import (
    ALL,
    EmptySplit,
    complement,
    left_out,
    overlap,
    parse_split,
    split_names,
)
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Evaluator, make_evaluator, random_policies
from bitmixer_jax.files import hold
from bitmixer_jax.front import Front, Point
from bitmixer_jax.policy import closest, save_policy
from bitmixer_jax.search import hessian
from bitmixer_jax.search.cache import EvaluationCache, file_name
from bitmixer_jax.search.problem import Constraint, Problem, parse_budget
from bitmixer_jax.search.search import METHODS, Method, SearchResult, search
from bitmixer_jax.trained import Trained, load

SENSITIVITIES = ("measured", "hessian")
# Called with the number of policies evaluated, how many there will be, and the least loss so far.
OnScores = Callable[[int, int, float], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How to search.

    Attributes:
      method: "greedy", "ilp", "evolution" or "random".
      seed: of the choice of images and of the method's draws.
      evaluations: policies that evolution and random may evaluate; the others need what they need.
      sensitivity: for ilp: "measured", or "hessian" (second derivatives).
      images: how many images score a policy.
      split: of which split, such as "train[45000:]"; empty: what training left out of its split,
        else that split.
      data_dir: where the data are, if not where training found them.
      latency: file of measured times, for the cost latency_ms.

    Raises:
      UserError: a value is not allowed.
    """

    method: str = "greedy"
    seed: int = 0
    evaluations: int = 512
    sensitivity: str = "measured"
    images: int = 2000
    split: str = ""
    data_dir: str | None = None
    latency: str | pathlib.Path | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("method", self.method, tuple(METHODS)),
            ("sensitivity", self.sensitivity, SENSITIVITIES),
        ):
            if value not in allowed:
                raise UserError(
                    f"{name} {value!r}{closest(value, allowed)}: one of {allowed}", "unknown-name"
                )
        if self.sensitivity != "measured" and self.method != "ilp":
            raise UserError(f"sensitivity {self.sensitivity}: of method ilp alone", "conflict")
        for name, number in (("evaluations", self.evaluations), ("images", self.images)):
            if number < 1:
                raise UserError(f"{name} {number}: give 1 or more")


class SearchSession:
    """A trained network with the images that score its policies, and the scores so far.

    Scores are kept in ``WORKDIR/search``, so a search that was stopped goes on where it was.

    Attributes:
      trained, settings: as given.
      costs: of the network's policies, by name.
      split: the images that score policies are of it.
      data: these images.
      cache: gives the scores of policies, and remembers them.
      seconds: that the last search took; scores known before count as when they were measured.
    """

    def __init__(self, trained: Trained, settings: SearchSettings):
        """Opens the images.

        Raises:
          UserError: a full-precision baseline, or no such images.
        """
        trained.require_widths("search")
        self.trained, self.settings = trained, settings
        self.seconds = 0.0
        self.costs = costs(trained.model, settings.latency)
        self.split = settings.split or self._left_out()
        if self._is_test(self.split):
            raise UserError(
                f"split {self.split}: that is test data; search on training data", "test-data"
            )
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
        self._file = _writable(trained.folder / "search" / file_name(about))
        self.cache = EvaluationCache(
            lambda policies: evaluator.scores(trained.variables, policies), self._file, about
        )

    def _left_out(self) -> str:
        """The part of its split that training did not use; where there is none, the split."""
        used = self.trained.run.train_split
        names = split_names(used)
        if "+" in used and ALL not in names:
            rest = complement(used, self._counts(names))
        else:
            rest = left_out(used) or ""
        if not rest:
            return used
        try:
            self.trained.load_split(rest, self.settings.data_dir)
        except EmptySplit:  # such as train[100%:]
            return used
        return used if self._is_test(rest) else rest

    def _is_test(self, split: str) -> bool:
        """Whether a split has images of the test data."""
        run = self.trained.run
        names, train, test = (
            {*split_names(text)} for text in (split, run.train_split, run.test_split)
        )
        if ALL in names | test:
            return True
        shared = names & test
        if shared - train and ALL not in train:
            return True
        if not shared:
            return False
        counts = self._counts(names | test)
        return overlap(parse_split(split, counts), parse_split(run.test_split, counts))

    def _counts(self, names: Iterable[str]) -> dict[str, int]:
        """How many images each of these splits has."""
        data_dir = self.settings.data_dir
        return {name: len(self.trained.load_split(name, data_dir)) for name in names}

    @property
    def seen_in_training(self) -> bool:
        """Whether the images that score policies were trained on, as far as is known."""
        return not self.settings.split and self.split == self.trained.run.train_split

    def problem(self, objective: Cost, constraints: tuple[Constraint, ...] = ()) -> Problem:
        """The widths of this network as a search problem."""
        return Problem(
            space=self.trained.model.space,
            groups=self.trained.groups,
            objective=objective,
            constraints=constraints,
        )

    def method(self, problem: Problem) -> Method:
        """The method that the settings name, with its settings."""
        s = self.settings
        if s.method in ("evolution", "random"):
            return METHODS[s.method](policies=s.evaluations)
        if s.method == "ilp" and s.sensitivity == "hessian":
            few = slice(0, min(512, len(self.data)))
            table = hessian.sensitivity(
                problem,
                self.trained.model,
                self.trained.variables,
                normalize(jnp.asarray(self.data.images[few]), self.data.mean, self.data.std),
                jnp.asarray(self.data.labels[few]),
                jax.random.key(s.seed),
            )
            return METHODS["ilp"](sensitivity=table)
        return METHODS[s.method]()

    def search(self, problem: Problem, on_scores: OnScores = lambda *_: None) -> SearchResult:
        """Runs the search.

        Raises:
          UserError: another process searches with the same file of scores.
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
                on_scores=lambda number, best: on_scores(number, total, best),
            )
            own = time.perf_counter() - start - (self.cache.spent - spent)
            self.seconds = own + self.cache.seconds - before
            return result

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._file is None:
            yield
            return
        lock = self._file.with_name(f".{self._file.name}.lock")
        with hold(lock, f"search scores {self._file}"):
            yield

    def about(self, result: SearchResult) -> dict[str, Any]:
        """What a policy or front file says of how it was found: a JSON tree."""
        return {
            "method": self.settings.method,
            "seed": self.settings.seed,
            "split": self.split,
            "images": len(self.data),
            "evaluations": len(result.policies),
            "seconds": round(self.seconds, 3),
        }

    def top1_on_test(self, policies: Any) -> tuple[np.ndarray, int]:
        """Test accuracy of policies int32 ``[M, L]``, and how many images the test split has."""
        evaluator = make_evaluator(self.trained, self.settings.data_dir)
        top1 = evaluator.top1(self.trained.variables, np.asarray(policies, np.int32))
        return top1, evaluator.examples


def _writable(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the path of a file of scores; None where the workdir cannot be written."""
    try:
        path.parent.mkdir(exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s: cannot write there (%s); scores are not kept, so a search that is stopped starts "
            "again",
            *(path.parent, error.strerror),
        )
        return None
    return path


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FoundPolicy:
    """The best policy within a budget.

    Attributes:
      point: its widths, cost (of the first constraint), loss and accuracies.
      constraints: the budget.
      uniform: test accuracy of each uniform policy, by width.
      examples: number of test images.
      result: all that was evaluated.
      session: with which it was searched.
    """

    point: Point
    constraints: tuple[Constraint, ...]
    uniform: dict[int, float]
    examples: int
    result: SearchResult
    session: SearchSession

    def save(self, path: str | pathlib.Path, *, overwrite: bool = False) -> None:
        """Writes a policy file that also says how the policy was found. Raises as `save_policy`."""
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

        found = bm.search_policy("runs/digits", "bitops=60%", method="ilp")
        found.point.widths, found.point.test_top1
        found.save("policy.json")

    Args:
      source: WORKDIR, WORKDIR@STAGE, or what `trained.load` returned.
      budget: as `parse_budget` reads it, such as "avg_bits=3" or ["bitops=60%", "bytes=40000"].
      on_scores: called after each step of the search with the number of policies evaluated, how
        many there will be at most, and the least loss within the budget.
      settings: the attributes of `SearchSettings`, such as ``method`` and ``images``.

    Raises:
      UserError: as `trained.load`, `SearchSession`, `parse_budget`, `Problem` and
        `SearchResult.best`.
    """
    checked = SearchSettings(**settings)
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
    """Finds the Pareto front of a trained network over the whole range of a cost.

        front, session = bm.search_front("runs/digits", "bitops")
        front.best(6e6).widths
        front.save("front.json")

    Args:
      source, on_scores, settings: as `search_policy`.
      cost: a key of `cost.costs`.
      random: how many random policies are evaluated beside it, for comparison.

    Returns:
      the front, whose notes hold test accuracies of uniform and random policies; and the session.

    Raises:
      UserError: an unknown cost, or as `search_policy`.
    """
    checked = SearchSettings(**settings)
    session = SearchSession(load(source), checked)
    model, space = session.trained.model, session.trained.model.space
    if cost not in session.costs:
        known = list(session.costs)
        hint = " (give a latency file)" if cost == "latency_ms" else closest(cost, known)
        raise UserError(f"cost {cost!r}: unknown{hint}; one of {', '.join(known)}", "unknown-name")
    objective = session.costs[cost]
    result = session.search(session.problem(objective), on_scores)
    points = result.front()
    drawn = random_policies(model, random, session.settings.seed, session.trained.groups)
    uniform = np.stack([space.uniform(width, model.num_layers) for width in space.choices])
    top1, examples = session.top1_on_test(
        np.concatenate([[point.widths for point in points], uniform, drawn])
    )

    def reference(policies: np.ndarray, top1: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"widths": policy.tolist(), "cost": float(objective(policy)), "test_top1": float(t)}
            for policy, t in zip(policies, top1, strict=True)
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
            "uniform": reference(uniform, of_uniform),
            "random": reference(drawn, of_drawn),
        },
    )
    return front, session
