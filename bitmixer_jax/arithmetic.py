"""The convolution of codes or real values, with its gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bitmixer_jax.layer_table import Padding


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    groups: int,
    dtype: str,
    exact: bool,
) -> jax.Array:
    """Convolves with operands in ``dtype`` and sums in float32, also in the backward pass.

    Args:
      exact: whether the operands are codes. Products of codes of up to 8 bits are exact even in the
        bfloat16 passes that accelerators run by default. So codes use that precision, whatever
        `jax.default_matmul_precision` asks for the real values around them.
    """
    return lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=lax.Precision.DEFAULT if exact else None,
        preferred_element_type=jnp.float32,
    )


def _forward(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    groups: int,
    dtype: str,
    exact: bool,
) -> Any:
    return conv(x, kernel, strides, padding, groups, dtype, exact), (
        x.astype(dtype),
        kernel.astype(dtype),
    )


def _backward(
    strides: tuple[int, int],
    padding: Padding,
    groups: int,
    dtype: str,
    exact: bool,
    residuals: Any,
    g: jax.Array,
) -> Any:
    # Autodiff of a bfloat16 convolution with float32 sums mixes dtypes, which XLA refuses: so the
    # cotangent is cast, and the transposed convolutions are those of the plain operation.
    x, kernel = residuals
    plain = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    _, transpose = jax.vjp(lambda x, kernel: plain(x, kernel), x, kernel)
    return tuple(t.astype(jnp.float32) for t in transpose(g.astype(dtype)))


conv.defvjp(_forward, _backward)
