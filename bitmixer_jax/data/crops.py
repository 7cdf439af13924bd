"""From the bytes of an image file to the square crop that a network takes.

Two decoders, measured in experiments/results/decoders: ``pil`` needs nothing but Pillow; ``turbo``
(simplejpeg and OpenCV's resizing) is faster. Both read the same files (`decode`).
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
_TRIES = 10
_ASPECT = (3 / 4, 4 / 3)

Box = tuple[int, int, int, int]  # left, upper, width, height


def random_box(rng: np.random.Generator, width: int, height: int, min_area: float) -> Box:
    """A random part of an image: ``min_area`` to all of its area, of aspect 3:4 to 4:3.

    Where ten draws do not fit into the image, the largest part at its centre with such an aspect.
    """
    for _ in range(_TRIES):
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
    """What a crop of ``size`` takes of an image whose shorter side becomes ``resize`` pixels.

    Cutting first and resizing once gives what resizing first and cutting then would, up to the
    rounding of sides to whole pixels.
    """
    side = max(1, round(min(width, height) * size / resize))
    return (width - side) // 2, (height - side) // 2, side, side


def read_crop(
    data: bytes,
    box_of: Callable[[int, int], Box],
    size: int,
    decoder: str = "pil",
    obey: bool = True,
) -> np.ndarray:
    """Decodes an image file and resizes a part of it: uint8 ``[size, size, 3]``.

    Args:
      data: the file; greyscale and CMYK become RGB.
      box_of: gives the part, from the width and height of the image.
      decoder: one of DECODERS.
      obey: turn the image as its orientation tag says.

    Raises:
      Exception: of whatever kind, where the file is damaged or no image.
    """
    if decoder == "turbo":
        return _resized(decode_fast(data, obey), box_of, size)
    from PIL.Image import Resampling

    image = decode(data, obey=obey)
    left, upper, width, height = box_of(*image.size)
    part = (left, upper, left + width, upper + height)
    # Pillow widens the filter when shrinking: no aliasing.
    return np.array(image.resize((size, size), Resampling.BILINEAR, box=part))


def _resized(pixels: np.ndarray, box_of: Callable[[int, int], Box], size: int) -> np.ndarray:
    cv2 = _opencv()
    left, upper, width, height = box_of(pixels.shape[1], pixels.shape[0])
    part = pixels[upper : upper + height, left : left + width]
    way = cv2.INTER_AREA if min(width, height) > size else cv2.INTER_LINEAR
    return cv2.resize(part, (size, size), interpolation=way)


@functools.cache
def _opencv() -> Any:
    cv2: Any = importlib.import_module("cv2")
    cv2.setNumThreads(1)  # there is a process or thread for each core already
    return cv2


def check_installed(decoder: str) -> None:
    """Says before the work that a decoder is not installed. Raises UserError."""
    for module, package in _NEEDS.items() if decoder == "turbo" else ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"config.stream.decoder = 'turbo' needs {package} ({error}): pip install "
                f"{' '.join(_NEEDS.values())}, or set config.stream.decoder to 'pil'"
            ) from None
