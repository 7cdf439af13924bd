"""Classifies image files with an export or a workdir."""

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
      policy: as `policy.as_policy` reads it; None: the widest width everywhere. An ONNX file of one
        policy takes none.
      changes: widths of some layers, by name: see `policy.with_widths`.
      top: how many classes.

    Returns:
      each path with its best classes and their probabilities, in descending order.

    Raises:
      UserError: no such model, a policy that does not fit, or a file that is no image.
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
        chosen = network.space.widest if policy is None else policy
        logits = run(images, as_policy(chosen, network.names, network.space, changes))
    elif policy is None and not changes:
        logits = run(images)
    else:
        raise UserError(
            f"{model}: holds one policy; export without a policy to choose here", "conflict"
        )
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    best = np.argsort(-shares, axis=-1, kind="stable")[:, :top]
    return [
        (path, [(network.classes[i], float(row[i])) for i in order])
        for path, row, order in zip(paths, shares, best, strict=True)
    ]
