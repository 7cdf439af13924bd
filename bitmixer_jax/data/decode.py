"""Decodes image files to pixels of 8 bits. All readers of images use these rules.

* Formats: only those of FORMATS, whatever the name of the file. Other formats of Pillow may start
  programs (EPS starts Ghostscript).
* Size: at most MAX_PIXELS, read from the header before a pixel is decoded.
* Depth: of 16 bits a channel the upper 8 are taken (``v >> 8``), so 65535 becomes 255.
  Floating-point pixels and integers beyond 16 bits have no defined range and are refused.
* Transparency is dropped. Of an animation, the first frame is taken.
* Orientation: the caller says whether to turn the image as its EXIF tag says. (Pillow always turns
  TIFF files.)
"""

import functools
import importlib
import io
from typing import Any

import numpy as np

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 2**26  # 8,192 x 8,192 pixels take 0.4 to 1.3 GB while they are decoded
MAX_IMAGE_BYTES = 2**29  # of a file

_ORIENTATION = 0x0112  # the tag's number in EXIF
_DEEP = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2"}
_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}
_WHITE_IS_ZERO, _BITS = 262, 258  # tags of TIFF: photometric interpretation, bits of a sample


def decode(data: bytes, mode: str = "RGB", apply_orientation: bool = True) -> Any:
    """Decodes an image file.

    Args:
      data: the file.
      mode: "RGB" or "L".
      apply_orientation: turn the image as its EXIF tag says.

    Returns:
      A Pillow image of that mode.

    Raises:
      Exception: of any type, if the file is damaged, no image, or too large.
    """
    import PIL.Image

    _check_webp(data)
    try:
        opened = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.UnidentifiedImageError:  # its text holds an address in memory
        message = f"none of {', '.join(FORMATS)}, or its header is damaged"
        raise ValueError(message) from None
    with opened as image:
        _check_size(*image.size)
        image.load()
        turn = _turn(image) if apply_orientation else None
        pixels = _eight_bits(image)
        if "transparency" in image.info:  # Pillow warns unless RGBA comes in between
            pixels = pixels.convert("RGBA")
        pixels = pixels.convert(_PREMULTIPLIED.get(pixels.mode, pixels.mode)).convert(mode)
    return pixels if turn is None else pixels.transpose(turn)


def decode_fast(data: bytes, apply_orientation: bool = True) -> np.ndarray:
    """Decodes an image file by simplejpeg, or by `decode` if simplejpeg refuses it.

    So both functions accept the same files. simplejpeg refuses other formats, CMYK and damage.

    Args:
      data: the file.
      apply_orientation: turn the image as its EXIF tag says.

    Returns:
      uint8 ``[H, W, 3]``.

    Raises:
      Exception: as `decode`.
    """
    simplejpeg = importlib.import_module("simplejpeg")
    slowly = functools.partial(decode, data, apply_orientation=apply_orientation)
    # To parse the tags takes as long as to decode a small image, so look first if there are any.
    tagged = data.startswith(b"\xff\xd8") and (b"Exif" in data or b"rientation" in data)
    if apply_orientation and tagged:
        return np.asarray(slowly())
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return np.asarray(slowly())
    _check_size(width, height)
    try:
        # In its strict mode, which refuses odd files: Pillow decides whether those can be read.
        return np.asarray(simplejpeg.decode_jpeg(data))
    except ValueError:
        return np.asarray(slowly())


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"{width} x {height} pixels: it is empty")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels; at most {MAX_PIXELS:,} are read, make it smaller"
        )


def _check_webp(data: bytes) -> None:
    """Checks the size that a WebP file states, because Pillow allocates frames when it opens it."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        width, height = (1 + int.from_bytes(data[i : i + 3], "little") for i in (24, 27))
    elif kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 " and len(data) >= 30:
        width, height = (int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (26, 28))
    else:
        raise ValueError("a damaged WebP file")
    _check_size(width, height)


def _turn(image: Any) -> Any:
    """Returns how to turn an image upright, or None. Damaged tags count as none."""
    from PIL.Image import Transpose

    try:
        tag = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged tags raise nearly anything, but the pixels may be good
        return None
    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(tag if isinstance(tag, int) else 1)


def _eight_bits(image: Any) -> Any:
    """Returns the image with 8 bits per channel. Pillow reduces several channels by itself."""
    import PIL.Image

    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits per channel")
    if not image.mode.startswith("I"):
        return image
    tags = getattr(image, "tag_v2", None) or {}
    if image.mode in _DEEP:
        values = np.frombuffer(image.tobytes(), _DEEP[image.mode]).reshape(image.size[::-1])
        shift = 4 if tags.get(_BITS) in (12, (12,)) else 8
        if tags.get(_WHITE_IS_ZERO) == 0:
            values = values ^ np.uint16(2 ** (shift + 8) - 1)
        return PIL.Image.fromarray((values >> shift).astype(np.uint8))
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"whole numbers from {low} to {high} as pixels; save it with 8 or 16 bits per channel"
        )
    return PIL.Image.fromarray((values >> 8).astype(np.uint8))
