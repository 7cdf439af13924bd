"""The packed file: integer weights as bit-planes, most significant first, in safetensors.

docs/packed-format.md describes it byte by byte. Planes come last in the file. So a file that is cut
after k of them is the network of the widths that k planes give.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError, shown
from bitmixer_jax.export.description import Reader, describe
from bitmixer_jax.export.integer_model import FloatStem, IntegerModel, Kernel
from bitmixer_jax.export.packed_reader import NORM_DTYPES, PackedReader
from bitmixer_jax.files import parse_json, read_user_file, write_new
from bitmixer_jax.policy import BitSpace
from bitmixer_jax.quantizers import WEIGHT_QUANTIZERS

PACKED_FORMAT = "bitmixer-packed"
PACKED_VERSION = 1
_HEADER_MOST = 64 * 2**20
_ZEROS = "0" * 64
_DIGEST = re.compile("[0-9a-f]{64}")
_DTYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "I8": np.int8, "U8": np.uint8}


def plane_names(choices: tuple[int, ...], quantizer: str) -> list[str]:
    """Returns the names of the planes in the order of the file.

    Args:
      choices: the widths.
      quantizer: name of the weight quantiser; see `WeightQuantizer.plane_names`.
    """
    sets = WEIGHT_QUANTIZERS[quantizer].plane_names(BitSpace(choices))
    return list(itertools.chain.from_iterable(sets))


def pack(network: IntegerModel, norm_dtype: str = "float32") -> bytes:
    """Makes the packed file of a network.

    Args:
      network: of `to_integer_model`, or of a file.
      norm_dtype: dtype of the folded norms: "float32", or "float16" (half the bytes; the values of
        each pair of widths of a kernel are scaled by the largest, and errors are at most 2^-11 of
        that).

    Returns:
      the bytes of the file. The same network gives the same bytes.

    Raises:
      UserError: unknown dtype, or the network was itself read from a file that was cut between two
        widths.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import bitmixer_jax as bm
      >>> from bitmixer_jax.export.integer_model import to_integer_model
      >>> settings = dict(num_classes=2, image_shape=(4, 4, 1), width=1, stage_sizes=(1,))
      >>> model = bm.create_model("resnet8", **settings)
      >>> images, policy = jnp.ones((1, 4, 4, 1)), jnp.array([2, 4])
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), images, policy)
      >>> variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
      >>> about = dict(mean=[0], std=[1], classes=("a", "b"), weights_digest="")
      >>> network = to_integer_model(model, variables, **about)
      >>> data = pack(network)
      >>> unpack(data, "a file").space.choices, unpack(data, "a file", planes=3).space.choices
      ((2, 3, 4), (2, 3))
    """
    if network.code_bits != network.space.widest:
        raise UserError(
            "packed file: this network was read from a file cut between two widths; pack the whole"
        )
    arrays: dict[str, np.ndarray] = {}
    kernels = [kernel for layer in network.layers for kernel in layer.kernels]
    arrays["counts"] = np.concatenate([k.count.ravel() for k in kernels])
    arrays["input_steps"] = np.concatenate([layer.step_size for layer in network.layers])
    arrays["weight_steps"] = np.concatenate([kernel.step_size for kernel in kernels])
    arrays |= _table_arrays(kernels, norm_dtype)
    arrays |= _first_last_arrays(network)
    arrays |= _plane_arrays(network, kernels)
    metadata = {
        "format": PACKED_FORMAT,
        "version": str(PACKED_VERSION),
        "description": json.dumps(
            describe(network) | {"tables": norm_dtype}, separators=(",", ":")
        ),
        "sha256": json.dumps(
            {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()},
            separators=(",", ":"),
        ),
        "header_sha256": _ZEROS,
    }
    # Largest numbers first, for alignment; planes last, in their order. safetensors would order the
    # metadata anew each time, but the same network must give the same bytes.
    ordered = sorted(arrays, key=lambda name: (name.startswith("plane."), -arrays[name].itemsize))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in ordered:
        begin, end = end, end + arrays[name].nbytes
        dtype = next(key for key, kind in _DTYPES.items() if kind == arrays[name].dtype)
        shape = list(arrays[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = struct.pack("<Q", len(text)) + text
    raw = raw.replace(_ZEROS.encode(), _header_digest(raw).encode())
    return raw + b"".join(arrays[name].tobytes() for name in ordered)


def save_packed(
    path: str | pathlib.Path,
    network: IntegerModel,
    norm_dtype: str = "float32",
    *,
    overwrite: bool = False,
) -> None:
    """Writes the packed file of a network. Arguments and errors: `pack`, `files.write_new`."""
    write_new(path, pack(network, norm_dtype), overwrite=overwrite)


def _header_digest(header: bytes) -> str:
    """Returns the SHA-256 of length and header, with zeros in place of this digest."""
    return hashlib.sha256(header).hexdigest()


def _table_arrays(kernels: list[Kernel], dtype: str) -> dict[str, np.ndarray]:
    if dtype not in NORM_DTYPES:
        raise UserError(f"packed file: tables of {dtype!r}; choose from {', '.join(NORM_DTYPES)}")
    both = [(k.multiplier, k.offset) for k in kernels]
    if dtype == "float32":
        return {"norms": np.concatenate([np.stack(pair).ravel() for pair in both])}
    scales, values = [], []
    for pair in both:
        table = np.stack(pair)  # [2, P, n, C]
        scale = np.abs(table).max(-1, keepdims=True)
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        scales.append(scale.ravel())
        values.append((table / scale).astype(np.float16).ravel())
    return {"norms": np.concatenate(values), "norm_scales": np.concatenate(scales)}


def _first_last_arrays(network: IntegerModel) -> dict[str, np.ndarray]:
    stem, head = network.stem, network.head
    arrays = {"head.bias": head.bias, "head.kernel": head.kernel}
    if isinstance(stem, FloatStem):
        arrays["stem.kernel"] = stem.kernel
        arrays["stem.norm"] = np.stack([stem.multiplier, stem.offset])
    else:
        (kernel,) = stem.kernels
        assert head.step_sizes is not None
        arrays["stem.kernel"] = kernel.codes[0]
        arrays["stem.norm"] = np.stack([kernel.multiplier[0, 0], kernel.offset[0, 0]])
        step_sizes = [stem.step_size[0], kernel.step_size[0], *head.step_sizes]
        arrays["end_steps"] = np.asarray(step_sizes, np.float32)
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _plane_arrays(network: IntegerModel, kernels: list[Kernel]) -> dict[str, np.ndarray]:
    planes = {}
    for row, names in enumerate(network.quantizer.plane_names(network.space)):
        for bit, name in zip(reversed(range(len(names))), names, strict=True):
            # Two's complement: the arithmetic shift brings the wanted bit down.
            bits = [np.packbits((k.codes[row].ravel() >> bit) & 1) for k in kernels]
            planes[name] = np.concatenate(bits)
    return planes


def load_packed(path: str | pathlib.Path, planes: int | None = None) -> IntegerModel:
    """Reads a packed file, whole or cut after some of its planes.

    Memory stays within a small multiple of the file's size, also for a damaged file.

    Args:
      path: of the file.
      planes: how many of the planes in the file to use; None: all.

    Returns:
      the network, with the widths that the planes give (a width b needs b planes; b + 1 with
      "double" weights, unless b is the widest).

    Raises:
      UserError: no such file, not a packed file, damaged, cut elsewhere than after a plane, or too
        few planes for any width.

    Examples:
      >>> from bitmixer_jax.export.packed import load_packed
      >>> load_packed("net.packed").space.choices  # doctest: +SKIP
      (2, 3, 4)
      >>> load_packed("net.packed", planes=3).space.choices  # doctest: +SKIP
      (2, 3)
    """
    return unpack(read_user_file(path, "packed file")[1], str(path), planes)


def plane_ends(path: str | pathlib.Path) -> list[tuple[int, int]]:
    """Returns where a whole packed file may be cut: (number of planes, bytes), ascending.

    It is empty if widths are not nested. Errors are those of `load_packed`.
    """
    read = Reader(str(path))
    header, _, start = _header(read, read_user_file(path, "packed file")[1])
    planes = [name for name in header if name.startswith("plane.")]
    if any(name.count(".") > 1 for name in planes):
        return []
    ends = sorted(start + _offsets(read, header[name])[1] for name in planes)
    return list(enumerate(ends, start=1))


def unpack(data: bytes, where: str, planes: int | None = None) -> IntegerModel:
    """Reads the bytes of a packed file.

    Args:
      data: the bytes.
      where: names them in errors.
      planes: as in `load_packed`.

    Returns:
      the network; errors and widths are those of `load_packed`.
    """
    read = Reader(where)
    header, metadata, start = _header(read, data)
    try:
        description = parse_json(read.text_of(metadata, "description"))
        digests = parse_json(read.text_of(metadata, "sha256"))
    except UserError:
        raise
    except ValueError:
        read.fail("its description is not JSON")
    whole = read.space(read.field(description, "choices", list))
    quantizer = read.quantizer(description.get("weight_kind"))
    names = plane_names(whole.choices, quantizer.name)
    arrays, there = _arrays(read, header, data, start, digests, names)
    if planes is not None:
        if not quantizer.nested:
            raise UserError(
                f"{where}: planes={planes}: its widths are not nested; it has no prefix"
            )
        if not 1 <= planes <= there:
            raise UserError(f"{where}: planes={planes}; there are {there}")
        there = planes
    elif not quantizer.nested and there < len(names):
        read.fail(f"cut off: {there} of {len(names)} planes, and its widths are not nested")
    kept = tuple(b for b in whole.choices if quantizer.planes(b, whole) <= there)
    if not kept:
        raise UserError(
            f"{where}: {there} planes are too few for any of its widths {whole.choices}"
        )
    return PackedReader(read, description, arrays, whole, kept, quantizer, there).build()


def _header(read: Reader, data: bytes) -> tuple[Mapping[str, Any], Mapping[str, Any], int]:
    """Returns the header, its metadata, and where the numbers start."""
    if len(data) < 8:
        read.fail("cut off in its header")
    size = struct.unpack("<Q", data[:8])[0]
    if size > _HEADER_MOST:
        read.fail("not a safetensors file")
    if 8 + size > len(data):
        read.fail("cut off in its header, or not a safetensors file")
    raw = data[: 8 + size]
    try:
        header = parse_json(raw[8:].decode())
        metadata = header.pop("__metadata__")
        found = metadata["header_sha256"]
        ours = metadata["format"] == PACKED_FORMAT
        version = metadata["version"]
    except (ValueError, KeyError, TypeError, AttributeError):
        read.fail("not a packed file of this library")
    if not ours:
        read.fail("not a packed file of this library")
    if version != str(PACKED_VERSION):
        raise UserError(
            f"{read.where}: version {shown(version)}; this library reads {PACKED_VERSION}",
            "wrong-format",
        )
    if type(found) is not str or not _DIGEST.fullmatch(found) or raw.count(found.encode()) != 1:
        read.fail("its header has no checksum")
    if _header_digest(raw.replace(found.encode(), _ZEROS.encode())) != found:
        read.fail("the checksum of its header differs")
    return header, metadata, 8 + size


def _arrays(
    read: Reader,
    header: Mapping[str, Any],
    data: bytes,
    start: int,
    digests: Any,
    planes: list[str],
) -> tuple[dict[str, np.ndarray], int]:
    """Returns all tensors, checked against their checksums, and how many planes there are."""
    arrays: dict[str, np.ndarray] = {}
    end, there = start, 0
    ordered = sorted(header, key=lambda name: tuple(_offsets(read, header[name])))
    if ordered[-len(planes) :] != planes:
        read.fail("its planes are not at its end")
    for name in ordered:
        begin, stop = (start + offset for offset in _offsets(read, header[name]))
        if begin != end or stop < begin:
            read.fail("its tensors leave gaps")
        if stop > len(data):
            if name in planes and begin == len(data) and there:
                break  # cut after a plane
            read.fail(f"cut off within {name}")
        end = stop
        entry = header[name]
        dtype = _DTYPES.get(str(entry.get("dtype")))
        shape = entry.get("shape")
        if dtype is None or type(shape) is not list or len(shape) > 8:
            read.fail(f"{name} has no dtype or shape")
        sizes = read.wholes(shape, len(shape), 0, len(data), f"shape of {name}")
        if math.prod(sizes) * np.dtype(dtype).itemsize != stop - begin:
            read.fail(f"{name} has another size than its shape")
        part = data[begin:stop]
        if type(digests) is not dict or hashlib.sha256(part).hexdigest() != digests.get(name):
            read.fail(f"the checksum of {name} differs")
        arrays[name] = np.frombuffer(part, dtype).reshape(sizes)
        there += name in planes
    if end != len(data):
        read.fail("something follows its tensors")
    return arrays, there


def _offsets(read: Reader, entry: Any) -> tuple[int, ...]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return read.wholes(offsets, 2, 0, 2**62, "data_offsets")
