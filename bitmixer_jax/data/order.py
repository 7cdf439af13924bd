"""Which examples a step takes: a function of (seed, epoch) alone."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which training goes through its examples, epoch by epoch.

    Attributes:
      seed: of the shuffles.
      examples: number of training images.
      batch_size: over all devices and hosts; each epoch leaves out another remainder.
    """

    seed: int
    examples: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.examples // self.batch_size

    def epoch(self, step: int) -> int:
        """The epoch to which step ``step`` belongs."""
        return step // self.steps_per_epoch

    def rows(self, step: int) -> np.ndarray:
        """Which examples step ``step`` takes: int32 ``[batch_size]``, read-only."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _permutation(self.seed, epoch, self.examples)
        return order[within * self.batch_size :][: self.batch_size]


@functools.lru_cache(maxsize=2)  # around the end of an epoch, threads ask for both
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)
    order.flags.writeable = False
    return order
