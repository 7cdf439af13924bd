"""Image sets too large for memory: worker processes decode them while the network trains.

Which images a batch takes, how each is cropped and whether it is mirrored depend on (seed, epoch,
image) only. So the batches are the same for any number of workers and hosts, and from any step on.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from bitmixer_jax.data.crops import read_crop
from bitmixer_jax.data.in_memory import Dataset
from bitmixer_jax.data.samplers import EvaluationSampler, Order, Sampler, TrainingSampler
from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.data.workers import check_main, open_iterator, why_died
from bitmixer_jax.errors import UserError, listed, one_line, reason

_log = logging.getLogger(__name__)

# Per-channel statistics of ImageNet's training images, in units of 0..255. They normalise every
# streamed set: to find its own would take a pass over millions of images and change little.
MEAN = np.asarray((0.485, 0.456, 0.406), np.float32) * 255
STD = np.asarray((0.229, 0.224, 0.225), np.float32) * 255

_CHUNK = 32  # images that a worker hands over at once: few, so that all share in each batch
_MAX_ATTEMPTS = 100  # images that are tried before unreadable ones are an error
_MAX_WARNINGS = 10  # unreadable images that the log names


class Source(Protocol):
    """The encoded images of a split, by index. Every worker gets a copy, so it must be small."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the file of an image, and its label. May raise any exception."""

    def name(self, index: int) -> str:
        """Returns what to call an image in messages."""


@dataclasses.dataclass(frozen=True, eq=False)
class StreamingDataset:
    """One split of a labelled image set, or a slice of it, whose images are read when needed.

    `open_split` makes one from a folder of images, or from a set of tensorflow-datasets.

    Attributes:
      name, split, classes: as of `Dataset`.
      source: the encoded images.
      settings: how they are read.
      workers: number of processes that decode. With 0, threads of this process decode; with -1,
        there is one process for each CPU core, at most 32. The batches do not depend on it.
      mean, std: ``[3]`` float32 for normalisation, in units of 0..255.

    Raises:
      UserError: the decoder is not installed.

    Example:
      >>> import pathlib, tempfile
      >>> import PIL.Image
      >>> from bitmixer_jax.data import Order, StreamSettings, open_split
      >>> small = StreamSettings(size=32, resize=36)
      >>> with tempfile.TemporaryDirectory() as root:
      ...     pathlib.Path(root, "train/cat").mkdir(parents=True)
      ...     PIL.Image.new("RGB", (64, 48)).save(pathlib.Path(root, "train/cat/1.png"))
      ...     data = open_split(f"folder:{root}", "train", stream=small, workers=0)
      ...     order = Order(seed=0, examples=len(data), batch_size=1)
      ...     for images, labels in data.training(order, start=0, stop=2, flip=True):
      ...         print(images.dtype, images.shape, labels.tolist())
      uint8 (1, 32, 32, 3) [0]
      uint8 (1, 32, 32, 3) [0]
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
        """Checks that the decoder is installed."""
        self.settings.check_installed()
        # Resolves "auto" now: later, `dataclasses.replace` may change the name that decides it.
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
        self, order: Order, start: int, stop: int, flip: bool, local: np.ndarray | None = None
    ) -> Loader:
        """Returns the batches of the steps ``start .. stop - 1``.

        Args:
          order: which images each step takes.
          start, stop: the steps.
          flip: mirror half of the images.
          local: which elements of the global batch this host reads, int ``[b]``; None: all.
        """
        local = np.arange(order.batch_size) if local is None else np.asarray(local)
        sampler = TrainingSampler(order, local, flip, self.settings.min_area)
        return Loader(self, sampler, range(start, stop), len(local), self.workers)

    def evaluation(self, batch_size: int, local: np.ndarray | None = None) -> Loader:
        """Returns all images in batches. Black images of label -1 fill the last one.

        Args:
          batch_size: images in a batch, over all hosts.
          local: which elements of a batch this host reads, int ``[b]``, rising; None: all.
        """
        return self._centred(np.arange(len(self)), batch_size, self.workers, local)

    def subset(self, rows: np.ndarray) -> Dataset:
        """Returns images cropped at the centre, in memory, without unreadable ones.

        Args:
          rows: indices of the images, int ``[M]``.

        Raises:
          UserError: an image cannot be read and `skip_unreadable` is false.
        """
        loader = self._centred(np.asarray(rows), _CHUNK, workers=0)
        images, labels = (np.concatenate(x) for x in zip(*loader, strict=True))
        kept = labels >= 0
        fields = self.name, self.split, images[kept], labels[kept], self.classes
        return Dataset(*fields, self.mean, self.std)

    def _centred(
        self, rows: np.ndarray, batch_size: int, workers: int, local: np.ndarray | None = None
    ) -> Loader:
        local = np.arange(batch_size) if local is None else local
        size, resize = self.settings.size, self.settings.resize
        sampler = EvaluationSampler(rows, batch_size, local, size, resize)
        steps = range(-(-len(rows) // batch_size))
        return Loader(self, sampler, steps, len(local), workers)


class Batch(NamedTuple):
    """Images uint8 ``[B, size, size, 3]`` and labels int32 ``[B]``; label -1 marks padding."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunks:
    """Parts of batches, by index: the items that the workers make."""

    source: Source
    settings: StreamSettings
    sampler: Sampler
    steps: range
    parts: int

    def __len__(self) -> int:
        return len(self.steps) * self.parts

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns images, labels and, as 1, which images could not be read."""
        number, part = divmod(index, self.parts)
        step = self.steps[number]
        rows = self.sampler.rows(step)[part * _CHUNK : (part + 1) * _CHUNK]
        size = self.settings.size
        images = np.zeros((len(rows), size, size, 3), np.uint8)
        labels = np.full(len(rows), -1, np.int32)
        failed = np.zeros(len(rows), np.uint8)
        for i, row in enumerate(rows):
            try:
                images[i], labels[i] = self.load(step, int(row))
            except Exception:  # a damaged image raises nearly anything; `Loader` tries again
                failed[i] = 1
        return {"images": images, "labels": labels, "failed": failed}

    def load(self, step: int, row: int) -> tuple[np.ndarray, int]:
        """Returns the crop of an image, and its label."""
        data, label = self.source.read(row)
        box, mirrored = self.sampler.crop(step, row)
        s = self.settings
        crop = read_crop(data, box, s.size, s.decoder, s.applies_orientation)
        return (crop[:, ::-1] if mirrored else crop), label


class Loader:
    """Iterates over batches once. Workers decode ahead; `close` ends them.

    Attributes:
      unreadable: why an image could not be read, by its name, for all images so far.
    """

    def __init__(
        self, data: StreamingDataset, sampler: Sampler, steps: range, batch_size: int, workers: int
    ) -> None:
        """Prepares the loader; reads nothing before the first batch.

        Raises:
          UserError: the workers cannot import the main script.
        """
        check_main(workers)
        self.unreadable: dict[str, str] = {}
        self._data, self._sampler, self._batch_size = data, sampler, batch_size
        self._step, self._stop = steps.start, steps.stop
        self._parts = -(-batch_size // _CHUNK)
        self._chunks = _Chunks(data.source, data.settings, sampler, steps, self._parts)
        self._workers = workers
        self._iterator: Any = None

    def __iter__(self) -> Iterator[Batch]:
        """Returns itself. The workers end with the last batch."""
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

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
        self._retry_failed(images, labels, np.flatnonzero(failed))
        missing = self._batch_size - len(images)
        if missing:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
            labels = np.concatenate([labels, np.full(missing, -1, np.int32)])
        self._step += 1
        return Batch(images, labels)

    def close(self) -> None:
        """Ends the workers and the iteration."""
        self._step = self._stop
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
            gc.collect()  # grain's iterators are in cycles, and hold chunks in shared memory

    def _retry_failed(self, images: np.ndarray, labels: np.ndarray, failed: np.ndarray) -> None:
        """Reads the images that a worker could not read, or replacements, or raises UserError."""
        rows = self._sampler.rows(self._step)
        skip = self._data.settings.skip_unreadable
        unreadable = {}
        for i in failed:
            row: int | None = int(rows[i])
            for attempt in range(_MAX_ATTEMPTS):
                assert row is not None
                try:
                    images[i], labels[i] = self._chunks.load(self._step, row)
                    break
                except Exception as error:
                    unreadable[self._data.source.name(row)] = reason(error)
                row = self._sampler.replacement(self._step, int(rows[i]), attempt)
                if row is None or not skip:
                    break
            else:
                names = _with_reasons(unreadable)
                raise UserError(
                    f"{_MAX_ATTEMPTS} images in a row cannot be read: {names}", "bad-image"
                )
        if unreadable and not skip:
            raise UserError(
                f"{len(unreadable)} of the {len(rows)} images of a batch cannot be read: "
                f"{_with_reasons(unreadable)}; mend them, or set "
                "config.stream.skip_unreadable=True",
                "bad-image",
            )
        for name, why in unreadable.items():
            if name not in self.unreadable and len(self.unreadable) < _MAX_WARNINGS:
                _log.warning("unreadable image left out: %s (%s)", one_line(name), why)
            self.unreadable[name] = why


def _with_reasons(unreadable: dict[str, str]) -> str:
    return listed([f"{name} ({why})" for name, why in unreadable.items()])
