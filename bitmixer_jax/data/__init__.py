"""Data sets in memory, their preparation, and augmentation inside the compiled step."""

from bitmixer_jax.data._dataset import Dataset
from bitmixer_jax.data.augment import augment, normalize
from bitmixer_jax.data.datasets import default_data_dir, load
from bitmixer_jax.data.prepare import prepare

__all__ = ["Dataset", "augment", "default_data_dir", "load", "normalize", "prepare"]
