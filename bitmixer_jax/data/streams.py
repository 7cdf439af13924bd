"""Image sets too large for memory: decoded by worker processes while the network trains.

Which images a batch takes, how each is cropped and whether it is mirrored are drawn from (seed,
epoch, image) alone: the same for any number of workers and hosts, and from any step on.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from bitmixer_jax.data._dataset import Dataset
from bitmixer_jax.data._encoded import Source
from bitmixer_jax.data._names import listed, one_line, reason_of
from bitmixer_jax.data._workers import check_main, open_iterator, why_died
from bitmixer_jax.data.crops import (
    Box,
    centre_box,
    random_box,
    read_crop,
)
from bitmixer_jax.data.order import Order
from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.errors import UserError

_log = logging.getLogger(__name__)

# Per-channel statistics of ImageNet's training images, in units of 0..255; every streamed set is
# normalised by them, as a pass over millions of images for their own would change little.
MEAN = np.asarray((0.485, 0.456, 0.406), np.float32) * 255
STD = np.asarray((0.229, 0.224, 0.225), np.float32) * 255

_CHUNK = 32  # images that a worker hands over at once: few, so that all share in each batch
_SPARES = 100  # draws for an image in place of an unreadable one
_SHOWN = 10  # unreadable images that are named as they are met


class Pass(Protocol):
    """A way through the images of a set."""

    def rows(self, step: int) -> np.ndarray:
        """Which images batch ``step`` holds."""

    def view(self, step: int, row: int) -> tuple[Callable[[int, int], Box], bool]:
        """Which part of an image is taken (by its width and height), and whether it is mirrored."""

    def instead(self, step: int, row: int, attempt: int) -> int | None:
        """Another image in place of an unreadable one; None: leave it out."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingPass:
    """Epoch after epoch, shuffled, with random crops.

    Attributes:
      order: of the images.
      take: places in the global batch that this host takes: int ``[b]``.
      flip: mirror half of the images.
      min_area: see StreamSettings.
    """

    order: Order
    take: np.ndarray
    flip: bool
    min_area: float

    def rows(self, step: int) -> np.ndarray:
        """See Pass."""
        return self.order.rows(step)[self.take]

    def view(self, step: int, row: int) -> tuple[Callable[[int, int], Box], bool]:
        """See Pass."""
        rng = np.random.default_rng((self.order.seed, self.order.epoch(step), row, 1))
        mirrored = rng.random() < 0.5  # drawn in any case: crops do not depend on `flip`
        box = functools.partial(random_box, rng, min_area=self.min_area)
        return box, mirrored and self.flip

    def instead(self, step: int, row: int, attempt: int) -> int:
        """See Pass."""
        rng = np.random.default_rng((self.order.seed, self.order.epoch(step), row, 2, attempt))
        return int(rng.integers(self.order.examples))


@dataclasses.dataclass(frozen=True, eq=False)
class CentrePass:
    """Some images once, in the order given, cropped at their centre.

    Attributes:
      chosen: which images: int ``[N]``.
      batch_size: images in a batch, over all hosts; the last may have fewer.
      take: places in such a batch that this host takes: int ``[b]``.
      size, resize: see StreamSettings.
    """

    chosen: np.ndarray
    batch_size: int
    take: np.ndarray
    size: int
    resize: int

    def rows(self, step: int) -> np.ndarray:
        """See Pass."""
        rows = self.chosen[step * self.batch_size :][: self.batch_size]
        return rows[self.take[self.take < len(rows)]]

    def view(self, step: int, row: int) -> tuple[Callable[[int, int], Box], bool]:
        """See Pass."""
        return functools.partial(centre_box, size=self.size, resize=self.resize), False

    def instead(self, step: int, row: int, attempt: int) -> None:
        """See Pass."""


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
    """One split, or a slice of one, of a labelled image set that is read as it is needed.

    Attributes:
      name, split, classes: as of `Dataset`.
      source: the encoded images.
      settings: how they are read.
      workers: processes that decode; 0: threads of this process; -1: one for each CPU core, at
        most 32. What is read does not depend on it.
      mean, std: ``[3]`` float32 for normalisation, in units of 0..255.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    source: Source
    settings: StreamSettings
    workers: int = -1
    mean: np.ndarray = dataclasses.field(default_factory=lambda: MEAN)
    std: np.ndarray = dataclasses.field(default_factory=lambda: STD)

    def __post_init__(self) -> None:
        """Raises UserError where the decoder is not installed."""
        self.settings.check_installed()
        # What is read must not depend on a name that `dataclasses.replace` may change.
        object.__setattr__(self, "settings", self.settings.for_dataset(self.name))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a crop."""
        return self.settings.size, self.settings.size, 3

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def training(
        self, order: Order, start: int, stop: int, flip: bool, take: np.ndarray | None = None
    ) -> Loader:
        """Batches of the steps ``start .. stop - 1``.

        Args:
          order: which images each step takes.
          flip: mirror half of them.
          take: places in the global batch that this host takes, int ``[b]``; None: all.
        """
        take = np.arange(order.batch_size) if take is None else np.asarray(take)
        way = TrainingPass(order, take, flip, self.settings.min_area)
        return Loader(self, way, start, stop, len(take), self.workers)

    def evaluation(self, batch_size: int, take: np.ndarray | None = None) -> Loader:
        """All images in batches, the last one padded with black images of label -1.

        Args:
          take: places in a batch that this host takes, int ``[b]``, rising; None: all.
        """
        return self._centred(np.arange(len(self)), batch_size, self.workers, take)

    def subset(self, rows: np.ndarray) -> Dataset:
        """These images, cropped at the centre, as a set in memory; unreadable ones are left out.

        Raises:
          UserError: an image cannot be read and `skip_unreadable` is false.
        """
        loader = self._centred(np.asarray(rows), _CHUNK, workers=0)
        images, labels = (np.concatenate(x) for x in zip(*loader, strict=True))
        there = labels >= 0
        return Dataset(
            self.name,
            self.split,
            images[there],
            labels[there],
            self.classes,
            self.mean,
            self.std,
        )

    def _centred(
        self, rows: np.ndarray, batch_size: int, workers: int, take: np.ndarray | None = None
    ) -> Loader:
        take = np.arange(batch_size) if take is None else take
        way = CentrePass(rows, batch_size, take, self.settings.size, self.settings.resize)
        return Loader(self, way, 0, -(-len(rows) // batch_size), len(take), workers)


class Batch(NamedTuple):
    """Images uint8 ``[B, size, size, 3]`` and labels int32 ``[B]``; -1 means: leave out."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunks:
    """Parts of batches by position: what the workers of grain go through."""

    source: Source
    settings: StreamSettings
    way: Pass
    start: int
    steps: int
    parts: int

    def __len__(self) -> int:
        return self.steps * self.parts

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """Images, labels and, as 1, which of them could not be read."""
        step, part = divmod(position, self.parts)
        rows = self.way.rows(self.start + step)[part * _CHUNK : (part + 1) * _CHUNK]
        size = self.settings.size
        images = np.zeros((len(rows), size, size, 3), np.uint8)
        labels = np.full(len(rows), -1, np.int32)
        failed = np.zeros(len(rows), np.uint8)
        for i, row in enumerate(rows):
            try:
                images[i], labels[i] = self.load(self.start + step, int(row))
            except Exception:  # a damaged image may raise nearly anything; `Loader` asks again
                failed[i] = 1
        return {"images": images, "labels": labels, "failed": failed}

    def load(self, step: int, row: int) -> tuple[np.ndarray, int]:
        """One crop and its label."""
        data, label = self.source.read(row)
        box, mirrored = self.way.view(step, row)
        s = self.settings
        crop = read_crop(data, box, s.size, s.decoder, s.obeys)
        return (crop[:, ::-1] if mirrored else crop), label


class Loader:
    """Goes through batches once; decodes ahead. `close` ends the workers.

    Attributes:
      unreadable: why an image could not be read, by its name, of those met so far.
    """

    def __init__(
        self, data: Streamed, way: Pass, start: int, stop: int, batch_size: int, workers: int
    ) -> None:
        """Nothing is read before the first batch is asked for.

        Raises:
          UserError: workers are wanted and cannot import the main script.
        """
        check_main(workers)
        self.unreadable: dict[str, str] = {}
        self._data, self._way, self._batch_size = data, way, batch_size
        self._step, self._stop = start, stop
        self._parts = -(-batch_size // _CHUNK)
        self._chunks = _Chunks(data.source, data.settings, way, start, stop - start, self._parts)
        self._workers = workers
        self._iterator: Any = None

    def __iter__(self) -> Iterator[Batch]:
        """Itself; the workers end with the last batch."""
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          UserError: images cannot be read, or a worker died.
        """
        if self._step >= self._stop:
            self.close()
            raise StopIteration
        if self._iterator is None:
            size = self._data.settings.size
            self._iterator = open_iterator(self._chunks, self._workers, size**2 * 3 * _CHUNK)
        try:
            parts = [next(self._iterator) for _ in range(self._parts)]
        except RuntimeError as error:
            died = why_died(error, self._workers)
            if died is None:
                raise
            raise died from None
        images, labels, failed = (
            np.concatenate([part[key] for part in parts]) for key in ("images", "labels", "failed")
        )
        self._mend(images, labels, np.flatnonzero(failed))
        missing = self._batch_size - len(images)
        if missing:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
            labels = np.concatenate([labels, np.full(missing, -1, np.int32)])
        self._step += 1
        return Batch(images, labels)

    def close(self) -> None:
        """Ends the workers. No further batches can be asked for."""
        self._step = self._stop
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
            gc.collect()  # grain's iterators are in cycles, and hold chunks in shared memory

    def _mend(self, images: np.ndarray, labels: np.ndarray, failed: np.ndarray) -> None:
        """Tries again what a worker could not read, then takes others instead, or raises."""
        rows = self._way.rows(self._step)
        lost = {}
        for i in failed:
            row: int | None = int(rows[i])
            for attempt in range(_SPARES):
                assert row is not None
                try:
                    images[i], labels[i] = self._chunks.load(self._step, row)
                    break
                except Exception as error:
                    lost[self._data.source.name(row)] = reason_of(error)
                row = self._way.instead(self._step, int(rows[i]), attempt)
                if row is None or not self._data.settings.skip_unreadable:
                    break
            else:
                raise UserError(f"{_SPARES} images in a row cannot be read: {_told(lost)}")
        if lost and not self._data.settings.skip_unreadable:
            raise UserError(
                f"{len(lost)} of the {len(rows)} images of a batch cannot be read: {_told(lost)}; "
                "mend them, or set config.stream.skip_unreadable=True"
            )
        for name, reason in lost.items():
            if name not in self.unreadable and len(self.unreadable) < _SHOWN:
                _log.warning("unreadable image left out: %s (%s)", one_line(name), reason)
            self.unreadable[name] = reason


def _told(lost: dict[str, str]) -> str:
    return listed([f"{name} ({reason})" for name, reason in lost.items()])
