"""ImageNet as records: its archives or a folder, as tensorflow-datasets would, no TensorFlow."""

import functools
import importlib.util
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bitmixer_jax.data._encoded import FolderSource, open_folder
from bitmixer_jax.data._names import listed
from bitmixer_jax.errors import UserError

NAME, VERSION = "imagenet2012", "5.1.0"
TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"

_Files = Iterator[tuple[str, str, bytes]]  # class, name and content of each image


def write_records(source: pathlib.Path, data_dir: pathlib.Path) -> pathlib.Path:
    """Writes `data_dir/imagenet2012/5.1.0` as ArrayRecord; one that is there is left as it is.

    The files are copied as they are, shuffled. The folder has its name only when it is whole. Needs
    twice the space of the images meanwhile.

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
        import tensorflow_datasets as tfds

        archives = (source / TRAIN_TAR).is_file() or (source / VALIDATION_TAR).is_file()
        classes, splits = (_from_archives if archives else _from_folders)(source)
        data_dir.mkdir(parents=True, exist_ok=True)
        builder = _builder(splits, classes)(data_dir=data_dir, file_format="array_record")
        # Nothing is to be fetched: without this it would ask a server first.
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=config)
    except ImportError as error:
        raise UserError(f"preparing imagenet needs tensorflow-datasets ({error})") from error
    except tarfile.TarError as error:
        raise UserError(f"{source}: an archive is truncated or wrong: {error}") from error
    except OSError as error:
        raise UserError(f"cannot prepare {target} from {source}: {error}") from error
    return target


def _from_folders(
    source: pathlib.Path,
) -> tuple[tuple[str, ...], dict[str, Callable[[], _Files]]]:
    """Classes, and what gives the files of each split."""
    found = {
        split: open_folder(source, split, skip_unreadable=False)
        for split in ("train", "validation")
    }
    classes = found["train"][1]
    for name in classes:
        if not name.isprintable():  # nor what is not UTF-8
            raise UserError(
                f"{source}: the class {name!a} has a name that records cannot hold; rename it"
            )

    def files(images: FolderSource) -> _Files:
        for index in range(len(images)):
            data, label = images.read(index)
            name = os.fsencode(pathlib.Path(images.name(index)).name)
            yield classes[label], name.decode(errors="backslashreplace"), data

    return classes, {split: functools.partial(files, one) for split, (one, _) in found.items()}


def _from_archives(
    source: pathlib.Path,
) -> tuple[tuple[str, ...], dict[str, Callable[[], _Files]]]:
    """The same from the archives: one of an archive for each class, one of 50,000 images."""
    for name in (TRAIN_TAR, VALIDATION_TAR):
        if not (source / name).is_file():
            raise UserError(f"{source}: {name} is missing; both archives are needed")
    classes, of_validation = _labels()
    with tarfile.open(source / TRAIN_TAR) as outer:
        missing = sorted({f"{name}.tar" for name in classes} - {*outer.getnames()})
    if missing:
        raise UserError(
            f"{source / TRAIN_TAR}: {len(missing)} of {len(classes)} classes are missing: "
            f"{listed(missing)}"
        )
    with tarfile.open(source / VALIDATION_TAR) as archive:
        images = sorted(member.name for member in archive if member.isfile())
    if len(images) != len(of_validation):
        raise UserError(
            f"{source / VALIDATION_TAR}: expected {len(of_validation)} images, found {len(images)}"
        )

    def train() -> _Files:
        with tarfile.open(source / TRAIN_TAR) as outer:
            for name in classes:
                with tarfile.open(fileobj=outer.extractfile(f"{name}.tar")) as inner:
                    yield from ((name, *file) for file in _members(inner))

    def validation() -> _Files:
        labels = dict(zip(images, of_validation, strict=True))  # theirs are in the order of names
        with tarfile.open(source / VALIDATION_TAR) as archive:
            yield from ((labels[name], name, data) for name, data in _members(archive))

    return classes, {"train": train, "validation": validation}


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        file = archive.extractfile(member)
        if file is not None:
            yield member.name, file.read()


def _labels() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes, and the class of each validation image, as tensorflow-datasets lists them."""
    found = importlib.util.find_spec("tensorflow_datasets")
    assert found is not None
    assert found.origin is not None
    folder = pathlib.Path(found.origin).parent / "datasets" / "imagenet2012"
    names = ("labels.txt", "validation_labels.txt")
    classes, validation = (tuple((folder / name).read_text().split()) for name in names)
    return classes, validation


def _builder(splits: Mapping[str, Callable[[], _Files]], classes: tuple[str, ...]) -> Any:
    """The builder class of these files, with the features of the stock imagenet2012."""
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

        def _generate_examples(self, files: _Files) -> Iterator[tuple[str, Any]]:
            for label, name, data in files:
                yield f"{label}/{name}", {"image": data, "label": label, "file_name": name}

    return Imagenet2012
