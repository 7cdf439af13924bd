"""Runs an exported ONNX file in onnxruntime."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from bitmixer_jax.bits import BitSpace
from bitmixer_jax.data import ImageReader
from bitmixer_jax.errors import UserError
from bitmixer_jax.export.onnx_builder import FORMAT

OPTIMIZATION = ("off", "basic", "default")


class OnnxRunner:
    """An exported file, loaded: ``runner(images, policy)`` gives logits.

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
        """Loads the file.

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
                "onnxruntime is not installed: pip install 'bitmixer_jax[onnx]'"
            ) from None
        level = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = dict(
            off=level.ORT_DISABLE_ALL, basic=level.ORT_ENABLE_BASIC, default=level.ORT_ENABLE_ALL
        )[optimization]
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors: they are raised, too
        try:
            content = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            self._session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
            about = self._session.get_modelmeta().custom_metadata_map
            if about.get("format") != FORMAT:
                raise ValueError("its metadata is not that of bitmixer")
            height, width, channels = json.loads(about["image_shape"])
            self.image_shape: tuple[int, int, int] = (height, width, channels)
            how = json.loads(about.get("images", "{}"))
            self.reader = ImageReader.from_json(how, self.image_shape, str(path))
            self.space = BitSpace(tuple(json.loads(about["choices"])))
            self.names: tuple[str, ...] = tuple(json.loads(about["layers"]))
            self.classes: tuple[str, ...] = tuple(json.loads(about["classes"]))
            widths = json.loads(about["policy"])
        except Exception as error:  # whatever onnxruntime and JSON make of it
            line = str(error).partition("\n")[0]
            raise UserError(f"{path}: not an ONNX export, or damaged ({line})") from None
        self.switchable = widths is None
        self.policy = None if widths is None else self.space.check(widths, len(self.names))

    def __call__(self, images: np.ndarray, policy: Any = None) -> np.ndarray:
        """Logits float32 ``[N, K]`` of images uint8 ``[N, H, W, C]``.

        Args:
          policy: ``[L]`` widths, for a switchable file alone.

        Raises:
          UserError: a policy that does not fit, or one for a file that holds one already.
        """
        feed: dict[str, Any] = {"images": np.asarray(images, np.uint8)}
        if self.switchable:
            if policy is None:
                raise UserError("a switchable ONNX file: give a policy")
            feed["policy"] = self.space.check(policy, len(self.names)).astype(np.int64)
        elif policy is not None:
            raise UserError("this ONNX file holds one policy; export a switchable one to choose")
        return np.asarray(self._session.run(["logits"], feed)[0])
