"""Classifies image files with a packed file, an ONNX file or a workdir."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.files import user_path
from bitmixer_jax.policy import as_policy
from bitmixer_jax.runtime import Runtime


def predict_files(
    model: str | pathlib.Path,
    paths: Sequence[str | pathlib.Path],
    policy: Any = None,
    changes: Mapping[str, int] | None = None,
    top: int = 5,
) -> list[tuple[str | pathlib.Path, list[tuple[str, float]]]]:
    """Classifies image files.

    Args:
      model: a packed file, an ONNX file (".onnx"), or a workdir.
      paths: of the image files.
      policy: ``[L]`` widths, one width for all layers, text such as "4,3,2,2,3,4", or a policy
        file; None: the widest width in all layers. An ONNX file with one policy takes none.
      changes: widths of some layers of the policy, by layer name. See `policy.with_widths`.
      top: number of classes to return for each image.

    Returns:
      (path, [(class name, probability in 0..1), ...]) for each image. The most probable class is
      first.

    Raises:
      UserError: the model or an image cannot be read, or the policy does not fit the network.

    Examples:
      >>> predict_files("digits.packed", ["photo.png"], policy=3, top=2)  # doctest: +SKIP
      [('photo.png', [('7', 0.93), ('1', 0.04)])]
    """
    if top < 1:
        raise UserError(f"top {top}: give 1 or more")
    if not paths:
        raise UserError("predict: name an image file", "missing-value")
    if str(model).endswith(".onnx") and not os.path.isdir(user_path(model)):
        from bitmixer_jax.export.onnx_runner import OnnxRunner

        network: Any = OnnxRunner(model)
        run = network
    else:
        network = Runtime.load(model, batch_size=min(64, len(paths)))
        run = network.predict
    images = network.reader.read(paths)
    if getattr(network, "switchable", True):
        policy = network.space.widest if policy is None else policy
        logits = run(images, as_policy(policy, network.names, network.space, changes))
    elif policy is None and not changes:
        logits = run(images)
    else:
        raise UserError(
            f"{model}: holds one policy; to choose a policy, export without one", "conflict"
        )
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    best = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top]
    return [
        (path, [(network.classes[i], float(row[i])) for i in order])
        for path, row, order in zip(paths, probabilities, best, strict=True)
    ]
