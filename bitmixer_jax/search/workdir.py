"""What the command line does with a workdir: search for a policy, draw a front.

Searches see training data alone: by default what training left out of its split, else the images
that it trained on. Test data is read once, when the search has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax import data as datasets
from bitmixer_jax.bits import closest, save_policy
from bitmixer_jax.cost import Cost, activation_peak, costs
from bitmixer_jax.data import Dataset, StreamingDataset
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
from bitmixer_jax.evaluation import Evaluator, random_policies
from bitmixer_jax.files import cannot_write, check_folder, check_free, hold, user_path
from bitmixer_jax.front import Front, Point
from bitmixer_jax.search import hessian, plots
from bitmixer_jax.search.problem import Problem, parse_budget
from bitmixer_jax.search.scores import ScoreBook, file_name
from bitmixer_jax.search.search import METHODS, Found, Method, search
from bitmixer_jax.training import load_trained
from bitmixer_jax.training.checkpoints import digest
from bitmixer_jax.training.claims import parse_source

SENSITIVITIES = ("measured", "hessian")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to search, but for what.

    Attributes:
      method: a key of METHODS.
      seed: of the images and of the method's draws.
      evaluations: policies that evolution and random may evaluate; others need what they need.
      sensitivity: for ilp: "measured" or "hessian".
      images: how many images score a policy.
      split: which, such as "train[45000:]"; empty: what training left out, else what it trained on.
      data_dir: instead of the one that training used.
      latency: file of measured times, for the cost latency_ms.
    """

    method: str = "greedy"
    seed: int = 0
    evaluations: int = 512
    sensitivity: str = "measured"
    images: int = 2000
    split: str = ""
    data_dir: str | None = None
    latency: pathlib.Path | None = None

    def __post_init__(self) -> None:
        """Raises UserError for values that are not allowed."""
        for name, value, allowed in (
            ("--method", self.method, tuple(METHODS)),
            ("--sensitivity", self.sensitivity, SENSITIVITIES),
        ):
            if value not in allowed:
                raise UserError(f"{name} {value!r}{closest(value, allowed)}: one of {allowed}")
        if self.sensitivity != "measured" and self.method != "ilp":
            raise UserError(f"--sensitivity {self.sensitivity}: of --method ilp alone")
        for name, number in (("--evaluations", self.evaluations), ("--images", self.images)):
            if number < 1:
                raise UserError(f"{name} {number}: give 1 or more")


class Trained:
    """A trained network with what a search needs of it.

    Attributes:
      seconds: that the last search took, with scores known before counted as when measured.
    """

    seconds = 0.0

    def __init__(self, workdir: str, settings: Settings):
        """Loads network and images.

        Raises:
          UserError: no trained network there, a float twin, or no such images.
        """
        self.settings = settings
        self.run, self.model, self.variables = load_trained(workdir)
        if self.model.quant.space is None:
            raise UserError(f"{workdir}: a float twin has no widths to search")
        self.network = digest(self.variables)
        self.costs = costs(self.model, settings.latency)
        self.groups = self.model.groups(self.run.selection)  # type: ignore[arg-type]
        self.data_dir = settings.data_dir or self.run.data_dir or None
        self.split = settings.split or self._left_out()
        if self._is_test(self.split):
            raise UserError(f"--split {self.split}: that is test data; search on training data")
        self.data = self._subset(self.run.load(self.split, self.data_dir))
        evaluator = self.evaluator(self.data)
        about = {
            "network": self.network,
            "dataset": self.run.dataset,
            "split": self.split,
            "images": len(self.data),
            "seed": settings.seed,
        }
        self._scores = _writable(parse_source(workdir)[0] / "search" / file_name(about))
        self.book = ScoreBook(
            lambda policies: evaluator.scores(self.variables, policies), self._scores, about
        )

    def _left_out(self) -> str:
        """The part of its split that training did not use; where there is none, the split."""
        train = self.run.train_split
        names = split_names(train)
        if "+" in train and ALL not in names:
            rest = complement(train, self._counts(names))
        else:
            rest = left_out(train) or ""
        if not rest:
            return train
        try:
            self.run.load(rest, self.data_dir)
        except EmptySplit:  # such as train[100%:]
            return train
        return train if self._is_test(rest) else rest

    def _is_test(self, split: str) -> bool:
        """Whether a split has images of the test data."""
        names, train, test = (
            {*split_names(text)} for text in (split, self.run.train_split, self.run.test_split)
        )
        if ALL in names | test:
            return True
        shared = names & test
        if shared - train and ALL not in train:
            return True
        if not shared:
            return False
        counts = self._counts(names | test)
        return overlap(parse_split(split, counts), parse_split(self.run.test_split, counts))

    def _counts(self, names: Iterable[str]) -> dict[str, int]:
        """How many images each of these splits has."""
        return {name: len(self.run.load(name, self.data_dir)) for name in names}

    def _subset(self, data: Dataset | StreamingDataset) -> Dataset:
        number = min(self.settings.images, len(data))
        rows = np.random.default_rng(self.settings.seed).permutation(len(data))[:number]
        return data.subset(rows)

    def evaluator(self, data: Dataset | StreamingDataset) -> Evaluator:
        """An Evaluator of this network."""
        size = self.run.evaluate_batch
        return Evaluator(self.model, data, data.mean, data.std, batch_size=size)

    @property
    def seen_in_training(self) -> bool:
        """Whether the images that score policies were trained on, as far as is known."""
        return not self.settings.split and self.split == self.run.train_split

    def method(self, problem: Problem) -> Method:
        """The method with its settings."""
        s = self.settings
        if s.method in ("evolution", "random"):
            return METHODS[s.method](policies=s.evaluations)
        if s.method == "ilp" and s.sensitivity == "hessian":
            few = slice(0, min(512, len(self.data)))
            images = datasets.normalize(
                jnp.asarray(self.data.images[few]), self.data.mean, self.data.std
            )
            table = hessian.sensitivity(
                problem,
                self.model,
                self.variables,
                images,
                jnp.asarray(self.data.labels[few]),
                jax.random.key(s.seed),
            )
            return METHODS["ilp"](sensitivity=table)
        return METHODS[s.method]()

    def search(self, problem: Problem) -> Found:
        """Runs the search, with a progress bar on a terminal.

        Raises:
          UserError: another process searches with the same file of scores.
        """
        if self._scores is None:
            return self._search(problem)
        lock = self._scores.with_name(f".{self._scores.name}.lock")
        with hold(lock, f"search scores {self._scores}"):
            return self._search(problem)

    def _search(self, problem: Problem) -> Found:
        from rich.console import Console
        from rich.progress import Progress

        start, before, spent = time.perf_counter(), self.book.seconds, self.book.spent
        method = self.method(problem)
        shown = Console().is_terminal
        with Progress(transient=True, disable=not shown) as progress:
            task = progress.add_task("searching", total=method.evaluations(problem))

            def on_scores(number: int, best: float) -> None:
                what = f"searching: least loss {best:.4f}"
                progress.update(task, completed=number, description=what)

            found = search(problem, method, self.book, seed=self.settings.seed, on_scores=on_scores)
        own = time.perf_counter() - start - (self.book.spent - spent)
        self.seconds = own + self.book.seconds - before
        return found

    def about_search(self, found: Found) -> dict[str, Any]:
        """What a result file says of how it was found."""
        return {
            "network": self.network,
            "method": self.settings.method,
            "seed": self.settings.seed,
            "split": self.split,
            "images": len(self.data),
            "evaluations": len(found.policies),
            "seconds": round(self.seconds, 3),
        }

    def test(self) -> tuple[Evaluator, int]:
        """An Evaluator of the test data, and how many images those are."""
        data = self.run.load(self.run.test_split, self.data_dir)
        return self.evaluator(data), len(data)


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


def search_workdir(
    workdir: str,
    budget: Sequence[str],
    out: pathlib.Path,
    settings: Settings,
    overwrite: bool = False,
) -> list[str]:
    """Searches the best policy within a budget and writes it to ``out``.

    Args:
      workdir: WORKDIR or WORKDIR@STAGE.
      budget: as `parse_budget` reads it.

    Returns:
      Markdown lines that say what was found.

    Raises:
      UserError: see `Trained`, `parse_budget`, `Problem`, `Found.best`; ``out`` exists.
    """
    out = user_path(out)
    check_free(out, overwrite)
    trained = Trained(workdir, settings)
    model, space = trained.model, trained.model.space
    limits = parse_budget(budget, trained.costs)
    problem = Problem(space=space, groups=trained.groups, axis=limits[0].cost, limits=limits)
    found = trained.search(problem)
    best = found.best()
    uniform = [space.uniform(width, model.num_layers) for width in space.choices]
    evaluator, examples = trained.test()
    policies = np.stack([np.asarray(best.widths), *uniform])
    top1 = evaluator.top1(trained.variables, policies)
    values = {name: float(cost(np.asarray(best.widths))) for name, cost in trained.costs.items()}
    about = trained.about_search(found)
    save_policy(
        out,
        best.widths,
        model.names,
        space,
        overwrite=overwrite,
        network=about.pop("network"),
        budget={limit.cost.name: limit.most for limit in limits},
        cost={**values, "activation_peak": float(activation_peak(model, best.widths))},
        search={**about, "loss": best.loss, "top1": best.top1},
        test={"examples": examples, "top1": float(top1[0])},
    )
    rows = ["| policy | top-1 on test, % |" + "".join(f" {x.cost.name} |" for x in limits)]
    rows.append("|---|---|" + "---|" * len(limits))
    named = [
        ("found", policies[0]),
        *((f"all {w} bits", u) for w, u in zip(space.choices, uniform, strict=True)),
    ]
    for (name, policy), accuracy in zip(named, top1, strict=True):
        cells = "".join(f" {float(limit.cost(policy)):,.6g} |" for limit in limits)
        rows.append(f"| {name} | {100 * accuracy:.2f} |{cells}")
    return [
        *rows,
        "",
        _images_line(trained, found),
        f"Test data: {examples} images, read once, after the search.",
    ]


def _images_line(trained: Trained, found: Found) -> str:
    seen = (
        "; the network was trained on them: train with config.train_split=train[:90%] to keep some"
        if trained.seen_in_training
        else ""
    )
    return (
        f"{trained.settings.method}: {len(found.policies)} policies evaluated on "
        f"{len(trained.data)} images of {trained.split}{seen}; "
        f"{trained.seconds:.1f} s."
    )


def front_workdir(
    workdir: str,
    cost: str,
    out: pathlib.Path,
    settings: Settings,
    random: int = 100,
    overwrite: bool = False,
) -> list[str]:
    """Draws the Pareto front over the whole range of a cost: front.json and two plots in ``out``.

    Args:
      cost: a key of `cost.costs`.
      out: folder.
      random: how many random policies are drawn beside it.

    Returns, raises: as `search_workdir`.
    """
    out = user_path(out)
    check_folder(out)
    if out.exists():
        for name in ("front.json", "front.png", "widths.png"):
            check_free(out / name, overwrite)
    trained = Trained(workdir, settings)
    model, space = trained.model, trained.model.space
    if cost not in trained.costs:
        known = list(trained.costs)
        hint = " (give --latency)" if cost == "latency_ms" else closest(cost, known)
        raise UserError(f"--cost {cost!r}: unknown{hint}; one of {', '.join(known)}")
    axis = trained.costs[cost]
    problem = Problem(space=space, groups=trained.groups, axis=axis)
    found = trained.search(problem)
    points = found.front()
    drawn = random_policies(model, random, settings.seed, trained.groups)
    uniform = np.stack([space.uniform(width, model.num_layers) for width in space.choices])
    evaluator, examples = trained.test()
    policies = np.concatenate([[point.widths for point in points], uniform, drawn])
    top1 = evaluator.top1(trained.variables, policies.astype(np.int32))
    points = tuple(
        dataclasses.replace(point, test_top1=float(t))
        for point, t in zip(points, top1, strict=False)
    )
    after = len(points)
    about = trained.about_search(found)
    front = Front(
        points=points,
        names=model.names,
        choices=space.choices,
        cost=axis.name,
        unit=axis.unit,
        network=about.pop("network"),
        notes={
            "search": about,
            "test": {"examples": examples},
            "uniform": _reference(axis, uniform, top1[after:]),
            "random": _reference(axis, drawn, top1[after + space.n :]),
        },
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error, "--out") from None
    try:
        front.save(out / "front.json", overwrite=overwrite)
    except UserError:
        with contextlib.suppress(OSError):  # it was there before, and holds other files
            out.rmdir()
        raise
    plots.plot_front(out / "front.png", front)
    plots.plot_widths(out / "widths.png", front)
    return [
        *_front_table(front.points, axis, points_shown=12),
        "",
        _images_line(trained, found),
        f"Test data: {examples} images, read once, after the search.",
    ]


def _reference(axis: Cost, policies: np.ndarray, top1: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"widths": p.tolist(), "cost": float(axis(p)), "test_top1": float(t)}
        for p, t in zip(policies, top1, strict=False)
    ]


def _front_table(points: Sequence[Point], axis: Cost, points_shown: int) -> list[str]:
    rows = [f"| {axis.name} | of the widest | top-1 on test, % | widths |", "|---|---|---|---|"]
    shown = np.unique(np.linspace(0, len(points) - 1, points_shown).round().astype(int))
    for i in shown:
        point = points[i]
        rows.append(
            f"| {point.cost:,.6g} | {100 * point.cost / axis.widest:.1f}% | "
            f"{100 * (point.test_top1 or 0):.2f} | {','.join(map(str, point.widths))} |"
        )
    if len(shown) < len(points):
        rows.append(f"| ({len(points)} points in all) | | | |")
    return rows
