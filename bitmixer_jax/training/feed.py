"""The data of training steps: a set in memory with rows of it, or batches that are streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bitmixer_jax.data import Dataset, Loader, StreamingDataset
from bitmixer_jax.distributed import local_batch_indices, replicate, shard
from bitmixer_jax.errors import UserError
from bitmixer_jax.training.config import Run
from bitmixer_jax.training.schedule import TrainSchedule


class ResidentFeed:
    """Keeps all data on every device; each step uses rows of them.

    So a step sends the devices a few indices instead of images.
    """

    streamed = False

    def __init__(
        self, schedule: TrainSchedule, data: Dataset, devices: Sequence[jax.Device]
    ) -> None:
        """Places the data on the devices."""
        self._schedule = schedule
        self._data = replicate({"image": data.images, "label": data.labels}, devices)

    def __call__(self, step: int, count: int) -> tuple[Any, np.ndarray]:
        """Returns the data, and the rows int32 ``[count, B]`` of ``count`` steps from ``step``."""
        return self._data, np.stack([self._schedule.rows(s) for s in range(step, step + count)])

    def unreadable(self) -> int:
        """Returns how many images could not be read: none."""
        return 0

    def close(self) -> None:
        """Does nothing."""


class StreamFeed:
    """Decodes batches ahead of the steps and gives each device its part."""

    streamed = True

    def __init__(
        self, schedule: TrainSchedule, data: StreamingDataset, devices: Sequence[jax.Device]
    ) -> None:
        """Decodes nothing before the first call."""
        self._schedule, self._data, self._devices = schedule, data, list(devices)
        self._loader: Loader | None = None
        self._next_step = -1

    def __call__(self, step: int, count: int) -> tuple[Any, None]:
        """Returns the batch of ``step`` as ``[devices, B / devices, ...]``; ``count`` is 1.

        Raises:
          UserError: images cannot be read, or a process that decodes them died.
        """
        assert count == 1
        # The loader decodes ahead from the first step that is asked for: 0, or where a run resumes.
        if self._loader is None or step != self._next_step:
            self.close()
            run, end = self._schedule.run, self._schedule.stage_ends[-1]
            local = local_batch_indices(self._devices, run.batch_size)
            self._loader = self._data.training(self._schedule.order, step, end, run.flip, local)
        images, labels = next(self._loader)
        self._next_step = step + 1
        # Each process decodes its own part of the batch only, and places it on its own devices.
        return shard({"image": images, "label": labels}, self._devices), None

    def unreadable(self) -> int:
        """Returns how many images could not be read since this start."""
        return len(self._loader.unreadable) if self._loader is not None else 0

    def close(self) -> None:
        """Ends the processes that decode."""
        if self._loader is not None:
            self._loader.close()


def make_feed(
    schedule: TrainSchedule, data: Dataset | StreamingDataset, devices: Sequence[jax.Device]
) -> ResidentFeed | StreamFeed:
    """Returns the feed for a training set."""
    if isinstance(data, StreamingDataset):
        return StreamFeed(schedule, data, devices)
    return ResidentFeed(schedule, data, devices)


def check_streamed(run: Run) -> None:
    """Refuses settings that do not apply to streamed images. Raises UserError."""
    if run.pad:
        raise UserError(
            f"config.pad = {run.pad}: random crops of streamed images are of "
            "config.stream.min_area of their area; set pad to 0",
            "conflict",
        )
    if run.steps_per_dispatch > 1:
        raise UserError(
            f"config.steps_per_dispatch = {run.steps_per_dispatch}: streamed images come one batch "
            "at a time; set it to 1",
            "conflict",
        )
