"""A loaded network that switches policy as it runs: one compiled program, policies as data.

    runtime = Runtime.load("runs/digits")
    logits = runtime.predict(images)  # at the policy in force: the widest everywhere
    runtime.set_policy(2)  # from the next call on
    logits = runtime.predict(images, policy=[4, 3, 2, 2, 3, 4])  # this call alone

Switching takes microseconds: it compiles nothing, moves no weights, and threads may do it. A
Runtime that was loaded can be pickled and copied: the copy loads the same source again.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from bitmixer_jax import deprecated, trained
from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.export.integer_engine import from_integer_model
from bitmixer_jax.export.packed import load_packed
from bitmixer_jax.files import user_path
from bitmixer_jax.loaded_model import LoadedModel, Predictor, check_images, from_trained
from bitmixer_jax.policy import BitSpace, check_policy
from bitmixer_jax.training.workdir import parse_source


@dataclasses.dataclass(frozen=True, eq=False)
class _Policy:
    """A policy that was checked. Threads pass it on whole, and nothing in it ever changes.

    Attributes:
      widths: int32 ``[L]``, read-only.
      key: the same widths.
      known: whether training visited all its pairs of widths.
    """

    widths: np.ndarray
    key: tuple[int, ...]
    known: bool


class Runtime:
    """A trained network, on the first device, ready to run at any policy.

    All is compiled when it is made: neither `predict` nor `set_policy` ever compiles, and switching
    moves no weights. Any number of threads may predict and switch at the same time: each call runs
    at one policy, whole.

    Attributes:
      space, names: choices of width, and the layers' names.
      classes: name of each class.
      image_shape: ``(H, W, C)`` of the images that it takes.
      reader: makes them of image files, as evaluation did.
      weights_digest: of the weights: a front that was searched for them carries the same.
      batch_size: images that one call of the compiled program runs.
      traces: compilations so far: one, and one for each policy that was specialised.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int = 64, specialized: int = 4):
        """Places the weights and compiles. The policy in force is the widest width everywhere.

        Args:
          loaded: the network.
          batch_size: larger inputs run in parts of so many, the last one padded.
          specialized: most policies that have a program of their own (`specialize`).

        Raises:
          UserError: a setting below 1.
        """
        for name, value in (("batch_size", batch_size), ("specialized", specialized)):
            if not _is_whole(value) or value < 1:
                raise UserError(f"{name} = {value!r}: give a whole number, 1 or more")
        self._loaded = loaded
        self.space: BitSpace = loaded.space
        self.names = loaded.names
        self.classes = loaded.classes
        self.image_shape = loaded.image_shape
        self.reader = loaded.reader
        self.weights_digest = loaded.weights_digest
        self.batch_size = batch_size
        self._source: str | None = None  # where `load` found it
        self.traces = 0
        self._read_policy = _policy_reader(loaded)
        self._compiling = threading.Lock()
        self._most_specialized = specialized
        self._specialized: collections.OrderedDict[tuple[int, ...], Any] = collections.OrderedDict()
        self._order = threading.Lock()  # of the entries: a look-up moves one to the end
        self._any_policy = Predictor(loaded, batch_size, on_trace=self._count_trace)
        self._current = self._as_policy(self.space.widest)

    @classmethod
    def load(
        cls, source: str | pathlib.Path, *, batch_size: int = 64, specialized: int = 4
    ) -> Runtime:
        """Loads a trained network: simulated from a workdir, in integers from a packed file.

        Args:
          source: WORKDIR (its newest checkpoint), WORKDIR@STAGE (the end of that stage), or a
            packed file.
          batch_size, specialized: see `Runtime`.

        Raises:
          UserError: no trained network there, a damaged file, or a float twin.
        """
        source = os.path.abspath(user_path(source))  # for another process, in another folder
        found = cls(_load(pathlib.Path(source)), batch_size=batch_size, specialized=specialized)
        found._source = source
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Supports `pickle` and `copy`: the copy loads the same source again.

        The copy has the policy in force; it has no programs of `specialize`.

        Raises:
          TypeError: this runtime was made from a network in memory.
        """
        if self._source is None:
            raise TypeError(
                "a Runtime of a network in memory cannot be pickled or copied: export the network "
                "and use Runtime.load(path)"
            )
        settings = (self.batch_size, self._most_specialized)
        return _again, (type(self), self._source, *settings, self.weights_digest, self._current.key)

    @property
    def network(self) -> str:
        """Deprecated: `weights_digest`."""
        deprecated.warn("Runtime.network", "Runtime.weights_digest")
        return self.weights_digest

    @property
    def policy(self) -> np.ndarray:
        """The policy in force, int32 ``[L]`` widths: a copy."""
        return self._current.widths.copy()

    @property
    def specialized(self) -> tuple[tuple[int, ...], ...]:
        """Policies that have a program of their own, the least recently used first."""
        with self._order:
            return tuple(self._specialized)

    def check(self, policy: Any) -> np.ndarray:
        """Returns a policy as int32 ``[L]``, or says why it cannot run here.

        Args:
          policy: ``[L]`` widths, or one width for all layers.

        Raises:
          UserError: it does not fit the network, or needs BN statistics of a pair of widths that
            training never visited.
        """
        return self._checked(policy).widths.copy()

    def set_policy(self, policy: Any) -> None:
        """Puts a policy in force, from the next call of `predict` on. Arguments as `check`."""
        self._current = self._checked(policy)

    def predict(self, images: Any, policy: Any = None) -> np.ndarray:
        """Classifies images.

        Args:
          images: uint8 ``[N, H, W, C]``, as many as you like but at least one.
          policy: for this call alone, as `check`; None: the one in force as the call begins.

        Returns:
          logits float32 ``[N, num_classes]``.

        Raises:
          UserError: images or policy do not fit, or the logits are not finite.
        """
        images = check_images(images, self.image_shape)
        chosen = self._current if policy is None else self._as_policy(policy)
        if not chosen.known:
            self._loaded.require_calibrated(chosen.widths)
        with self._order:
            own = self._specialized.get(chosen.key)
            if own is not None:
                self._specialized.move_to_end(chosen.key)
        return (own or self._any_policy).run(images, chosen.widths)

    def specialize(self, policy: Any) -> None:
        """Compiles a program for one policy, which `predict` uses from then on.

        The compiler knows the widths, so the look-ups in tables are gone. The logits are the same
        up to rounding. The least recently used program gives way where there are too many.

        Args:
          policy: as `check`.

        Raises:
          UserError: as `check`.
        """
        chosen = self._checked(policy)
        with self._compiling:
            with self._order:
                if chosen.key in self._specialized:
                    self._specialized.move_to_end(chosen.key)
                    return
            program = Predictor(
                self._loaded,
                self.batch_size,
                static=chosen.key,
                weights=self._any_policy.weights,
                on_trace=self._count_trace,
            )
            with self._order:
                self._specialized[chosen.key] = program
                while len(self._specialized) > self._most_specialized:
                    self._specialized.popitem(last=False)

    def _as_policy(self, policy: Any) -> _Policy:
        """Checks the widths; of pairs that training never visited it takes note alone."""
        if not (isinstance(policy, np.ndarray) and policy.dtype == np.int32 and policy.ndim == 1):
            policy = check_policy(policy, self.space, len(self.names))
        return self._read_policy(policy.tobytes())

    def _checked(self, policy: Any) -> _Policy:
        chosen = self._as_policy(policy)
        if not chosen.known:
            self._loaded.require_calibrated(chosen.widths)
        return chosen

    def _count_trace(self) -> None:
        self.traces += 1


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _policy_reader(run: LoadedModel) -> Callable[[bytes], _Policy]:
    """What checks the int32 widths in some bytes; it remembers those that it checked last."""

    @functools.lru_cache(maxsize=4096)
    def read(widths: bytes) -> _Policy:
        policy = run.space.check(np.frombuffer(widths, np.int32), len(run.names))
        policy.flags.writeable = False
        return _Policy(policy, tuple(policy.tolist()), not run.uncalibrated(policy))

    return read


def _load(source: pathlib.Path) -> LoadedModel:
    """Loads a workdir (WORKDIR or WORKDIR@STAGE) or a packed file."""
    try:
        if source.exists() and not source.is_dir():
            return from_integer_model(load_packed(source))
        there = parse_source(source)[0].exists()
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"{source}: cannot be read ({reason(error)})", "not-readable") from None
    if not there:
        raise UserError(f"{source}: no such workdir or packed file", "no-such-file")
    return from_trained(trained.load(source))


def _again(
    kind: type[Runtime],
    source: str,
    batch_size: int,
    specialized: int,
    weights_digest: str,
    policy: tuple[int, ...],
) -> Runtime:
    """Loads a Runtime that was pickled or copied.

    Raises:
      UserError: as `Runtime.load`, or its source holds other weights by now.
    """
    found = kind.load(source, batch_size=batch_size, specialized=specialized)
    if found.weights_digest != weights_digest:
        raise UserError(
            f"{source}: holds other weights than the Runtime that was pickled or copied; load it "
            "anew with Runtime.load",
            "other-network",
        )
    found._current = found._as_policy(policy)
    return found
