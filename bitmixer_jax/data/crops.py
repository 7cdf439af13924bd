"""From the bytes of an image file to the square crop that a network takes.

Two decoders, measured in experiments/results/decoders: ``pil`` needs nothing but Pillow; ``turbo``
(simplejpeg and OpenCV's resizing) is faster. What simplejpeg refuses (PNG files named .JPEG, CMYK,
damaged files), Pillow reads or refuses: both decoders accept the same files. Orientation tags are
not obeyed, as is the custom for ImageNet.
"""

import functools
import importlib
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np

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
    data: bytes, box_of: Callable[[int, int], Box], size: int, decoder: str = "pil"
) -> np.ndarray:
    """Decodes an image file and resizes a part of it: uint8 ``[size, size, 3]``.

    Args:
      data: the file; greyscale and CMYK become RGB.
      box_of: gives the part, from the width and height of the image.
      decoder: one of DECODERS.

    Raises:
      Exception: of whatever kind, where the file is damaged or no image.
    """
    import PIL.Image

    if decoder == "turbo":
        return _resized(_turbo(data), box_of, size)
    with PIL.Image.open(io.BytesIO(data)) as image:
        left, upper, width, height = box_of(*image.size)
        part = (left, upper, left + width, upper + height)
        bilinear = PIL.Image.Resampling.BILINEAR  # Pillow widens it when shrinking: no aliasing
        return np.array(image.convert("RGB").resize((size, size), bilinear, box=part))


def _turbo(data: bytes) -> np.ndarray:
    import PIL.Image

    simplejpeg = importlib.import_module("simplejpeg")
    try:
        # Strict: what is merely odd goes to Pillow, too, which decides for both decoders.
        return simplejpeg.decode_jpeg(data)
    except ValueError:
        with PIL.Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))


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


def check_decoder(decoder: str) -> None:
    """Says before the work that a decoder is unknown or not installed. Raises UserError."""
    if decoder not in DECODERS:
        allowed = ", ".join(DECODERS)
        raise UserError(f"config.stream.decoder = {decoder!r}; choose from {allowed}")
    for module, package in _NEEDS.items() if decoder == "turbo" else ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"config.stream.decoder = 'turbo' needs {package} ({error}): pip install "
                f"{' '.join(_NEEDS.values())}, or set config.stream.decoder to 'pil'"
            ) from None
