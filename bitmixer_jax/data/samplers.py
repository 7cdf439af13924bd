"""Samplers: the images of a batch and the crop of each, as functions of seed, epoch and image."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import numpy as np

from bitmixer_jax.data.crops import Box, centre_box, random_box


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which training goes through its examples: shuffled anew for each epoch.

    Attributes:
      seed: seed of the shuffles.
      examples: number of training examples.
      batch_size: examples in a batch, over all devices and hosts. Each epoch drops the
        `examples % batch_size` examples that come last in its order.

    Example:
      >>> from bitmixer_jax.data import Order
      >>> order = Order(seed=0, examples=10, batch_size=4)
      >>> order.steps_per_epoch, order.epoch(5)
      (2, 2)
      >>> order.rows(5).shape
      (4,)
    """

    seed: int
    examples: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in an epoch."""
        return self.examples // self.batch_size

    def epoch(self, step: int) -> int:
        """Returns the epoch to which a step belongs."""
        return step // self.steps_per_epoch

    def rows(self, step: int) -> np.ndarray:
        """Returns the indices of the examples of a step: int32 ``[batch_size]``, read-only."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _permutation(self.seed, epoch, self.examples)
        return order[within * self.batch_size :][: self.batch_size]


@functools.lru_cache(maxsize=2)  # around the end of an epoch, threads ask for both
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)
    order.flags.writeable = False
    return order


class Sampler(Protocol):
    """Says which images a `Loader` reads, and how it crops them."""

    def rows(self, step: int) -> np.ndarray:
        """Returns the indices of the images of a batch that this host reads."""

    def crop(self, step: int, row: int) -> tuple[Callable[[int, int], Box], bool]:
        """Returns a function from (width, height) of an image to its crop, and whether to flip."""

    def replacement(self, step: int, row: int, attempt: int) -> int | None:
        """Returns the index of an image in place of an unreadable one; None: leave it out."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingSampler:
    """Samples shuffled epochs with random crops.

    Attributes:
      order: order of the images.
      local: which elements of the global batch this host reads: int ``[b]``.
      flip: mirror half of the images.
      min_area: see StreamSettings.
    """

    order: Order
    local: np.ndarray
    flip: bool
    min_area: float

    def rows(self, step: int) -> np.ndarray:
        """See Sampler."""
        return self.order.rows(step)[self.local]

    def crop(self, step: int, row: int) -> tuple[Callable[[int, int], Box], bool]:
        """See Sampler."""
        rng = np.random.default_rng((self.order.seed, self.order.epoch(step), row, 1))
        mirrored = rng.random() < 0.5  # drawn in any case: crops do not depend on `flip`
        return functools.partial(random_box, rng, min_area=self.min_area), mirrored and self.flip

    def replacement(self, step: int, row: int, attempt: int) -> int:
        """See Sampler."""
        rng = np.random.default_rng((self.order.seed, self.order.epoch(step), row, 2, attempt))
        return int(rng.integers(self.order.examples))


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSampler:
    """Samples given images once, in their order, cropped at the centre.

    Attributes:
      indices: which images: int ``[N]``.
      batch_size: images in a batch, over all hosts; the last batch may have fewer.
      local: which elements of such a batch this host reads: int ``[b]``.
      size, resize: see StreamSettings.
    """

    indices: np.ndarray
    batch_size: int
    local: np.ndarray
    size: int
    resize: int

    def rows(self, step: int) -> np.ndarray:
        """See Sampler."""
        rows = self.indices[step * self.batch_size :][: self.batch_size]
        return rows[self.local[self.local < len(rows)]]

    def crop(self, step: int, row: int) -> tuple[Callable[[int, int], Box], bool]:
        """See Sampler."""
        return functools.partial(centre_box, size=self.size, resize=self.resize), False

    def replacement(self, step: int, row: int, attempt: int) -> None:
        """See Sampler."""
