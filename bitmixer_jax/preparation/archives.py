"""Finds the published files of a data set in a folder, or in an archive known by its checksum."""

import dataclasses
import gzip
import hashlib
import io
import pathlib
import tarfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from bitmixer_jax.data.local import Spec
from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.files import open_file, read_bytes

MAX_FILE_BYTES = 2**26  # of a published file, unpacked; the largest has 47 million
_READ_ERRORS = (OSError, EOFError, zlib.error, tarfile.TarError)


@dataclasses.dataclass(frozen=True)
class Files:
    """The published files: `read(name)` gives the bytes of one, `where` names all in messages."""

    where: str
    read: Callable[[str], bytes]


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive: its usual name, and its checksum (`algorithm` is md5 or sha256)."""

    file: str
    algorithm: str
    digest: str


@dataclasses.dataclass(frozen=True)
class Format:
    """A format in which a data set is published.

    Attributes:
      name: name of the format, kept in `info.json`.
      files: names of its files. Of several names for one file, the first is the usual one.
      folders: sub-folders in which an unpacked archive has the files.
      read: turns the files into uint8 arrays, by the names of `Spec.array_shapes`.
      archive: the archive of the files, if one is published.
    """

    name: str
    files: tuple[tuple[str, ...], ...]
    folders: tuple[str, ...]
    read: Callable[[Files, Spec], dict[str, np.ndarray]]
    archive: Archive | None = None


def open_source(
    name: str, spec: Spec, formats: Sequence[Format], source: pathlib.Path
) -> tuple[Format, Files]:
    """Opens the published files of a data set, an archive or a folder; returns their format too.

    Raises:
      UserError: the source is not there, not known, damaged or incomplete.
    """
    if source.is_dir():
        return _open_folder(name, spec, formats, source)
    if not source.is_file():
        raise UserError(
            f"no such file or folder: {source}; the source of {name} is {spec.sources}",
            "no-such-file",
        )
    known = [(fmt, fmt.archive) for fmt in formats if fmt.archive]
    if not known:
        raise UserError(f"{source} is a file: the source of {name} is {spec.sources}", "bad-path")
    try:
        fmt = _recognise(name, known, source)
        contents = _unpack(fmt, source)
    except _READ_ERRORS as error:
        raise UserError(f"{source} cannot be read: {reason(error)}", "not-readable") from error
    missing = [names[0] for names in fmt.files if names[0] not in contents]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}", "no-data")
    return fmt, Files(str(source), contents.__getitem__)


def check_size(data: bytes, size: int, where: str) -> None:
    """Raises UserError unless the content of a file has the right size."""
    if len(data) != size:
        raise UserError(
            f"{where} is truncated or wrong: expected {size} bytes, found {len(data)}", "damaged"
        )


def _open_folder(
    name: str, spec: Spec, formats: Sequence[Format], source: pathlib.Path
) -> tuple[Format, Files]:
    """Chooses the format of which the folder has the most files, and requires all of them."""
    best: tuple[int, Format, pathlib.Path] | None = None
    for fmt in formats:
        for folder in [source, *(source / sub for sub in fmt.folders)]:
            count = sum(any((folder / file).is_file() for file in names) for names in fmt.files)
            if count and (best is None or count > best[0]):
                best = count, fmt, folder
    if best is None:
        for fmt in formats:
            if fmt.archive and (source / fmt.archive.file).is_file():
                packed = source / fmt.archive.file
                raise UserError(f"{source} is not unpacked data: give {packed}", "wrong-format")
        raise UserError(f"no file of {name} in the folder {source}: give {spec.sources}", "no-data")
    _, fmt, folder = best
    present: dict[str, pathlib.Path] = {}
    for names in fmt.files:
        paths = [folder / file for file in names if (folder / file).is_file()]
        if not paths:
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise UserError(f"{folder / names[0]} is missing{others}: {name} needs it", "no-data")
        present[names[0]] = paths[0]

    def read(file: str) -> bytes:
        path = present[file]
        try:
            return _unzip(path.name, read_bytes(path, MAX_FILE_BYTES))
        except _READ_ERRORS as error:
            message = f"{path} cannot be read, it is damaged or truncated: {reason(error)}"
            raise UserError(message, "damaged") from error

    return fmt, Files(str(folder), read)


def _recognise(name: str, known: Sequence[tuple[Format, Archive]], source: pathlib.Path) -> Format:
    """Returns the format of an archive by its checksum, before anything else looks into it."""
    digests: dict[str, str] = {}
    for algorithm in {archive.algorithm for _, archive in known}:
        with open_file(source) as stream:
            digests[algorithm] = hashlib.file_digest(cast(Any, stream), algorithm).hexdigest()
    for fmt, archive in known:
        if digests[archive.algorithm] == archive.digest:
            return fmt
    expected = ", ".join(f"{a.file} ({a.algorithm} {a.digest})" for _, a in known)
    found = ", ".join(f"{key} {value}" for key, value in sorted(digests.items()))
    raise UserError(
        f"{source} is truncated or not an archive of {name}: expected one of {expected}; found "
        f"{source.stat().st_size} bytes, {found}; download it again",
        "damaged",
    )


def _unpack(fmt: Format, source: pathlib.Path) -> dict[str, bytes]:
    """Returns the files of a format that an archive holds, by their usual names."""
    usual = {file: names[0] for names in fmt.files for file in names}
    contents: dict[str, bytes] = {}
    with open_file(source) as stream, tarfile.open(fileobj=stream) as tar:
        for member in tar:
            file = pathlib.PurePosixPath(member.name).name
            content = tar.extractfile(member) if file in usual else None
            if content is not None:
                if member.size > MAX_FILE_BYTES:
                    raise OSError(f"{file} has {member.size:,} bytes")
                contents[usual[file]] = _unzip(file, content.read())
    return contents


def _unzip(file: str, data: bytes) -> bytes:
    """Unpacks a file if its name ends with .gz. Raises OSError if the content is too large."""
    if not file.endswith(".gz"):
        return data
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as unzipped:
        found = unzipped.read(MAX_FILE_BYTES + 1)
    if len(found) > MAX_FILE_BYTES:
        raise OSError(f"it unpacks to more than {MAX_FILE_BYTES:,} bytes")
    return found
