"""What the training steps are fed with: resident data and rows of them, or streamed batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bitmixer_jax.data import Dataset, Loader, StreamingDataset
from bitmixer_jax.devices import local_batch_indices, replicate, shard
from bitmixer_jax.errors import UserError
from bitmixer_jax.training.config import Run
from bitmixer_jax.training.schedule import TrainSchedule


class ResidentFeed:
    """All data on every device; each step takes rows of them."""

    streamed = False

    def __init__(
        self, schedule: TrainSchedule, data: Dataset, devices: Sequence[jax.Device]
    ) -> None:
        """Places the data."""
        self._schedule = schedule
        self._data = replicate({"image": data.images, "label": data.labels}, devices)

    def __call__(self, step: int, take: int) -> tuple[Any, np.ndarray]:
        """Data, and rows int32 ``[take, B]``, of the steps from ``step`` on."""
        return self._data, np.stack([self._schedule.rows(s) for s in range(step, step + take)])

    def unreadable(self) -> int:
        """How many images could not be read: none."""
        return 0

    def close(self) -> None:
        """Nothing to end."""


class StreamFeed:
    """Batches decoded ahead of the steps, each device's part on it."""

    streamed = True

    def __init__(
        self, schedule: TrainSchedule, data: StreamingDataset, devices: Sequence[jax.Device]
    ) -> None:
        """Decodes nothing before the first step is asked for."""
        self._schedule, self._data, self._devices = schedule, data, list(devices)
        self._loader: Loader | None = None
        self._next = -1

    def __call__(self, step: int, take: int) -> tuple[Any, None]:
        """The batch of ``step`` as ``[devices, B / devices, ...]``; ``take`` is 1.

        Raises:
          UserError: images cannot be read, or a worker died.
        """
        assert take == 1
        if self._loader is None or step != self._next:
            self.close()
            run, end = self._schedule.run, self._schedule.stage_ends[-1]
            own = local_batch_indices(self._devices, run.batch_size)
            self._loader = self._data.training(self._schedule.order, step, end, run.flip, own)
        images, labels = next(self._loader)
        self._next = step + 1
        return shard({"image": images, "label": labels}, self._devices), None

    def unreadable(self) -> int:
        """How many images could not be read since this start."""
        return len(self._loader.unreadable) if self._loader is not None else 0

    def close(self) -> None:
        """Ends the workers."""
        if self._loader is not None:
            self._loader.close()


def make_feed(
    schedule: TrainSchedule, data: Dataset | StreamingDataset, devices: Sequence[jax.Device]
) -> ResidentFeed | StreamFeed:
    """The feed for a training set."""
    if isinstance(data, StreamingDataset):
        return StreamFeed(schedule, data, devices)
    return ResidentFeed(schedule, data, devices)


def check_streamed(run: Run) -> None:
    """Refuses settings that streamed images have no use for. Raises UserError."""
    if run.pad:
        raise UserError(
            f"config.pad = {run.pad}: random crops of streamed images are of "
            "config.stream.min_area of their area; set pad to 0"
        )
    if run.steps_per_dispatch > 1:
        raise UserError(
            f"config.steps_per_dispatch = {run.steps_per_dispatch}: streamed images come one batch "
            "at a time; set it to 1"
        )
