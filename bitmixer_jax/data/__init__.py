"""Data sets in memory or streamed, their preparation, and augmentation inside the compiled step."""

from bitmixer_jax.data._dataset import Dataset
from bitmixer_jax.data._names import require_classes
from bitmixer_jax.data.augment import augment, normalize
from bitmixer_jax.data.datasets import default_data_dir, load, open_split, reads_data_dir
from bitmixer_jax.data.image_files import ImageReader, find_images, read_images
from bitmixer_jax.data.order import Order
from bitmixer_jax.data.prepare import prepare
from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.data.streams import Loader, Streamed

__all__ = [
    "Dataset",
    "ImageReader",
    "Loader",
    "Order",
    "StreamSettings",
    "Streamed",
    "augment",
    "default_data_dir",
    "find_images",
    "load",
    "normalize",
    "open_split",
    "prepare",
    "read_images",
    "reads_data_dir",
    "require_classes",
]
