"""Settings of streamed images."""

from __future__ import annotations

import dataclasses
import re

from bitmixer_jax.data.crops import DECODERS, check_installed
from bitmixer_jax.errors import UserError

ORIENTATIONS = ("auto", "obey", "ignore")
_IMAGENET = re.compile(r"imagenet|folder:imagenet/?|(tfds:)?imagenet2012(:[\d.]+)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How streamed images are read.

    Attributes:
      size: pixels of a side of the crops that the network takes.
      resize: what the shorter side of an image becomes before the centre crop of evaluation.
      min_area: least part of an image that a random crop of training takes.
      decoder: one of `crops.DECODERS`.
      skip_unreadable: go on where images, files of records or whole classes are missing or
        damaged. Training then takes other images in their place, drawn anew for each epoch;
        evaluation leaves them out. Otherwise the first is an error.
      orientation: whether to turn images as the tags of cameras say: "obey", "ignore", or "auto",
        which obeys them but for ImageNet, where the custom is to ignore them.
    """

    size: int = 224
    resize: int = 256
    min_area: float = 0.08
    decoder: str = "pil"
    skip_unreadable: bool = False
    orientation: str = "auto"

    def __post_init__(self) -> None:
        """Raises UserError for values that are not allowed."""
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
    def obeys(self) -> bool:
        """Whether orientation tags are obeyed."""
        return self.orientation != "ignore"

    def for_dataset(self, name: str) -> StreamSettings:
        """The settings with what "auto" means for a data set."""
        if self.orientation != "auto":
            return self
        way = "ignore" if _IMAGENET.fullmatch(name) else "obey"
        return dataclasses.replace(self, orientation=way)

    def check_installed(self) -> None:
        """Raises UserError where the decoder is not installed."""
        check_installed(self.decoder)
