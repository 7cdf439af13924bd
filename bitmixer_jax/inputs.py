"""What a network is given to run: images and a policy, checked the same way by every engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.policy import BitSpace


def check_images(images: Any, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Returns images as uint8 ``[N, H, W, C]``, N at least 1.

    Raises:
      UserError: they are of another type or shape.
    """
    wanted = f"give uint8 (N, {', '.join(map(str, image_shape))}), N at least 1"
    try:
        given = np.asarray(images)
    except (ValueError, RuntimeError, TypeError) as error:  # such as tensors on another device
        line = str(error).partition("\n")[0][:200]
        raise UserError(f"images: numpy cannot read them ({line}); {wanted}") from None
    if given.dtype != np.uint8 or given.shape[1:] != tuple(image_shape) or not len(given):
        raise UserError(f"images: got {given.dtype} {given.shape}; {wanted}")
    return given


def check_policy(policy: Any, space: BitSpace, num_layers: int) -> np.ndarray:
    """Returns one policy as int32 ``[L]``.

    Args:
      policy: ``[L]`` widths, or one width for all layers; whole numbers of any kind.

    Raises:
      UserError: it is no such thing, or several policies, or does not fit the network.
    """
    try:
        alone = np.asarray(policy)
    except (ValueError, RuntimeError, TypeError):  # `BitSpace.check` says what is wrong
        alone = np.zeros(0)
    if alone.ndim == 0 and np.issubdtype(alone.dtype, np.integer):
        policy = np.full(num_layers, alone)
    checked = space.check(policy, num_layers)
    if checked.ndim != 1:
        raise UserError(f"policy: got {len(checked)} policies; give one, a width for each layer")
    return checked
