"""What a data set in memory is: one split of it or a slice, with the statistics of its channels."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split, or a slice of one, of a labelled image set, in memory.

    Attributes:
      name: name of the data set, as given to `load`.
      split: the split, as given to `load`.
      images: `[N, H, W, C]` uint8.
      labels: `[N]` int32, in `0 .. num_classes - 1`.
      classes: names of the classes, in the order of the labels.
      mean: `[C]` float32, per-channel mean of the whole *training* split, in units of 0..255,
        whichever split this is: evaluation normalises with the statistics of training.
      std: `[C]` float32, per-channel standard deviation of the same; never zero.
    """

    name: str
    split: str
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError where shapes, dtypes or labels contradict each other."""
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [N, H, W, C], got {kind(images)}")
        if labels.shape != images.shape[:1] or labels.dtype != np.int32:
            raise ValueError(f"labels must be int32 [{len(images)}], got {kind(labels)}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise ValueError(
                f"{self.name} {self.split}: labels must lie in 0..{len(self.classes) - 1}, "
                f"got {labels.min()}..{labels.max()}"
            )
        for field, values in (("mean", self.mean), ("std", self.std)):
            if values.shape != images.shape[3:] or values.dtype != np.float32:
                wanted = f"float32 [{images.shape[3]}]"
                raise ValueError(f"{field} must be {wanted}, got {kind(values)}")

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
        """These examples alone: ``rows`` int ``[M]``."""
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows])


def channel_stats(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the per-channel mean and standard deviation of images, in units of 0..255.

    Computed from the exact histogram of each channel, so the result does not depend on the order
    of a summation. A constant channel gets standard deviation 1, so that one can divide by it.

    Args:
      images: `[N, H, W, C]` uint8, at least one.

    Returns:
      Mean and standard deviation, each `[C]` float32.
    """
    return histogram_stats(histograms(images))


def histograms(images: np.ndarray) -> np.ndarray:
    """Counts pixels by value: `[N, H, W, C]` uint8 to `[C, 256]` int64."""
    counts = np.zeros((images.shape[3], 256), np.int64)
    for start in range(0, len(images), 4096):  # bincount wants int64 copies: keep them small
        for channel, row in enumerate(counts):
            row += np.bincount(images[start : start + 4096, ..., channel].ravel(), minlength=256)
    return counts


def histogram_stats(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, each `[C]` float32, from pixel counts `[C, 256]`."""
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(axis=1)
    std = np.where(variance > 0, np.sqrt(variance), 1.0)
    return mean.astype(np.float32), std.astype(np.float32)


def kind(array: np.ndarray) -> str:
    """Dtype and shape of an array, for messages."""
    return f"{array.dtype} {list(array.shape)}"
