"""Image files of any size as the uint8 batches that a network takes."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from bitmixer_jax.data._names import one_line, reason_of
from bitmixer_jax.data.crops import centre_box, read_crop
from bitmixer_jax.data.decode import MOST_BYTES, SUFFIXES, decode
from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.data.streams import MEAN
from bitmixer_jax.errors import UserError
from bitmixer_jax.files import read_bytes, user_path

__all__ = ["SUFFIXES", "ImageReader", "find_images", "read_images"]

_MODES = {1: "L", 3: "RGB"}
Shape = tuple[int, int, int]


def find_images(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """The image files in a folder, by their suffix, sorted.

    Hidden files, sub-folders, pipes and devices are left out.

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
        where = one_line(folder)
        raise UserError(f"{where}: not a folder of images ({error.strerror})") from None
    if not found:
        suffixes = ", ".join(SUFFIXES)
        raise UserError(f"{one_line(folder)}: no images there; they end with {suffixes}")
    return found


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """How image files become what a network takes: as evaluation read them.

    Attributes:
      image_shape: ``(H, W, C)`` of the network.
      stream: how the streamed images of its data set are read; None: its data set is in memory,
        and files are read as `read_images` does.
    """

    image_shape: Shape
    stream: StreamSettings | None = None

    def read(self, paths: Iterable[str | pathlib.Path]) -> np.ndarray:
        """Reads image files.

        Returns:
          uint8 ``[N, H, W, C]``.

        Raises:
          UserError: as `read_images`; or the decoder is not installed.
        """
        if self.stream is None:
            return read_images(paths, self.image_shape)
        settings = self.stream
        settings.check_installed()
        box = functools.partial(centre_box, size=settings.size, resize=settings.resize)

        def centre(data: bytes) -> np.ndarray:
            return read_crop(data, box, settings.size, settings.decoder, settings.obeys)

        return _read_all(paths, self.image_shape, centre)

    def to_json(self) -> dict[str, Any]:
        """What a file keeps of it; empty for sets in memory."""
        if self.stream is None:
            return {}
        return {
            "size": self.stream.size,
            "resize": self.stream.resize,
            "decoder": self.stream.decoder,
            "orientation": self.stream.orientation,
        }

    @classmethod
    def from_json(cls, about: Any, image_shape: Shape, where: str) -> ImageReader:
        """Reads what `to_json` wrote; None and {} are sets in memory.

        Raises:
          UserError: it is damaged; ``where`` names the file.
        """
        if about is None or about == {}:
            return cls(image_shape)
        try:
            if not isinstance(about, Mapping):
                raise ValueError("not an object")
            size, resize, decoder, orientation = (
                about[key] for key in ("size", "resize", "decoder", "orientation")
            )
            if type(size) is not int or type(resize) is not int or resize > 2**20:
                raise ValueError("size and resize are not whole numbers up to 2^20")
            if image_shape != (size, size, 3):
                raise ValueError(f"size {size} is not that of images {list(image_shape)}")
            settings = StreamSettings(
                size=size, resize=resize, decoder=decoder, orientation=orientation
            )
        except KeyError as error:
            raise UserError(f'{where}: damaged: its "images" have no {error}') from None
        except (ValueError, TypeError) as error:
            raise UserError(f'{where}: damaged: its "images": {error}') from None
        return cls(image_shape, settings)


def reader_of_run(
    dataset: str, image_shape: Shape, mean: Any, settings: StreamSettings
) -> ImageReader:
    """The reader of a run, by what its workdir says.

    Args:
      dataset: its name.
      mean: of the channels; that of every streamed set is `streams.MEAN`, and of no other.
      settings: its ``config.stream``.
    """
    streamed = image_shape == (settings.size, settings.size, 3) and np.array_equal(
        np.asarray(mean, np.float32), MEAN
    )
    return ImageReader(image_shape, settings.for_dataset(dataset) if streamed else None)


def read_images(paths: Iterable[str | pathlib.Path], image_shape: Shape) -> np.ndarray:
    """Reads image files, each scaled to cover ``(H, W)`` and cropped at its centre.

    Which formats, depths and sizes are read: `bitmixer_jax.data.decode`. Orientation tags of
    cameras are obeyed. Images of the right size keep their pixels.

    Args:
      paths: of N files.
      image_shape: ``(H, W, C)``; C is 1 (grey) or 3 (RGB).

    Returns:
      uint8 ``[N, H, W, C]``.

    Raises:
      UserError: C is neither 1 nor 3, or a file is missing, no image, damaged, or too large.
    """
    if image_shape[2] not in _MODES:
        raise UserError(f"images of {image_shape[2]} channels: files give 1 (grey) or 3 (RGB)")

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
    place = user_path(path)
    try:
        return read(read_bytes(place, MOST_BYTES))
    except FileNotFoundError:
        raise UserError(f"{one_line(path)}: no such image file") from None
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # a damaged image may raise nearly anything
        reason = reason_of(error)
        raise UserError(f"{one_line(path)}: not an image that can be read ({reason})") from None
