"""Runs a trained network whose policy may change between calls, without compiling again.

The policy is an input of one compiled program. A change of policy takes microseconds: it compiles
nothing and moves no weights. Threads may predict and change the policy at the same time.
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
from bitmixer_jax.errors import UserError
from bitmixer_jax.export.integer_engine import from_integer_model
from bitmixer_jax.export.packed import load_packed
from bitmixer_jax.files import user_path
from bitmixer_jax.loaded_model import LoadedModel, Predictor, check_images, from_trained
from bitmixer_jax.policy import BitSpace, check_policy
from bitmixer_jax.training.workdir import parse_source


@dataclasses.dataclass(frozen=True, eq=False)
class _Policy:
    """A policy that was checked. Threads share it, so nothing in it ever changes.

    Attributes:
      widths: int32 ``[L]``, read-only.
      key: the same widths, to find the policy in a dict.
      calibrated: whether training visited all pairs of widths that the policy uses.
    """

    widths: np.ndarray
    key: tuple[int, ...]
    calibrated: bool


class Runtime:
    """A trained network on the first device, compiled, which runs at any policy.

    Everything is compiled when the Runtime is made, so `predict` and `set_policy` never wait for
    the compiler. Any number of threads may call them at the same time. A call of `predict` runs all
    of its images at one policy.

    A Runtime that was loaded from a file can be pickled and copied. The copy loads the same file
    again; it has the current policy, but no programs of `specialize`.

    Attributes:
      space: the widths that each layer may take.
      names: ``[L]`` layer names.
      classes: ``[K]`` class names.
      image_shape: ``(H, W, C)`` of the images.
      reader: reads image files as evaluation did.
      weights_digest: SHA-256 of the weights. A front of this network holds the same digest.
      batch_size: images in one call of the compiled program.
      traces: number of compilations: one, and one for each policy that was specialised.

    Examples:
      >>> import bitmixer_jax as bm
      >>> runtime = bm.Runtime.load("runs/digits")  # doctest: +SKIP
      >>> images = runtime.reader.read(["photo.png"])  # doctest: +SKIP
      >>> logits = runtime.predict(images)  # all layers at the widest width # doctest: +SKIP
      >>> runtime.set_policy(2)  # all layers at 2 bits, from the next call on # doctest: +SKIP
      >>> logits = runtime.predict(images, [4, 3, 2, 2, 3, 4])  # this call only # doctest: +SKIP
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int = 64, specialized: int = 4):
        """Places the weights on the device and compiles the program.

        The current policy is the widest width in all layers.

        Args:
          loaded: the network; see `loaded_model.from_variables` for one in memory.
          batch_size: images in one call of the compiled program. More images run in parts; the last
            part is padded.
          specialized: largest number of policies that may have their own program; see `specialize`.

        Raises:
          UserError: a setting is not a whole number of at least 1.
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
        self._source: str | None = None  # set by `load`
        self.traces = 0
        self._read_policy = _policy_reader(loaded)
        self._max_specialized = specialized
        # Programs by policy, the least recently used first.
        self._specialized: collections.OrderedDict[tuple[int, ...], Any] = collections.OrderedDict()
        # Two locks, so that threads can predict while another thread compiles for seconds. Each
        # look-up changes the order of the dict, so it needs a lock, too.
        self._compile_lock = threading.Lock()
        self._dict_lock = threading.Lock()
        self._any_policy = Predictor(loaded, batch_size, on_trace=self._count_trace)
        self._current = self._as_policy(self.space.widest)

    @classmethod
    def load(
        cls, source: str | pathlib.Path, *, batch_size: int = 64, specialized: int = 4
    ) -> Runtime:
        """Loads a trained network from a workdir or from a packed file.

        A workdir runs in floating point, as in training. A packed file runs in integers.

        Args:
          source: WORKDIR (its newest checkpoint), WORKDIR@STAGE (the end of that stage), or a
            packed file.
          batch_size: see `Runtime`.
          specialized: see `Runtime`.

        Raises:
          UserError: there is no trained network, a file is damaged, or the network is a
            full-precision baseline.
        """
        # Absolute, because a copy may be loaded by a process in another folder.
        source = os.path.abspath(user_path(source))
        runtime = cls(
            load_model(pathlib.Path(source)), batch_size=batch_size, specialized=specialized
        )
        runtime._source = source
        return runtime

    def __reduce__(self) -> tuple[Any, ...]:
        """Supports `pickle` and `copy`: the copy loads the same file again.

        Raises:
          TypeError: this Runtime was made from a network in memory.
        """
        if self._source is None:
            raise TypeError(
                "a Runtime of a network in memory cannot be pickled or copied: export the network "
                "and use Runtime.load(path)"
            )
        settings = (self.batch_size, self._max_specialized)
        state = (self.weights_digest, self._current.key)
        return _load_copy, (type(self), self._source, *settings, *state)

    @property
    def network(self) -> str:
        """Deprecated: `weights_digest`."""
        deprecated.warn("Runtime.network", "Runtime.weights_digest")
        return self.weights_digest

    @property
    def policy(self) -> np.ndarray:
        """The current policy, as a new array int32 ``[L]``."""
        return self._current.widths.copy()

    @property
    def specialized(self) -> tuple[tuple[int, ...], ...]:
        """Policies that have their own program, the least recently used first."""
        with self._dict_lock:
            return tuple(self._specialized)

    def check(self, policy: Any) -> np.ndarray:
        """Returns a policy as int32 ``[L]``, and checks that this network can run at it.

        Args:
          policy: ``[L]`` widths, or one width for all layers.

        Raises:
          UserError: the policy does not fit the network, or uses a pair of widths that training
            never visited.
        """
        return self._check(policy).widths.copy()

    def set_policy(self, policy: Any) -> None:
        """Sets the current policy. Calls of `predict` that begin later run at it.

        Args:
          policy: ``[L]`` widths, or one width for all layers.

        Raises:
          UserError: as `check`; the current policy stays.
        """
        self._current = self._check(policy)  # one assignment: threads see the old or the new policy

    def predict(self, images: Any, policy: Any = None) -> np.ndarray:
        """Returns the logits of images.

        Args:
          images: uint8 ``[N, H, W, C]``, with N at least 1.
          policy: ``[L]`` widths, or one width for all layers, for this call only; None: the current
            policy when the call begins.

        Returns:
          float32 ``[N, K]``.

        Raises:
          UserError: the images or the policy do not fit, or the logits are not finite.
        """
        images = check_images(images, self.image_shape)
        checked = self._current if policy is None else self._as_policy(policy)
        if not checked.calibrated:  # `set_policy` refuses such a policy, but the first one may be
            self._loaded.require_calibrated(checked.widths)
        with self._dict_lock:
            program = self._specialized.get(checked.key)
            if program is not None:
                self._specialized.move_to_end(checked.key)
        return (program or self._any_policy).run(images, checked.widths)

    def specialize(self, policy: Any) -> None:
        """Compiles a program for one policy. `predict` then uses it for this policy.

        The compiler knows the widths and drops the look-ups in tables, so the program is faster.
        The logits are the same up to rounding. If there are too many programs, the least recently
        used one is dropped.

        Args:
          policy: ``[L]`` widths, or one width for all layers.

        Raises:
          UserError: as `check`.
        """
        checked = self._check(policy)
        with self._compile_lock:
            with self._dict_lock:
                if checked.key in self._specialized:
                    self._specialized.move_to_end(checked.key)
                    return
            program = Predictor(
                self._loaded,
                self.batch_size,
                static=checked.key,
                weights=self._any_policy.weights,
                on_trace=self._count_trace,
            )
            with self._dict_lock:
                self._specialized[checked.key] = program
                if len(self._specialized) > self._max_specialized:
                    self._specialized.popitem(last=False)

    def _as_policy(self, policy: Any) -> _Policy:
        """Checks that the widths fit, and notes whether all pairs of widths are calibrated."""
        if not (isinstance(policy, np.ndarray) and policy.dtype == np.int32 and policy.ndim == 1):
            policy = check_policy(policy, self.space, len(self.names))
        return self._read_policy(policy.tobytes())

    def _check(self, policy: Any) -> _Policy:
        """Checks that the widths fit and that all pairs of widths are calibrated."""
        checked = self._as_policy(policy)
        if not checked.calibrated:
            self._loaded.require_calibrated(checked.widths)
        return checked

    def _count_trace(self) -> None:
        self.traces += 1


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _policy_reader(loaded: LoadedModel) -> Callable[[bytes], _Policy]:
    """Returns a function that checks a policy, given as the bytes of its int32 widths.

    The checks take longer than a look-up, so the function remembers the last policies. Arrays
    cannot be keys of a cache; bytes can, and they are made faster than a tuple.
    """

    @functools.lru_cache(maxsize=4096)
    def read(data: bytes) -> _Policy:
        widths = loaded.space.check(np.frombuffer(data, np.int32), len(loaded.names))
        widths.flags.writeable = False
        return _Policy(widths, tuple(widths.tolist()), not loaded.uncalibrated(widths))

    return read


def load_model(source: str | pathlib.Path) -> LoadedModel:
    """Loads a workdir (WORKDIR or WORKDIR@STAGE) or a packed file."""
    if os.path.isdir(parse_source(source)[0]):
        return from_trained(trained.load(source))
    try:
        return from_integer_model(load_packed(source))
    except UserError as error:
        if error.code == "no-such-file":
            raise UserError(f"{source}: no such workdir or packed file", "no-such-file") from None
        raise


def _load_copy(
    cls: type[Runtime],
    source: str,
    batch_size: int,
    specialized: int,
    weights_digest: str,
    policy: tuple[int, ...],
) -> Runtime:
    """Loads a Runtime that was pickled or copied.

    Raises:
      UserError: as `Runtime.load`; or the source holds other weights now.
    """
    runtime = cls.load(source, batch_size=batch_size, specialized=specialized)
    if runtime.weights_digest != weights_digest:
        raise UserError(
            f"{source}: holds other weights than the Runtime that was pickled or copied; load it "
            "again with Runtime.load",
            "other-network",
        )
    runtime._current = runtime._as_policy(policy)
    return runtime


_again = _load_copy  # the name in pickles of version 0.1
