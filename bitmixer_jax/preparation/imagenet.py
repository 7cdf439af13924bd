"""Writes ImageNet as records, from its archives or from a folder of classes.

The records are those that tensorflow-datasets would write, but this needs no TensorFlow.
"""

import functools
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bitmixer_jax.data.folders import FolderSource, open_folder
from bitmixer_jax.errors import UserError, listed, reason

NAME, VERSION = "imagenet2012", "5.1.0"
TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"

Images = Iterator[tuple[str, str, bytes]]  # class, file name and content of each image
Splits = Mapping[str, Callable[[], Images]]


def write_records(source: pathlib.Path, data_dir: pathlib.Path) -> pathlib.Path:
    """Writes `data_dir/imagenet2012/5.1.0` as array_record, unless it exists.

    It copies the image files unchanged, in shuffled order. The folder gets its name when it is
    complete. Meanwhile the images take twice their space.

    Args:
      source: folder with the two archives of ImageNet, or with `train/CLASS/*.JPEG` and
        `val/CLASS/*.JPEG`.

    Raises:
      UserError: the source is wrong or incomplete, or `data_dir` cannot be written to.
    """
    target = data_dir / NAME / VERSION
    if (target / "dataset_info.json").is_file():
        return target
    try:
        import tensorflow_datasets  # noqa: F401 -- before the work

        archives = (source / TRAIN_TAR).is_file() or (source / VALIDATION_TAR).is_file()
        classes, splits = (images_of_archives if archives else images_of_folders)(source)
        data_dir.mkdir(parents=True, exist_ok=True)
        write_splits(classes, splits, data_dir)
    except ImportError as error:
        raise UserError(
            f"preparing imagenet needs tensorflow-datasets ({error})", "not-installed"
        ) from error
    except tarfile.TarError as error:
        raise UserError(
            f"{source}: an archive is truncated or wrong: {reason(error)}", "damaged"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot prepare {target} from {source}: {error}", "not-writable"
        ) from error
    return target


def images_of_folders(source: pathlib.Path) -> tuple[tuple[str, ...], Splits]:
    """Returns the classes of a folder, and a function for each split that reads its images."""
    found = {
        split: open_folder(source, split, skip_unreadable=False)
        for split in ("train", "validation")
    }
    classes = found["train"][1]
    for name in classes:
        if not name.isprintable():  # names that are not UTF-8 are not printable either
            raise UserError(
                f"{source}: the class {name!a} has a name that records cannot hold; rename it",
                "bad-value",
            )

    def read(images: FolderSource) -> Images:
        for index in range(len(images)):
            data, label = images.read(index)
            name = os.fsencode(pathlib.Path(images.name(index)).name)
            yield classes[label], name.decode(errors="backslashreplace"), data

    return classes, {split: functools.partial(read, one) for split, (one, _) in found.items()}


def images_of_archives(source: pathlib.Path) -> tuple[tuple[str, ...], Splits]:
    """Returns the same for the two archives of ImageNet.

    That of training holds an archive for each class, that of validation 50,000 images.
    """
    for name in (TRAIN_TAR, VALIDATION_TAR):
        if not (source / name).is_file():
            raise UserError(f"{source}: {name} is missing; both archives are needed", "no-data")
    classes, of_validation = published_labels()
    with tarfile.open(source / TRAIN_TAR) as outer:
        missing = sorted({f"{name}.tar" for name in classes} - {*outer.getnames()})
    if missing:
        raise UserError(
            f"{source / TRAIN_TAR}: {len(missing)} of {len(classes)} classes are missing: "
            f"{listed(missing)}",
            "damaged",
        )
    with tarfile.open(source / VALIDATION_TAR) as archive:
        images = sorted(member.name for member in archive if member.isfile())
    if len(images) != len(of_validation):
        raise UserError(
            f"{source / VALIDATION_TAR}: expected {len(of_validation)} images, found {len(images)}",
            "damaged",
        )

    def train() -> Images:
        with tarfile.open(source / TRAIN_TAR) as outer:
            for name in classes:
                with tarfile.open(fileobj=outer.extractfile(f"{name}.tar")) as inner:
                    yield from ((name, *file) for file in _members(inner))

    def validation() -> Images:
        labels = dict(zip(images, of_validation, strict=True))  # both in the order of the names
        with tarfile.open(source / VALIDATION_TAR) as archive:
            yield from ((labels[name], name, data) for name, data in _members(archive))

    return classes, {"train": train, "validation": validation}


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        file = archive.extractfile(member)
        if file is not None:
            yield member.name, file.read()


def published_labels() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns what tensorflow-datasets lists: the classes, and that of each validation image."""
    import tensorflow_datasets as tfds

    folder = pathlib.Path(tfds.__file__).parent / "datasets" / "imagenet2012"
    names = ("labels.txt", "validation_labels.txt")
    classes, validation = (tuple((folder / name).read_text().split()) for name in names)
    return classes, validation


def write_splits(
    classes: tuple[str, ...], splits: Splits, data_dir: pathlib.Path, num_shards: int | None = None
) -> None:
    """Writes images as imagenet2012 of tensorflow-datasets, which chooses `num_shards` if None."""
    import tensorflow_datasets as tfds

    class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """ImageNet, from files."""

        # With a dotted module, tensorflow-datasets 4.9.10 looks for the builder's code through
        # importlib_resources, which nothing installs.
        __module__ = NAME
        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=classes),
                    "file_name": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {split: self._generate_examples(files()) for split, files in splits.items()}

        def _generate_examples(self, files: Images) -> Iterator[tuple[str, Any]]:
            for label, name, data in files:
                yield f"{label}/{name}", {"image": data, "label": label, "file_name": name}

    builder = Imagenet2012(data_dir=data_dir, file_format="array_record")
    # Without `try_download_gcs=False` it would ask a server first.
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=num_shards)
    builder.download_and_prepare(download_config=config)
