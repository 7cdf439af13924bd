"""The checksum of a whole exported ONNX file, which its metadata hold.

It is found and checked in the bytes of the file, so that no engine reads a damaged file.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

FORMAT, VERSION = "bitmixer-onnx", 2  # version 1 had no checksum
KEY = "sha256"
_ZEROS = b"0" * 64
# A metadata entry as protobuf writes it: field 1 (the key), its length; field 2 (the value), too.
_MARK = b"\n\x06" + KEY.encode() + b"\x12\x40"
_ENTRY = re.compile(re.escape(_MARK) + b"([0-9a-f]{64})")


def add_seal(model: Any) -> None:
    """Gives an onnx.ModelProto the metadata entry that `seal` fills."""
    for place in reversed(range(len(model.metadata_props))):
        if model.metadata_props[place].key == KEY:
            del model.metadata_props[place]
    model.metadata_props.add(key=KEY, value=_ZEROS.decode())


def seal(data: bytes) -> bytes:
    """Writes the checksum into the bytes of a model of `add_seal`."""
    empty = _MARK + _ZEROS
    assert data.count(empty) == 1
    return data.replace(empty, _MARK + hashlib.sha256(data).hexdigest().encode())


def is_whole(data: bytes) -> bool | None:
    """Returns whether the checksum of a file is right; None if it has none (version 1)."""
    found = list(_ENTRY.finditer(data))
    if len(found) != 1:
        return None if not found else False
    start, end = found[0].span(1)
    digest = hashlib.sha256(data[:start])
    digest.update(_ZEROS)
    digest.update(memoryview(data)[end:])
    return digest.hexdigest().encode() == found[0][1]
