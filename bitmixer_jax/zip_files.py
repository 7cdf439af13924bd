"""Checks zip archives from other people before they are read.

A small compressed archive can hold terabytes. PyTorch and this library write their archives without
compression, so compressed ones are refused.
"""

from __future__ import annotations

import os
import pathlib
import zipfile
import zlib
from typing import BinaryIO

from bitmixer_jax.errors import UserError, reason

# What `zipfile` raises for damaged archives, and not only the first of them.
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError),
    *(EOFError, KeyError, OverflowError, AttributeError, IndexError, TypeError),
)


def refuse_bombs(path: pathlib.Path, file: BinaryIO) -> None:
    """Checks that the parts of a zip archive are not larger than the archive.

    A file that is not a zip archive passes: the function that reads it says what is wrong.

    Args:
      path: of the file, for messages.
      file: the open file. It is at its start afterwards.

    Raises:
      UserError: the parts are larger, so the archive is compressed or damaged.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
    except _BROKEN:
        unpacked = 0
    file.seek(0)
    if unpacked > size:
        raise UserError(
            f"{path}: the archive has {size:,} bytes, but its parts have {unpacked:,}: it is "
            "compressed or damaged; save it again without compression",
            "damaged",
        )


def read_parts(file: BinaryIO, names: tuple[str, ...]) -> list[bytes]:
    """Reads the parts of a zip archive that is not compressed, and checks their checksums.

    Args:
      file: the open archive.
      names: of its parts; the archive must hold these and no others.

    Returns:
      the content of each part, in the order of ``names``.

    Raises:
      ValueError: it is not a zip archive, is compressed, has other parts, or is damaged.
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
        raise ValueError(reason(error)) from None
