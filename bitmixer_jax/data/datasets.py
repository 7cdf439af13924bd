"""Opening a data set by its name, wherever it comes from."""

import difflib
import os
import pathlib

import numpy as np

from bitmixer_jax.data import _tfds
from bitmixer_jax.data._dataset import Dataset, channel_stats
from bitmixer_jax.data._encoded import open_folder
from bitmixer_jax.data._local import load_local
from bitmixer_jax.data._specs import SPECS
from bitmixer_jax.data._splits import parse_split
from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.data.streams import Streamed
from bitmixer_jax.errors import UserError
from bitmixer_jax.files import user_path

DATA_DIR_VARIABLE = "BITMIXER_DATA"


def default_data_dir() -> pathlib.Path:
    """Returns where data sets live: `$BITMIXER_DATA`, or else `~/.cache/bitmixer`."""
    given = os.environ.get(DATA_DIR_VARIABLE)
    if given:
        return user_path(given)
    try:
        return user_path("~/.cache/bitmixer")
    except UserError:
        raise UserError(
            f"this user has no home folder: say where data sets are, by {DATA_DIR_VARIABLE} in the "
            "environment or by data_dir"
        ) from None


def reads_data_dir(name: str) -> bool:
    """Returns whether a data set is read from a folder of data sets, which ``data_dir`` names."""
    return name != "digits" and not os.path.isabs(name.removeprefix("folder:"))


def load(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads one split of a data set, or a slice of one, into memory.

    Args:
      name: `digits` (bundled with scikit-learn, needs no files); `cifar10`, `fashion_mnist` or
        `mnist` (local copies which `prepare` made in `data_dir`); or a data set of
        tensorflow-datasets that `data_dir` holds already prepared as array_record, written
        `tfds:NAME`, `tfds:NAME/CONFIG`, `tfds:NAME:VERSION`, or NAME where it is none of the above.
      split: `train` or `test` (for tensorflow-datasets: any split it has), optionally sliced as
        there, with counts or per cent: `train[:90%]`, `train[45000:]`, `train[-10:]`; and sums:
        `train[:20%]+train[50%:]`, `train+test`.
      data_dir: folder of the data sets; `default_data_dir()` when None (tensorflow-datasets are
        then looked for in their own default folder too).

    Returns:
      The data set. Its `mean` and `std` are those of the whole training split.

    Raises:
      UserError: the name or the split is unknown, the slice is empty, the data is missing, or the
        local copy is damaged.
    """
    if name == "digits":
        return _load_digits(split)
    folder = default_data_dir() if data_dir is None else user_path(data_dir)
    if name in SPECS:
        return load_local(name, split, folder)
    folders = [folder, _tfds.default_dir()] if data_dir is None else [folder]
    if name.startswith("tfds:") or _tfds.find_prepared(name, folders) is not None:
        return _tfds.load_prepared(name, name.removeprefix("tfds:"), split, folders)
    known = ["digits", *SPECS]
    close = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(
        f"unknown data set {name!r}: {hint}known are {', '.join(known)} and, as tfds:NAME, any of "
        f"tensorflow-datasets which {' or '.join(map(str, folders))} holds prepared"
    )


_DEFAULT = StreamSettings()


def open_split(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    stream: StreamSettings = _DEFAULT,
    workers: int = -1,
) -> Dataset | Streamed:
    """Opens one split of a data set, or a slice of one: in memory, or streamed if it is large.

    Args:
      name: what `load` takes; or one that is streamed: `folder:PATH`, a folder with
        `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`, its PATH relative to `data_dir`; `tfds:NAME`
        whose images have no fixed size; `imagenet`, which is `tfds:imagenet2012` or
        `folder:imagenet`, whichever is there.
      split: as `load` takes it; of a folder `train`, `validation` (its folder is `val`), ...
      data_dir: as of `load`.
      stream: how streamed images are read.
      workers: see `Streamed`.

    Raises:
      UserError: as `load`; or classes, or files of records, are missing or unreadable.
    """
    if name == "digits":  # needs no folder, nor a home for one
        return load(name, split)
    folder = default_data_dir() if data_dir is None else user_path(data_dir)
    folders = [folder, _tfds.default_dir()] if data_dir is None else [folder]
    known_as = _find_imagenet(folder, folders) if name == "imagenet" else name
    if known_as.startswith("folder:"):
        root = folder / user_path(known_as.removeprefix("folder:"))
        source, classes = open_folder(root, split, stream.skip_unreadable)
        return Streamed(name, split, classes, source, stream, workers)
    if name not in SPECS:
        of_tfds = known_as.removeprefix("tfds:")
        if known_as.startswith("tfds:") or _tfds.find_prepared(of_tfds, folders) is not None:
            found = _tfds.stream_prepared(name, of_tfds, split, folders, stream, workers)
            if found is not None:
                return found
    return load(known_as, split, data_dir)


def _find_imagenet(folder: pathlib.Path, folders: list[pathlib.Path]) -> str:
    """The name of the one form of ImageNet that is there."""
    records, images = _tfds.find_prepared("imagenet2012", folders), folder / "imagenet"
    if records is not None and images.is_dir():
        raise UserError(
            f"data set imagenet is there twice: {records} and {images}; set config.dataset to "
            "tfds:imagenet2012 or to folder:imagenet"
        )
    if records is None and not images.is_dir():
        raise UserError(
            f"data set imagenet: neither {images} (with train/CLASS/*.JPEG and val/CLASS/*.JPEG) "
            f"nor imagenet2012, prepared as array_record, under {' or '.join(map(str, folders))}; "
            "docs/imagenet.md says how to make either"
        )
    return "folder:imagenet" if records is None else "tfds:imagenet2012"


def _load_digits(split: str) -> Dataset:
    """Loads scikit-learn's digits: 1437 for training, 360 for testing, each class in proportion."""
    try:
        import sklearn.datasets
    except ImportError as error:
        raise UserError(
            "data set digits comes with scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from error
    bunch = sklearn.datasets.load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # Shuffled with a fixed seed, every fifth example of each class is for testing. `RandomState`
    # because numpy promises that its streams never change.
    order = np.random.RandomState(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    is_test = np.zeros(len(labels), bool)
    is_test[by_class[::5]] = True
    parts = {"train": order[~is_test[order]], "test": order[is_test[order]]}
    chosen = parse_split(split, {key: len(rows) for key, rows in parts.items()})
    rows = np.concatenate([parts[part.name][part.start : part.stop] for part in chosen])
    mean, std = channel_stats(images[parts["train"]])
    classes = tuple("0123456789")
    return Dataset("digits", split, images[rows], labels[rows], classes, mean, std)
