"""The images that a network is given to run, checked the same way by every engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError


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
