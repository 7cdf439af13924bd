"""Data sets in memory or streamed, and augmentation inside the compiled step.

`bitmixer_jax.preparation` makes local copies from published archives. Nothing here imports it.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from bitmixer_jax.data.augment import augment, normalize
from bitmixer_jax.data.datasets import (
    default_data_dir,
    load,
    open_split,
    reads_data_dir,
    require_classes,
)
from bitmixer_jax.data.image_files import ImageReader, find_images, read_images
from bitmixer_jax.data.in_memory import Dataset
from bitmixer_jax.data.samplers import Order
from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.data.streams import Loader, StreamingDataset

__all__ = [
    "Dataset",
    "ImageReader",
    "Loader",
    "Order",
    "StreamSettings",
    "StreamingDataset",
    "augment",
    "default_data_dir",
    "find_images",
    "load",
    "normalize",
    "open_split",
    "read_images",
    "reads_data_dir",
    "require_classes",
]

if not TYPE_CHECKING:  # hidden from mypy, which would otherwise accept any name
    _MOVED = {
        "Streamed": ("bitmixer_jax.data", "StreamingDataset"),
        "prepare": ("bitmixer_jax.preparation", "prepare"),
    }

    def __getattr__(name: str) -> Any:
        """Returns what has moved, with a warning. The next version drops these names."""
        if name not in _MOVED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, now = _MOVED[name]
        message = f"bitmixer_jax.data.{name} is deprecated; use {module}.{now}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(module), now)
