"""Image files of any size as the uint8 batches that a network takes."""

import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MODES = {1: "L", 3: "RGB"}


def find_images(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """The image files in a folder, by their suffix, sorted; hidden files and sub-folders left out.

    Raises:
      UserError: there is no such folder, or no image in it.
    """
    folder = pathlib.Path(folder)
    try:
        found = sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()
        )
    except OSError as error:
        raise UserError(f"{folder}: not a folder of images ({error.strerror})") from None
    if not found:
        raise UserError(f"{folder}: no images there; they end with {', '.join(SUFFIXES)}")
    return found


def read_images(
    paths: Iterable[str | pathlib.Path], image_shape: tuple[int, int, int]
) -> np.ndarray:
    """Reads image files, each scaled to cover ``(H, W)`` and cropped at its centre.

    Orientation tags of cameras are obeyed; transparency is dropped; of an animation, the first
    frame counts. Images of the right size keep their pixels.

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
    images = [_read(pathlib.Path(path), image_shape) for path in paths]
    return np.stack(images) if images else np.zeros((0, *image_shape), np.uint8)


def _read(path: pathlib.Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    import PIL.Image
    import PIL.ImageOps

    height, width, channels = image_shape
    try:
        with PIL.Image.open(path) as file:
            image = _upright_8bit(file).convert(_MODES[channels])
        fitted = PIL.ImageOps.fit(image, (width, height), PIL.Image.Resampling.BICUBIC)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except Exception as error:  # a damaged image may raise nearly anything
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{path}: not an image that can be read ({lines[0]})") from None
    return np.asarray(fitted, np.uint8).reshape(image_shape)


def _upright_8bit(image: Any) -> Any:
    """The image as a viewer would show it, with 8 bits per channel."""
    import PIL.Image
    import PIL.ImageOps

    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits per channel")
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would clip all but the darkest
        return PIL.Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        return image.convert("RGBA")
    return image
