"""Runs an exported ONNX file in onnxruntime."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmixer_jax.data import ImageReader
from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.export.description import Reader, Shape
from bitmixer_jax.export.onnx_seal import FORMAT, KEY, VERSION, is_whole
from bitmixer_jax.files import parse_json, read_user_file
from bitmixer_jax.loaded_model import check_images
from bitmixer_jax.policy import BitSpace, check_policy

OPTIMIZATION = ("off", "basic", "default")
_MOST_BYTES = 2**31  # of a protobuf message
# The metadata keys of version 1. A newer file without a valid checksum must not pass as version 1.
_OLD_KEYS = {
    *("format", "version", "form", "choices", "layers", "policy", "classes", "image_shape"),
    *("normalisation", "mean", "std", "network"),
}


class OnnxRunner:
    """Runs an exported file: ``runner(images, policy)`` returns logits.

    Attributes:
      switchable: whether the policy is an input.
      image_shape: ``(H, W, C)``.
      reader: reads image files as evaluation did.
      space: the choices.
      names: ``[L]`` layer names.
      classes: ``[K]`` names.
      policy: int32 ``[L]`` of a file of one policy, else None.
    """

    def __init__(self, path: str | pathlib.Path, optimization: str = "default", threads: int = 0):
        """Checks the file and loads it.

        The checksum of the whole file is checked before onnxruntime reads it. A file of version 1
        has no checksum: it is read, and a line of the log says so.

        Args:
          optimization: of onnxruntime: "off", "basic" or "default".
          threads: 0: onnxruntime decides.

        Raises:
          UserError: no such file, not one of this library, damaged, or onnxruntime is not
            installed.
        """
        try:
            import onnxruntime
        except ImportError:
            raise UserError(
                "onnxruntime is not installed: pip install 'bitmixer_jax[onnx]'", "not-installed"
            ) from None
        level = onnxruntime.GraphOptimizationLevel
        levels = dict(zip(OPTIMIZATION, _levels(level), strict=True))
        if optimization not in levels:
            raise UserError(f"optimization {optimization!r}: one of {', '.join(OPTIMIZATION)}")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = levels[optimization]
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors: they are raised, too
        path, content = read_user_file(path, "ONNX file", _MOST_BYTES)
        whole = is_whole(content)
        if whole is False:
            raise UserError(
                f"{path}: its checksum differs: the file is damaged, or was changed after its "
                "export; export it again",
                "damaged",
            )
        try:
            self._session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
            about = self._session.get_modelmeta().custom_metadata_map
        except Exception as error:  # onnxruntime raises many kinds
            raise UserError(
                f"{path}: not an ONNX export, or damaged ({reason(error)})", "damaged"
            ) from None
        if about.get("format") != FORMAT:
            raise UserError(
                f"{path}: not an ONNX export: its metadata is not that of bitmixer", "wrong-format"
            )
        self._read(Reader(str(path)), about, sealed=whole is not None)
        if whole is None:
            logging.getLogger(__name__).warning(
                "%s: has no checksum, so damage may go unnoticed; export it again", path
            )

    def _read(self, read: Reader, about: Mapping[str, str], sealed: bool) -> None:
        """Reads the metadata and checks them against the inputs and outputs of the graph."""
        if sealed != (about.get("version") == str(VERSION)):
            read.fail("its version and its checksum do not go together")
        if set(about) != _OLD_KEYS | ({KEY, "images"} if sealed else set()):
            read.fail("its metadata has other entries than an export")

        def of(key: str) -> Any:
            try:
                return parse_json(about[key])
            except ValueError:
                read.fail(f"{key} in its metadata is not JSON")

        self.image_shape: Shape = read.image_shape(of("image_shape"))
        how = of("images") if sealed else {}
        self.reader = ImageReader.from_json(how, self.image_shape, read.where)
        self.space: BitSpace = read.space(of("choices"))
        self.names: tuple[str, ...] = read.texts(of("layers"), "layers")
        self.classes: tuple[str, ...] = read.texts(of("classes"), "classes")
        for key in ("mean", "std"):
            read.numbers(of(key), self.image_shape[2], key)
        if not self.names or not self.classes or len(set(self.names)) != len(self.names):
            read.fail("its layers or classes are empty, or a layer occurs twice")
        widths = of("policy")
        self.switchable = widths is None
        self.policy: np.ndarray | None = None
        if widths is not None:
            given = read.wholes(widths, len(self.names), 2, 8, "policy")
            if not set(given) <= set(self.space.choices):
                read.fail("policy is not of its choices")
            self.policy = np.asarray(given, np.int32)
        wanted: dict[str, tuple[str, tuple[int, ...]]]
        wanted = {"images": ("tensor(uint8)", self.image_shape)}
        if self.switchable:
            wanted["policy"] = ("tensor(int64)", ())
        found = {value.name: value for value in self._session.get_inputs()}
        if set(found) != set(wanted):
            read.fail(f"its graph does not take {' and '.join(wanted)}")
        for name, (kind, shape) in wanted.items():
            first = len(self.names) if name == "policy" else None
            _agrees(read, found[name], kind, first, shape)
        outputs = self._session.get_outputs()
        if [value.name for value in outputs] != ["logits"]:
            read.fail("its graph does not give logits alone")
        _agrees(read, outputs[0], "tensor(float)", None, (len(self.classes),))

    def __call__(self, images: np.ndarray, policy: Any = None) -> np.ndarray:
        """Computes logits float32 ``[N, K]`` of images uint8 ``[N, H, W, C]``.

        Args:
          policy: ``[L]`` widths or one for all layers; only for a switchable file.

        Raises:
          UserError: images or a policy that do not fit, a policy for a file that holds one already,
            or an error of onnxruntime.
        """
        feed: dict[str, Any] = {"images": check_images(images, self.image_shape)}
        if self.switchable:
            if policy is None:
                raise UserError("a switchable ONNX file: give a policy", "missing-value")
            feed["policy"] = check_policy(policy, self.space, len(self.names)).astype(np.int64)
        elif policy is not None:
            raise UserError(
                "this ONNX file holds one policy; export a switchable one to choose", "conflict"
            )
        try:
            return np.asarray(self._session.run(["logits"], feed)[0])
        except Exception as error:  # of a damaged file without a checksum, or no memory
            raise UserError(f"onnxruntime cannot run this ONNX file ({reason(error)})") from None


def _levels(level: Any) -> tuple[Any, ...]:
    """Returns onnxruntime's levels in the order of OPTIMIZATION."""
    return level.ORT_DISABLE_ALL, level.ORT_ENABLE_BASIC, level.ORT_ENABLE_ALL


def _agrees(read: Reader, value: Any, kind: str, first: int | None, rest: tuple[int, ...]) -> None:
    """Fails unless an input or output is of that type and shape.

    Args:
      first: the first size; None: any, as of a batch.
    """
    shape = list(value.shape)
    if value.type != kind or shape[1:] != list(rest) or len(shape) != 1 + len(rest):
        read.fail(f"{value.name} of its graph is not what the metadata say")
    if first is None:
        if isinstance(shape[0], int):
            read.fail(f"the batch size of {value.name} is fixed in its graph")
    elif shape[0] != first:
        read.fail(f"{value.name} of its graph is not what the metadata say")
