"""From the bytes of an image file to pixels of 8 bits: the one rule that every reader follows.

* Formats: those of FORMATS and nothing else, whatever a file is called. Other formats of Pillow may
  start programs (EPS starts Ghostscript).
* Size: at most MOST_PIXELS, read from the header before a pixel is decoded.
* 16 bits a channel become 8: the upper ones (``v >> 8``), so that 65535 is 255. Floating-point
  pixels and whole numbers beyond 16 bits have no defined range and are refused.
* Transparency is dropped; of an animation, the first frame counts.
* Orientation tags of cameras are obeyed or not, as the caller says. (Pillow itself obeys those of
  TIFF files in any case.)
"""

import importlib
import io
from typing import Any

import numpy as np

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MOST_PIXELS = 2**26  # 8,192 x 8,192: 0.4 to 1.3 GB while it is decoded
MOST_BYTES = 2**29  # of a file

_ORIENTATION = 0x0112  # the tag's number in EXIF
_DEEP = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2"}
_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}
_WHITE_IS_ZERO, _BITS = 262, 258  # tags of TIFF: photometric interpretation, bits of a sample


def decode(data: bytes, mode: str = "RGB", obey: bool = True) -> Any:
    """Decodes an image file.

    Args:
      data: the file.
      mode: "RGB" or "L".
      obey: turn the image as its orientation tag says.

    Returns:
      a Pillow image of that mode.

    Raises:
      Exception: of whatever kind, where the file is damaged, no image, or too large.
    """
    import PIL.Image

    _check_webp(data)
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(*image.size)
        image.load()
        turn = _turn(image) if obey else None
        pixels = _eight_bits(image)
        if "transparency" in image.info:  # Pillow warns where it is not dropped by way of RGBA
            pixels = pixels.convert("RGBA")
        pixels = pixels.convert(_PREMULTIPLIED.get(pixels.mode, pixels.mode)).convert(mode)
    return pixels if turn is None else pixels.transpose(turn)


def decode_fast(data: bytes, obey: bool = True) -> np.ndarray:
    """Decodes an image file by simplejpeg: uint8 ``[H, W, 3]``.

    What simplejpeg refuses (PNG files named .JPEG, CMYK, damaged files), `decode` reads or refuses:
    both accept the same files.

    Raises:
      as `decode`.
    """
    simplejpeg = importlib.import_module("simplejpeg")
    # Parsing the tags takes as long as decoding a small image: only where there may be some.
    if obey and data.startswith(b"\xff\xd8") and (b"Exif" in data or b"rientation" in data):
        return np.asarray(decode(data, obey=True))
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return np.asarray(decode(data, obey=obey))
    _check_size(width, height)
    try:
        # Strict: what is merely odd goes to Pillow, too, which decides for both decoders.
        return np.asarray(simplejpeg.decode_jpeg(data))
    except ValueError:
        return np.asarray(decode(data, obey=obey))


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"{width} x {height} pixels: it is empty")
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels; at most {MOST_PIXELS:,} are read, make it smaller"
        )


def _check_webp(data: bytes) -> None:
    """Checks the size that a WebP file states: Pillow makes room for frames as it opens one."""
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
    """How Pillow turns an image upright; None: it is. Damaged tags say nothing."""
    from PIL.Image import Transpose

    try:
        tag = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged tags raise nearly anything, and the pixels do without
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
    """The image with 8 bits per channel; of several channels, Pillow takes the upper 8 itself."""
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
