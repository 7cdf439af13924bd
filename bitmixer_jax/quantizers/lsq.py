"""Learned step size quantisation (LSQ): grids, step sizes, gradients, and activations.

With ``u = v / step_size``, and the codes limited to Qn..Qp, the gradients of
``v_hat = code * step_size`` are those of LSQ (Esser et al., ICLR 2020, eq. 3 and 5):

    d v_hat / d v         = 1 strictly inside the limits, else 0
    d v_hat / d step_size = code - u strictly inside the limits, else the code at the limit

The gradient of a step size is also multiplied by ``g = 1 / sqrt(N Qp)``. Its relative update is
then about as large as that of the values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bitmixer_jax.deprecated import renamed_arguments
from bitmixer_jax.policy import BitSpace

_MIN_STEP_SIZE = 1e-8
Grid = tuple[jax.Array, jax.Array, jax.Array]  # shift, Qn, Qp
Rounding = Callable[[jax.Array, Any, Any, Any], jax.Array]


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Returns the smallest and the largest integer code of a width: (Qn, Qp).

    The range is ``-2^(b-1)..2^(b-1) - 1`` if signed, else ``0..2^b - 1``.

    Args:
      bits: the width b.
      signed: whether the quantised values have both signs.

    Returns:
      (Qn, Qp).

    Examples:
      >>> integer_range(4, signed=True)
      (-8, 7)
      >>> integer_range(4, signed=False)
      (0, 15)

    Reference: Esser et al., Learned Step Size Quantization, ICLR 2020, section 2.
    """
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def init_step_size(v: jax.Array, bits: int, signed: bool) -> jax.Array:
    """Returns the step size that training starts from: ``2 mean|v| / sqrt(Qp)``.

    Args:
      v: the values to be quantised, any shape.
      bits: the width.
      signed: as in `integer_range`.

    Returns:
      a float32 scalar. If all of v is zero, that of a rectified standard normal (mean|v| = 0.4).

    Examples:
      >>> import jax.numpy as jnp
      >>> float(init_step_size(jnp.array([-1.0, 3.0]), bits=2, signed=True))  # Qp = 1
      4.0

    Reference: Esser et al., Learned Step Size Quantization, ICLR 2020, section 2.1.
    """
    mean = jnp.mean(jnp.abs(v.astype(jnp.float32)))
    return 2 * jnp.where(mean > 0, mean, 0.4) / math.sqrt(integer_range(bits, signed)[1])


def gradient_scale(elements: int, bits: int, signed: bool) -> float:
    """Returns LSQ's factor on the gradient of a step size: ``1 / sqrt(N Qp)``.

    Args:
      elements: N, how many values share the step size.
      bits: the width.
      signed: as in `integer_range`.
    """
    return 1 / math.sqrt(elements * integer_range(bits, signed)[1])


@renamed_arguments(steps="step_sizes")
def activation_codes(
    x: jax.Array, step_sizes: jax.Array, index: Any, space: BitSpace, signed: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Quantises activations to the width b = ``space.choices[index]``.

    ``codes = clip(round(x / step_sizes[index]), Qn, Qp)``

    The gradients are at the top of the file. In the gradient scale, N is the number of features of
    one example (LSQ's N_F), so it does not depend on the batch size.

    Args:
      x: float32 ``[N, ...]``.
      step_sizes: float32 ``[n]``, one for each width.
      index: int, or int32 scalar, which may be traced.
      space: the n widths.
      signed: as in `integer_range`; True for the inputs of a linear bottleneck.

    Returns:
      codes: float32, shape of x.
      step_size: the float32 scalar that multiplies the codes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bitmixer_jax import BitSpace
      >>> x = jnp.array([[-1.0, 0.5, 9.0]])
      >>> codes, step_size = activation_codes(x, jnp.array([0.5, 0.25]), 0, BitSpace((2, 4)))
      >>> codes.tolist(), float(step_size)
      ([[0.0, 1.0, 3.0]], 0.5)

    Reference: Esser et al., Learned Step Size Quantization, ICLR 2020, eq. 1-3.
    """
    features = math.prod(x.shape[1:])
    qn, qp, scale = lookup(
        [(*integer_range(b, signed), gradient_scale(features, b, signed)) for b in space.choices],
        index,
    )
    step_size = scale_gradient(step_sizes[index], scale)
    return straight_through(nearest, 0.0, x, step_size, (jnp.float32(1), qn, qp)), step_size


def activation_step_size(step_sizes: jax.Array, index: int) -> jax.Array:
    """Returns the step size that `activation_codes` multiplies by: a float32 scalar.

    Args:
      step_sizes: ``[n]``, the learned ones.
      index: of the width.
    """
    return jnp.maximum(jnp.asarray(step_sizes)[index], _MIN_STEP_SIZE)


def code_histogram(codes: jax.Array, bits: int, signed: bool) -> jax.Array:
    """Counts how often each integer code of a width occurs.

    It shows a "4-bit" layer that uses 15 levels, or one that was never quantised.

    Args:
      codes: of `weight_codes` or `activation_codes`, any shape.
      bits: the width.
      signed: as in `integer_range`; weights are signed.

    Returns:
      int32 ``[2^bits]``, the counts of Qn to Qp.

    Examples:
      >>> import jax.numpy as jnp
      >>> code_histogram(jnp.array([0.0, 1.0, 1.0, 3.0]), bits=2, signed=False).tolist()
      [1, 2, 0, 1]
    """
    qn, _ = integer_range(bits, signed)
    whole = jnp.floor(codes).astype(jnp.int32).ravel() - qn
    return jnp.bincount(whole, length=2**bits)


def lookup(rows: Sequence[tuple[float, ...]], index: Any) -> tuple[jax.Array, ...]:
    """Returns row ``index`` of a small constant table (exact, which a traced exp2 need not be)."""
    row = jnp.asarray(rows, jnp.float32)[index]
    return tuple(row[i] for i in range(len(rows[0])))


def scale_gradient(step_size: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the step size, kept positive, with its gradient multiplied by ``scale``.

    An update can push a step size to zero or below. It then takes the smallest value, but still
    gets its gradient, so that it can return.
    """
    moving = scale * (step_size - jax.lax.stop_gradient(step_size))
    return jax.lax.stop_gradient(jnp.maximum(step_size, _MIN_STEP_SIZE)) + moving


def nearest(u: jax.Array, shift: Any, qn: Any, qp: Any) -> jax.Array:
    """Rounds to the nearest code, as LSQ does; ``shift`` is 1."""
    return jnp.clip(jnp.round(u), qn, qp)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 5))
def straight_through(
    rounding: Rounding, half: float, v: jax.Array, step_size: Any, grid: Grid, divide: bool = False
) -> jax.Array:
    """Returns ``rounding(v / step_size, *grid)`` with the gradient of LSQ.

    This is a custom_vjp because the derivative of rounding is zero. The straight-through estimator
    takes it for 1 inside the limits. Outside it is 0: without that mask low widths lose accuracy.

    Args:
      rounding: gives the codes of ``u = v / step_size``.
      half: what the codes add to whole numbers.
      v: any shape, float32.
      step_size: float32 scalar.
      grid: (shift, Qn, Qp): the codes are ``step_size * shift`` apart, within the limits.
      divide: see the comment.
    """
    # The reciprocal: XLA makes of v / step_size now a division, now this, and codes of values at a
    # boundary would depend on the rest of the program. Other engines multiply, too. Only where a
    # gradient is taken it divides: XLA computes products again for each of their readers, quotients
    # once, which saves a sixth of a step on CPU (docs/performance.md).
    return rounding(v / step_size if divide else v * (1 / step_size), *grid)


def _forward(
    rounding: Rounding, half: float, v: jax.Array, step_size: Any, grid: Grid, divide: bool
) -> Any:
    # straight_through, not rounding: a second derivative goes through this (search/hessian.py), and
    # rounding would stop it.
    return straight_through(rounding, half, v, step_size, grid, True), (v, step_size, grid)


def _backward(rounding: Rounding, half: float, divide: bool, residuals: Any, g: jax.Array) -> Any:
    """Takes code = u inside the limits, u = v / (step_size shift), and a constant outside.

    So d code / d v = 1 / (step_size shift) and d code / d step_size = -u / step_size. Together with
    v_hat = code * step_size this gives the formulas at the top of the file.
    """
    v, step_size, (shift, qn, qp) = residuals
    u = v / step_size / shift
    top = qp + 2 * half  # a rounding down reaches its top code over a whole unit, qp..qp + 1
    g_inside = jnp.where((u > qn) & (u < top), g, 0)
    d_step_size = -jnp.sum(g_inside * u) / step_size
    return g_inside / (step_size * shift), d_step_size, None


straight_through.defvjp(_forward, _backward)
