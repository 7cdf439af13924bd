"""Checks of untrusted zip archives: their parts must be stored without compression."""

from __future__ import annotations

import os
import pathlib
import zipfile
import zlib
from typing import BinaryIO

from bitmixer_jax.errors import UserError

_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError),
    *(EOFError, KeyError, OverflowError, AttributeError, IndexError, TypeError),
)


def refuse_bombs(path: pathlib.Path, file: BinaryIO) -> None:
    """Refuses a zip archive whose parts are larger than the archive. Other files pass.

    Afterwards the file is at its start.

    Raises:
      UserError: the archive is compressed, or says sizes that it cannot hold.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(file) as archive:
            held = sum(part.file_size for part in archive.infolist())
    except _BROKEN:  # not a zip archive: whoever reads it says so
        held = 0
    file.seek(0)
    if held > size:
        raise UserError(
            f"{path}: the archive has {size:,} bytes but its parts claim {held:,}: it is "
            "compressed or damaged; save it again without compression",
            "damaged",
        )


def read_parts(file: BinaryIO, names: tuple[str, ...]) -> list[bytes]:
    """Reads parts of a zip archive that is not compressed; their checksums are verified.

    Raises:
      ValueError: it is no zip archive, is compressed, has other parts, or is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if sorted(part.filename for part in archive.infolist()) != sorted(names):
                raise ValueError(f"its parts are not {' and '.join(names)}")
            for name in names:
                part = archive.getinfo(name)
                if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
                    raise ValueError(f"{name} is compressed")
            return [archive.read(name) for name in names]
    except _BROKEN as error:
        raise ValueError(str(error).partition("\n")[0]) from None
