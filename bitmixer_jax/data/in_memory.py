"""A data set in memory, with the mean and standard deviation of its channels."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a labelled image set, or a slice of one, in memory.

    Attributes:
      name: name of the data set, as given to `load`.
      split: the split, as given to `load`.
      images: `[N, H, W, C]` uint8.
      labels: `[N]` int32, in `0 .. num_classes - 1`.
      classes: names of the classes, in the order of the labels.
      mean: `[C]` float32, the mean of each channel over the whole *training* split, in units of
        0..255. Every split has the statistics of training, because evaluation normalises by them.
      std: `[C]` float32, the standard deviation of the same; never zero.

    Raises:
      ValueError: shapes or dtypes do not fit together, or a label has no class.

    Example:
      >>> import numpy as np
      >>> from bitmixer_jax.data import Dataset
      >>> images = np.zeros((3, 8, 8, 1), np.uint8)
      >>> labels, one = np.asarray([0, 1, 1], np.int32), np.ones(1, np.float32)
      >>> data = Dataset("toy", "train", images, labels, ("cat", "dog"), mean=one, std=one)
      >>> len(data), data.num_classes, data.image_shape
      (3, 2, (8, 8, 1))
    """

    name: str
    split: str
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray

    def __post_init__(self) -> None:
        """Checks shapes, dtypes and labels."""
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [N, H, W, C], got {dtype_and_shape(images)}")
        if labels.shape != images.shape[:1] or labels.dtype != np.int32:
            raise ValueError(f"labels must be int32 [{len(images)}], got {dtype_and_shape(labels)}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise ValueError(
                f"{self.name} {self.split}: labels must lie in 0..{len(self.classes) - 1}, "
                f"got {labels.min()}..{labels.max()}"
            )
        for field, values in (("mean", self.mean), ("std", self.std)):
            if values.shape != images.shape[3:] or values.dtype != np.float32:
                wanted = f"float32 [{images.shape[3]}]"
                raise ValueError(f"{field} must be {wanted}, got {dtype_and_shape(values)}")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.images)

    def subset(self, rows: np.ndarray) -> "Dataset":
        """Returns the examples of the given indices, int ``[M]``."""
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows])


def channel_stats(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and standard deviation of each channel, in units of 0..255.

    The exact histogram of each channel gives both, so the result does not depend on the order of a
    summation. A constant channel gets standard deviation 1, so that one can divide by it.

    Args:
      images: `[N, H, W, C]` uint8, at least one.

    Returns:
      Mean and standard deviation, each `[C]` float32.
    """
    return histogram_stats(histograms(images))


def histograms(images: np.ndarray) -> np.ndarray:
    """Counts the pixels of each value: `[N, H, W, C]` uint8 to `[C, 256]` int64."""
    counts = np.zeros((images.shape[3], 256), np.int64)
    for start in range(0, len(images), 4096):  # bincount copies to int64: keep the copies small
        for channel, row in enumerate(counts):
            row += np.bincount(images[start : start + 4096, ..., channel].ravel(), minlength=256)
    return counts


def histogram_stats(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation, each `[C]` float32, from counts `[C, 256]`."""
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(axis=1)
    std = np.where(variance > 0, np.sqrt(variance), 1.0)
    return mean.astype(np.float32), std.astype(np.float32)


def dtype_and_shape(array: np.ndarray) -> str:
    """Returns dtype and shape of an array, for messages."""
    return f"{array.dtype} {list(array.shape)}"
