"""Settings of streamed images: `config.stream`."""

from __future__ import annotations

import dataclasses
import re

from bitmixer_jax.data.crops import DECODERS, check_installed
from bitmixer_jax.errors import UserError

ORIENTATIONS = ("auto", "obey", "ignore")
_IMAGENET = re.compile(r"imagenet|folder:imagenet/?|(tfds:)?imagenet2012(:[\d.]+)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Says how streamed images are read.

    Attributes:
      size: side of the square crops that the network takes, in pixels; at least 1.
      resize: length of the shorter side of an image before the centre crop of evaluation, in
        pixels; at least `size`.
      min_area: least share of the area of an image that a random crop takes in training; 0..1.
      decoder: "pil" (Pillow), or "turbo" (simplejpeg and OpenCV), which is faster.
      skip_unreadable: go on if images, files of records or whole classes are missing or damaged.
        Training then takes other images in their place, drawn anew for each epoch, and evaluation
        leaves them out. Otherwise the first one is an error.
      orientation: whether to turn images as their EXIF tag says: "obey", "ignore", or "auto".
        "auto" ignores the tags of ImageNet, as is the custom there, and obeys all others.

    Raises:
      UserError: a value is not allowed.

    Example:
      >>> from bitmixer_jax.data import StreamSettings
      >>> settings = StreamSettings(size=160, resize=184)
      >>> settings.for_dataset("imagenet").orientation
      'ignore'
    """

    size: int = 224
    resize: int = 256
    min_area: float = 0.08
    decoder: str = "pil"
    skip_unreadable: bool = False
    orientation: str = "auto"

    def __post_init__(self) -> None:
        """Checks all values."""
        if self.size < 1:
            raise UserError(f"config.stream.size = {self.size}; give 1 or more")
        if self.resize < self.size:
            least = f"{self.size} (stream.size) or more"
            raise UserError(f"config.stream.resize = {self.resize}; give {least}")
        if not 0 < self.min_area <= 1:
            raise UserError(f"config.stream.min_area = {self.min_area}; give 0 < area <= 1")
        if self.orientation not in ORIENTATIONS:
            allowed = ", ".join(ORIENTATIONS)
            raise UserError(
                f"config.stream.orientation = {self.orientation!r}; choose from {allowed}"
            )
        if self.decoder not in DECODERS:
            allowed = ", ".join(DECODERS)
            raise UserError(f"config.stream.decoder = {self.decoder!r}; choose from {allowed}")

    @property
    def applies_orientation(self) -> bool:
        """True if images are turned as their EXIF tag says."""
        return self.orientation != "ignore"

    def for_dataset(self, name: str) -> StreamSettings:
        """Returns the settings with "auto" replaced by what it means for a data set."""
        if self.orientation != "auto":
            return self
        resolved = "ignore" if _IMAGENET.fullmatch(name) else "obey"
        return dataclasses.replace(self, orientation=resolved)

    def check_installed(self) -> None:
        """Raises UserError if the decoder is not installed."""
        check_installed(self.decoder)
