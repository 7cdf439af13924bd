"""Predictions of image files by an export or a workdir."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.files import user_path
from bitmixer_jax.policy import parse_changes, parse_policy, with_widths
from bitmixer_jax.runtime import Runtime


def predict_files(
    model: str,
    paths: Sequence[pathlib.Path],
    policy: str = "",
    changes: Sequence[str] = (),
    top: int = 5,
) -> list[tuple[pathlib.Path, list[tuple[str, float]]]]:
    """Classifies image files.

    Args:
      model: a packed file, an ONNX file (".onnx"), or a workdir.
      policy: as `policy.parse_policy` reads it; empty: the widest width everywhere. An ONNX file of
        one policy takes none.
      changes: to the policy, as `policy.parse_changes` reads them.
      top: how many classes.

    Returns:
      each path with its best classes and their probabilities, in descending order.

    Raises:
      UserError: no such model, a policy that does not fit, or a file that is no image.
    """
    if top < 1:
        raise UserError(f"--top {top}: give 1 or more")
    if not paths:
        raise UserError("predict: name an image file")
    if model.endswith(".onnx") and not os.path.isdir(user_path(model)):
        logits, classes = _by_onnx(model, paths, policy, changes)
    else:
        runtime = Runtime.load(model, batch_size=min(64, len(paths)))
        images = runtime.reader.read(paths)
        widths = parse_policy(policy or str(runtime.space.widest), runtime.names, runtime.space)
        widths = with_widths(widths, parse_changes(changes), runtime.names, runtime.space)
        logits, classes = runtime.predict(images, widths), runtime.classes
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    best = np.argsort(-shares, axis=-1, kind="stable")[:, :top]
    return [
        (path, [(classes[i], float(row[i])) for i in order])
        for path, row, order in zip(paths, shares, best, strict=True)
    ]


def _by_onnx(
    model: str, paths: Sequence[pathlib.Path], policy: str, changes: Sequence[str]
) -> tuple[np.ndarray, Sequence[str]]:
    from bitmixer_jax.export.onnx_runner import OnnxRunner

    runner = OnnxRunner(model)
    images = runner.reader.read(paths)
    if not runner.switchable:
        if policy or changes:
            raise UserError(f"{model}: holds one policy; export without --policy to choose here")
        return runner(images), runner.classes
    widths = parse_policy(policy or str(runner.space.widest), runner.names, runner.space)
    widths = with_widths(widths, parse_changes(changes), runner.names, runner.space)
    return runner(images, widths), runner.classes
