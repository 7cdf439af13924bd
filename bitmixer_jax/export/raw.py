"""The variables of a network as safetensors, under the names that they have in training.

    params/LAYER/input/step            [n]  step size of the layer's input at each width
    params/LAYER/conv/kernel           [kh, kw, C_in / groups, C_out]  float32 master weights
    params/LAYER/conv/step             [1], or [n] if the quantiser is not nested
    params/LAYER/conv_norm/scale, bias           [P, n, C]  transitional BN, a slice for each pair
    batch_stats/LAYER/conv_norm/mean, var        [P, n, C]
    batch_stats/LAYER/conv_norm/count            [P, n]  training steps that used the pair
    params/stem/..., params/head/kernel, params/head/bias

A projection shortcut adds ``shortcut`` and ``shortcut_norm`` to its layer. Training can continue
from these variables. For deployment take another format, without float copies of the weights.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.files import read_user_file, write_new


def export_raw(
    variables: Mapping[str, Any],
    path: str | pathlib.Path,
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes the variables of a network.

    Args:
      variables: "params" and "batch_stats".
      path: of the file.
      metadata: texts that the header of the file keeps.
      overwrite: replace a file that exists.

    Raises:
      UserError: safetensors is not installed, or the file cannot be written.
    """
    try:
        from safetensors.numpy import save
    except ImportError:
        raise UserError(
            "safetensors is not installed: pip install safetensors", "not-installed"
        ) from None
    leaves = traverse_util.flatten_dict(dict(variables), sep="/")
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    write_new(path, save(arrays, dict(metadata or {})), overwrite=overwrite)


def load_raw(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a file of `export_raw`.

    Returns:
      the variables as numpy arrays, bit for bit.

    Raises:
      UserError: no such file, or it is damaged, or another kind of file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path, content = read_user_file(path)
    try:
        arrays = load(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a safetensors file, or damaged ({reason(error)})", "damaged"
        ) from None
    if not any(name.startswith("params/") for name in arrays):
        raise UserError(f"{path}: holds no variables of a network (params/...)", "wrong-format")
    parts = {tuple(name.split("/")) for name in arrays}
    if any(name[:depth] in parts for name in parts for depth in range(1, len(name))):
        raise UserError(f"{path}: damaged: one of its names begins with another", "damaged")
    return traverse_util.unflatten_dict(arrays, sep="/")
