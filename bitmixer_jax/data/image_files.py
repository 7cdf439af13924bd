"""Reads image files of any size into the uint8 batches that a network takes."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from bitmixer_jax.data.crops import centre_box, read_crop
from bitmixer_jax.data.decode import MAX_IMAGE_BYTES, SUFFIXES, decode
from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.data.streams import MEAN
from bitmixer_jax.errors import UserError, one_line, reason
from bitmixer_jax.files import read_bytes, user_path

__all__ = ["SUFFIXES", "ImageReader", "find_images", "read_images"]

_MODES = {1: "L", 3: "RGB"}
_STORED = ("size", "resize", "decoder", "orientation")  # settings that exported files store
Shape = tuple[int, int, int]


def find_images(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns the image files in a folder, sorted.

    A file is an image if its suffix says so. Hidden files, sub-folders, pipes and devices are left
    out.

    Raises:
      UserError: there is no such folder, or no image in it.
    """
    folder = user_path(folder)
    try:
        found = sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()
        )
    except OSError as error:
        message = f"{one_line(folder)}: not a folder of images ({reason(error)})"
        raise UserError(message, "bad-path") from None
    if not found:
        suffixes = ", ".join(SUFFIXES)
        raise UserError(f"{one_line(folder)}: no images there; they end with {suffixes}", "no-data")
    return found


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Reads image files as evaluation reads the data set of a network.

    Attributes:
      image_shape: ``(H, W, C)`` of the network's images.
      stream: how the data set of the network is streamed. None: that data set is in memory, and
        files are read as `read_images` reads them.

    Example:
      >>> import pathlib, tempfile
      >>> import PIL.Image
      >>> from bitmixer_jax.data import ImageReader, StreamSettings
      >>> reader = ImageReader((32, 32, 3), StreamSettings(size=32, resize=36))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "cat.png")
      ...     PIL.Image.new("RGB", (64, 48)).save(path)
      ...     reader.read([path]).shape
      (1, 32, 32, 3)
    """

    image_shape: Shape
    stream: StreamSettings | None = None

    def read(self, paths: Iterable[str | pathlib.Path]) -> np.ndarray:
        """Reads N image files.

        Returns:
          uint8 ``[N, H, W, C]``.

        Raises:
          UserError: as `read_images`, or the decoder is not installed.
        """
        if self.stream is None:
            return read_images(paths, self.image_shape)
        settings = self.stream
        settings.check_installed()
        box = functools.partial(centre_box, size=settings.size, resize=settings.resize)

        def centre(data: bytes) -> np.ndarray:
            return read_crop(
                data, box, settings.size, settings.decoder, settings.applies_orientation
            )

        return _read_all(paths, self.image_shape, centre)

    def to_json(self) -> dict[str, Any]:
        """Returns what an exported file stores; {} for data sets in memory."""
        if self.stream is None:
            return {}
        return {key: getattr(self.stream, key) for key in _STORED}

    @classmethod
    def from_json(cls, about: Any, image_shape: Shape, where: str) -> ImageReader:
        """Returns the reader of which `to_json` gave ``about``; None means {}.

        Raises:
          UserError: ``about`` is damaged; ``where`` names its file.
        """
        if about is None or about == {}:
            return cls(image_shape)
        try:
            if not isinstance(about, Mapping):
                raise ValueError("not an object")
            stored = {key: about[key] for key in _STORED}
            size, resize = stored["size"], stored["resize"]
            if type(size) is not int or type(resize) is not int or resize > 2**20:
                raise ValueError("size and resize are not whole numbers up to 2^20")
            if image_shape != (size, size, 3):
                raise ValueError(f"size {size} is not that of images {list(image_shape)}")
            settings = StreamSettings(**stored)
        except KeyError as error:
            raise UserError(f'{where}: damaged: its "images" have no {error}', "damaged") from None
        except (ValueError, TypeError) as error:
            raise UserError(f'{where}: damaged: its "images": {error}', "damaged") from None
        return cls(image_shape, settings)


def reader_of_run(
    dataset: str, image_shape: Shape, mean: Any, settings: StreamSettings
) -> ImageReader:
    """Returns the reader of a training run.

    Args:
      dataset: name of its data set.
      image_shape: ``(H, W, C)`` of its images.
      mean: mean of its channels. StreamingDataset data sets have `streams.MEAN`, and no others do.
      settings: its ``config.stream``.
    """
    streamed = image_shape == (settings.size, settings.size, 3) and np.array_equal(
        np.asarray(mean, np.float32), MEAN
    )
    return ImageReader(image_shape, settings.for_dataset(dataset) if streamed else None)


def read_images(paths: Iterable[str | pathlib.Path], image_shape: Shape) -> np.ndarray:
    """Reads N image files, each scaled to cover ``(H, W)`` and cropped at its centre.

    `bitmixer_jax.data.decode` lists the formats, depths and sizes. Images are turned as their EXIF
    tag says. Images of the right size keep their pixels.

    Args:
      paths: the files.
      image_shape: ``(H, W, C)``; C is 1 (grey) or 3 (RGB).

    Returns:
      uint8 ``[N, H, W, C]``.

    Raises:
      UserError: C is neither 1 nor 3, or a file is missing, no image, damaged, or too large.
    """
    if image_shape[2] not in _MODES:
        raise UserError(
            f"images of {image_shape[2]} channels: files give 1 (grey) or 3 (RGB)", "bad-value"
        )

    def fitted(data: bytes) -> np.ndarray:
        import PIL.Image
        import PIL.ImageOps

        height, width, channels = image_shape
        image = decode(data, _MODES[channels])
        bicubic = PIL.Image.Resampling.BICUBIC
        return np.asarray(PIL.ImageOps.fit(image, (width, height), bicubic), np.uint8)

    return _read_all(paths, image_shape, fitted)


def _read_all(
    paths: Iterable[str | pathlib.Path], image_shape: Shape, read: Callable[[bytes], np.ndarray]
) -> np.ndarray:
    images = [_read(path, read).reshape(image_shape) for path in paths]
    return np.stack(images) if images else np.zeros((0, *image_shape), np.uint8)


def _read(path: str | pathlib.Path, read: Callable[[bytes], np.ndarray]) -> np.ndarray:
    file = user_path(path)
    try:
        return read(read_bytes(file, MAX_IMAGE_BYTES))
    except FileNotFoundError:
        raise UserError(f"{one_line(path)}: no such image file", "no-such-file") from None
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # a damaged image may raise nearly anything
        message = f"{one_line(path)}: not an image that can be read ({reason(error)})"
        raise UserError(message, "bad-image") from None
