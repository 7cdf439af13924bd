"""Decodes image files and crops them to the square that a network takes.

There are two decoders. ``pil`` needs nothing but Pillow. ``turbo`` uses simplejpeg, and OpenCV to
resize; it is faster (measured in experiments/results/decoders). Both read the same files.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bitmixer_jax.data.decode import decode, decode_fast
from bitmixer_jax.errors import UserError

DECODERS = ("pil", "turbo")
_NEEDS = {"simplejpeg": "simplejpeg", "cv2": "opencv-python-headless"}
_MAX_DRAWS = 10
_ASPECT = (3 / 4, 4 / 3)

Box = tuple[int, int, int, int]  # left, upper, width, height


def random_box(rng: np.random.Generator, width: int, height: int, min_area: float) -> Box:
    """Draws a random crop, as Inception training does.

    The area is uniform in ``min_area .. 1`` of that of the image. The logarithm of the aspect ratio
    (width over height) is uniform between those of 3/4 and 4/3. If ten draws do not fit into the
    image, the crop is the largest one at its centre with such an aspect ratio.
    """
    for _ in range(_MAX_DRAWS):
        area = rng.uniform(min_area, 1) * width * height
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers((width - w + 1, height - h + 1))
            return int(left), int(upper), w, h
    w = max(1, min(width, round(height * _ASPECT[1])))
    h = max(1, min(height, round(width / _ASPECT[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def centre_box(width: int, height: int, size: int, resize: int) -> Box:
    """Returns the part of an image that a centre crop takes after resizing.

    Resizing makes the shorter side ``resize`` pixels long; the crop has ``size x size`` of them.
    `read_crop` cuts this part out first and resizes once. That gives the same pixels as resizing
    first, up to the rounding of sides to whole pixels.
    """
    side = max(1, round(min(width, height) * size / resize))
    return (width - side) // 2, (height - side) // 2, side, side


def read_crop(
    data: bytes,
    box_of: Callable[[int, int], Box],
    size: int,
    decoder: str = "pil",
    apply_orientation: bool = True,
) -> np.ndarray:
    """Decodes an image file, cuts out a part, and resizes it.

    Args:
      data: the file; greyscale and CMYK become RGB.
      box_of: function from (width, height) of the image to the part.
      size: side of the result, in pixels.
      decoder: one of DECODERS.
      apply_orientation: turn the image as its EXIF tag says.

    Returns:
      uint8 ``[size, size, 3]``.

    Raises:
      Exception: of any type, if the file is damaged or no image.
    """
    if decoder == "turbo":
        return _resized(decode_fast(data, apply_orientation), box_of, size)
    from PIL.Image import Resampling

    image = decode(data, apply_orientation=apply_orientation)
    left, upper, width, height = box_of(*image.size)
    part = (left, upper, left + width, upper + height)
    # Pillow widens the filter when it shrinks an image, so there is no aliasing.
    return np.array(image.resize((size, size), Resampling.BILINEAR, box=part))


def _resized(pixels: np.ndarray, box_of: Callable[[int, int], Box], size: int) -> np.ndarray:
    cv2 = _opencv()
    left, upper, width, height = box_of(pixels.shape[1], pixels.shape[0])
    part = pixels[upper : upper + height, left : left + width]
    shrinks = min(width, height) > size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(part, (size, size), interpolation=interpolation)


@functools.cache
def _opencv() -> Any:
    cv2: Any = importlib.import_module("cv2")
    cv2.setNumThreads(1)  # there is a process or thread for each core already
    return cv2


def check_installed(decoder: str) -> None:
    """Raises UserError if a decoder is not installed."""
    for module, package in _NEEDS.items() if decoder == "turbo" else ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"config.stream.decoder = 'turbo' needs {package} ({error}): pip install "
                f"{' '.join(_NEEDS.values())}, or set config.stream.decoder to 'pil'",
                "not-installed",
            ) from None
