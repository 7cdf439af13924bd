"""Opens data sets by name, and checks that their classes are those of a network."""

import difflib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from bitmixer_jax.data import tfds
from bitmixer_jax.data.folders import open_folder
from bitmixer_jax.data.in_memory import Dataset, channel_stats
from bitmixer_jax.data.local import SPECS, load_local
from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.data.splits import parse_split
from bitmixer_jax.data.streams import StreamingDataset
from bitmixer_jax.errors import UserError, listed, one_line
from bitmixer_jax.files import user_path

DATA_DIR_VARIABLE = "BITMIXER_DATA"


def default_data_dir() -> pathlib.Path:
    """Returns the folder of the data sets: `$BITMIXER_DATA`, or else `~/.cache/bitmixer`."""
    given = os.environ.get(DATA_DIR_VARIABLE)
    if given:
        return user_path(given)
    try:
        return user_path("~/.cache/bitmixer")
    except UserError:
        raise UserError(
            f"this user has no home folder: say where data sets are, by {DATA_DIR_VARIABLE} in the "
            "environment or by data_dir",
            "bad-path",
        ) from None


def reads_data_dir(name: str) -> bool:
    """Returns whether a data set is read from the folder ``data_dir``."""
    return name != "digits" and not os.path.isabs(name.removeprefix("folder:"))


def load(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads one split of a data set, or a slice of one, into memory.

    Args:
      name: one of

        * `digits`: comes with scikit-learn and needs no files;
        * `cifar10`, `fashion_mnist` or `mnist`: local copies in `data_dir`, made by
          `bitmixer_jax.preparation.prepare`;
        * `tfds:NAME`, `tfds:NAME/CONFIG` or `tfds:NAME:VERSION`: a data set that
          tensorflow-datasets prepared in `data_dir` as array_record. The prefix may be left out if
          the name is none of the above.
      split: `train` or `test`, or for tensorflow-datasets any split that the data set has. It may
        be sliced as there, by count or per cent (`train[:90%]`, `train[45000:]`, `train[-10:]`),
        and be a sum (`train[:20%]+train[50%:]`, `train+test`).
      data_dir: folder of the data sets. With None it is `default_data_dir()`, and for
        tensorflow-datasets their own default folder too.

    Returns:
      The data set. Its `mean` and `std` are those of the whole training split.

    Raises:
      UserError: the name or the split is unknown, the slice is empty, the data is missing, or the
        local copy is damaged.

    Example:
      >>> from bitmixer_jax.data import load
      >>> data = load("digits", "train[:90%]")
      >>> data.images.shape, data.labels.shape, data.num_classes
      ((1293, 8, 8, 1), (1293,), 10)
    """
    if name == "digits":
        return _load_digits(split)
    folder, folders = _folders(data_dir)
    if name in SPECS:
        return load_local(name, split, folder)
    if name.startswith("tfds:") or tfds.find_prepared(name, folders) is not None:
        return tfds.load_prepared(name, name.removeprefix("tfds:"), split, folders)
    known = ["digits", *SPECS]
    close = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(
        f"unknown data set {name!r}: {hint}known are {', '.join(known)} and, as tfds:NAME, any of "
        f"tensorflow-datasets which {' or '.join(map(str, folders))} holds prepared",
        "unknown-name",
    )


_DEFAULT = StreamSettings()


def open_split(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    stream: StreamSettings = _DEFAULT,
    workers: int = -1,
) -> Dataset | StreamingDataset:
    """Opens one split of a data set, or a slice of one: streamed if it is large, else in memory.

    Args:
      name: as `load` takes it, or one of these, which are streamed:

        * `folder:PATH`: a folder with `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`; a relative PATH
          starts at `data_dir`;
        * `tfds:NAME`: if the images have no fixed size;
        * `imagenet`: `tfds:imagenet2012` or `folder:imagenet`, whichever exists.
      split: as `load` takes it. A folder has `train`, `validation` (its sub-folder is `val`), and
        so on.
      data_dir: as `load` takes it.
      stream: how streamed images are read.
      workers: see `StreamingDataset`.

    Returns:
      The data set.

    Raises:
      UserError: as `load`; or classes, or files of records, are missing or unreadable.

    Example:
      >>> from bitmixer_jax.data import open_split
      >>> data = open_split("digits", "test")
      >>> type(data).__name__, len(data)
      ('Dataset', 360)
    """
    if name == "digits":  # needs no data folder, and works for users without a home folder
        return load(name, split)
    folder, folders = _folders(data_dir)
    found_name = _find_imagenet(folder, folders) if name == "imagenet" else name
    if found_name.startswith("folder:"):
        root = folder / user_path(found_name.removeprefix("folder:"))
        source, classes = open_folder(root, split, stream.skip_unreadable)
        return StreamingDataset(name, split, classes, source, stream, workers)
    if name not in SPECS:
        tfds_name = found_name.removeprefix("tfds:")
        if found_name.startswith("tfds:") or tfds.find_prepared(tfds_name, folders) is not None:
            found = tfds.stream_prepared(name, tfds_name, split, folders, stream, workers)
            if found is not None:
                return found
    return load(found_name, split, data_dir)


def _folders(
    data_dir: str | os.PathLike[str] | None,
) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """Returns the folder of the data sets, and all folders of prepared tensorflow-datasets."""
    if data_dir is not None:
        return user_path(data_dir), [user_path(data_dir)]
    folder = default_data_dir()
    return folder, [folder, tfds.default_dir()]


def _find_imagenet(folder: pathlib.Path, folders: list[pathlib.Path]) -> str:
    """Returns the name of the records or the folder of ImageNet, whichever exists."""
    records, images = tfds.find_prepared("imagenet2012", folders), folder / "imagenet"
    if records is not None and images.is_dir():
        raise UserError(
            f"data set imagenet is there twice: {records} and {images}; set config.dataset to "
            "tfds:imagenet2012 or to folder:imagenet",
            "conflict",
        )
    if records is None and not images.is_dir():
        raise UserError(
            f"data set imagenet: neither {images} (with train/CLASS/*.JPEG and val/CLASS/*.JPEG) "
            f"nor imagenet2012, prepared as array_record, under {' or '.join(map(str, folders))}; "
            "docs/imagenet.md says how to make either",
            "no-data",
        )
    return "folder:imagenet" if records is None else "tfds:imagenet2012"


def _load_digits(split: str) -> Dataset:
    """Loads the digits of scikit-learn: 1437 for training, 360 for testing, stratified."""
    try:
        import sklearn.datasets
    except ImportError as error:
        raise UserError(
            "data set digits comes with scikit-learn, which is not installed: "
            "pip install scikit-learn",
            "not-installed",
        ) from error
    bunch = sklearn.datasets.load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # Shuffled with a fixed seed; then every fifth example of each class is for testing. It uses
    # `RandomState` because numpy promises that its streams never change.
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


def require_classes(found: Sequence[str], expected: Sequence[str], where: str) -> None:
    """Checks that a data set has the classes that a network was trained on, in the same order.

    Args:
      found: names of the classes of the data set.
      expected: names of the classes of the network.
      where: what to call the data set in the message.

    Raises:
      UserError: classes were added, renamed, removed, or are in another order.
    """
    if list(found) == list(expected):
        return
    here, wanted = set(found), set(expected)
    new = [name for name in found if name not in wanted]
    gone = [name for name in expected if name not in here]
    if new or gone:
        parts = [f"{len(new)} that it does not know ({listed(new)})"] * bool(new)
        parts += [f"{len(gone)} are missing ({listed(gone)})"] * bool(gone)
        what = f"has other classes than the network: {'; '.join(parts)}"
    elif len(found) != len(expected):
        what = f"has {len(found)} classes, some of them twice; the network has {len(expected)}"
    else:
        label = next(i for i, name in enumerate(found) if name != expected[i])
        what = (
            f"has the classes of the network in another order: class {label} is "
            f"{one_line(found[label])}, in the network {one_line(expected[label])}"
        )
    raise UserError(f"{where}: {what}; give the data of the training, or train again", "other-data")
