"""Quantisers with learned step sizes: integer codes, a step, and straight-through gradients.

Every quantiser returns ``(codes, step)`` with ``v_hat = codes * step``. Codes are whole numbers
(halves for the floor-nested kind) held in floating point, so a convolution of codes is exact and
the steps multiply its result afterwards. With ``u = v / step_b`` at width b, the gradients are
those of LSQ (Esser et al., ICLR 2020, eq. 3 and 5):

    d v_hat / d v      = 1 strictly inside the clip, else 0
    d v_hat / d step_b = code - u strictly inside the clip, else the code at the clip

Weight quantisers ``WEIGHT_QUANTIZERS`` (w: weight, s: step size, h: widest width, d = h - b):

    floor        code = clip(floor(w / (s 2^d)), Qn, Qp) + 1/2,              step_b = s 2^d
                 nested: the integer part at b bits is the one at h bits, shifted right by d
                 (AdaBits; reported for Bit-Mixer)
    double       code = clip((q_h + 2^(d-1)) >> d, Qn, Qp),                  step_b = s 2^d
                 where q_h = clip(round(w / s), Qn_h, Qp_h)
                 nested, rounded twice (Double Rounding, arXiv 2502.01199)
    independent  code = clip(round(w / s_b), Qn, Qp),                        step_b = s_b
                 one step size per width (plain LSQ); not nested

The gradient of a step size is multiplied by LSQ's ``g = 1 / sqrt(N Qp)``, which makes its relative
update about as large as that of the weights. For the shared step of a nested quantiser the same
balance asks for ``g / 4^d`` (our derivation): ``d L / d s = g 2^-d d L / d step_b``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from bitmixer_jax import deprecated
from bitmixer_jax.policy import BitSpace

WEIGHT_QUANTIZERS = ("floor", "double", "independent")
_MIN_STEP = 1e-8


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer code (Qn, Qp) of a width: -2^(b-1)..2^(b-1)-1 or 0..2^b-1."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def step_size_count(kind: str, space: BitSpace) -> int:
    """How many step sizes a weight quantiser learns: one if nested, else one per width."""
    return space.n if kind == "independent" else 1


def init_step_size(v: jax.Array, bits: int, signed: bool) -> jax.Array:
    """LSQ's first step size, ``2 mean|v| / sqrt(Qp)``: a float32 scalar.

    Where all of v is zero, that of a rectified standard normal (mean|v| = 0.4).
    """
    mean = jnp.mean(jnp.abs(v.astype(jnp.float32)))
    return 2 * jnp.where(mean > 0, mean, 0.4) / math.sqrt(integer_range(bits, signed)[1])


def gradient_scale(elements: int, bits: int, signed: bool) -> float:
    """LSQ's factor on the gradient of a step size, ``1 / sqrt(N Qp)``."""
    return 1 / math.sqrt(elements * integer_range(bits, signed)[1])


def weight_codes(
    w: jax.Array, steps: jax.Array, index: Any, space: BitSpace, kind: str = "floor"
) -> tuple[jax.Array, jax.Array]:
    """Quantises weights to the width ``space.choices[index]``.

    Args:
      w: weights, any shape, float32.
      steps: ``[1]`` step size of the widest width (nested kinds) or ``[n]`` (independent).
      index: int, or int32 scalar (may be traced).
      kind: one of ``WEIGHT_QUANTIZERS``.

    Returns:
      codes like w, and the float32 scalar step that multiplies them. The gradient of `steps` is
      already scaled, see the top of the file.
    """
    qn, qp, shift = _lookup(
        [(*integer_range(b, True), 2.0 ** (space.widest - b)) for b in space.choices], index
    )
    scale = _lookup([(gradient_scale(w.size, b, True),) for b in space.choices], index)[0]
    # A shared step s moves in proportion as the step in use, s_b = s shift, would on its own:
    # hence d s_b / d s = 1 / shift. The chain rule's shift is 4^d times that: at two bits of
    # {2, 3, 4} the step moves 16 times faster than LSQ's balance with the weights, and diverges.
    if kind == "independent":
        step = _scaled_step(steps[index], scale)
        return _codes("round", w, step, jnp.float32(1), qn, qp), step
    step = _scaled_step(steps[0], scale / jnp.square(shift))
    return _codes(kind, w, step, shift, qn, qp), step * shift


def activation_codes(
    x: jax.Array, steps: jax.Array, index: Any, space: BitSpace, signed: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Quantises activations to the width ``space.choices[index]``.

    Args:
      x: ``[N, ...]`` float32.
      steps: ``[n]`` one step size per width.
      index: int, or int32 scalar (may be traced).
      signed: grid -2^(b-1)..2^(b-1)-1 (inputs of a linear bottleneck) instead of 0..2^b-1.

    Returns:
      codes like x, and the float32 scalar step that multiplies them. In the gradient scale, N is
      the number of features of one example (LSQ's N_F), so it does not depend on the batch.
    """
    features = math.prod(x.shape[1:])
    qn, qp, scale = _lookup(
        [(*integer_range(b, signed), gradient_scale(features, b, signed)) for b in space.choices],
        index,
    )
    step = _scaled_step(steps[index], scale)
    return _codes("round", x, step, jnp.float32(1), qn, qp), step


def activation_step(steps: jax.Array, index: int) -> jax.Array:
    """The step size in use of an input, of ``steps`` ``[n]`` at ``index``: a float32 scalar."""
    return jnp.maximum(jnp.asarray(steps)[index], _MIN_STEP)


def _lookup(rows: list[tuple[float, ...]], index: Any) -> tuple[jax.Array, ...]:
    """Row ``index`` of a small constant table (exact, which a traced exp2 need not be)."""
    row = jnp.asarray(rows, jnp.float32)[index]
    return tuple(row[i] for i in range(len(rows[0])))


def _scaled_step(step: jax.Array, scale: jax.Array) -> jax.Array:
    """The step size with its gradient multiplied by ``scale``, kept positive.

    A step that an update pushed to zero or below takes the smallest value, yet still gets its
    gradient, so that it can return.
    """
    moving = scale * (step - jax.lax.stop_gradient(step))
    return jax.lax.stop_gradient(jnp.maximum(step, _MIN_STEP)) + moving


def _to_codes(kind: str, u: jax.Array, shift: Any, qn: Any, qp: Any) -> jax.Array:
    """Codes of ``u = v / step``."""
    if kind == "round":
        return jnp.clip(jnp.round(u), qn, qp)
    if kind == "floor":
        # u / shift is exact, as shift is a power of two: the codes nest.
        return jnp.clip(jnp.floor(u / shift), qn, qp) + 0.5
    if kind == "double":
        widest = jnp.clip(jnp.round(u), qn * shift, (qp + 1) * shift - 1)
        return jnp.clip(jnp.floor(widest / shift + 0.5), qn, qp)
    raise ValueError(f"unknown quantiser kind {kind!r}; choose from {WEIGHT_QUANTIZERS}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def _codes(
    kind: str,
    v: jax.Array,
    step: jax.Array,
    shift: jax.Array,
    qn: jax.Array,
    qp: jax.Array,
    divide: bool = False,
) -> jax.Array:
    """Codes of ``v`` on the grid of pitch ``step * shift``; the gradient is straight-through.

    Times the reciprocal: of v / step XLA makes now a division, now this, and codes of values at a
    boundary would depend on what else is in the programme. Other engines do the same. Only where a
    gradient is taken it divides: XLA computes products again for each of their readers, quotients
    once, which saves a sixth of a step on CPU (docs/performance.md).
    """
    return _to_codes(kind, v / step if divide else v * (1 / step), shift, qn, qp)


def _codes_forward(
    kind: str, v: jax.Array, step: Any, shift: Any, qn: Any, qp: Any, divide: bool
) -> Any:
    # _codes, not _to_codes: a second derivative goes through this, and floor would stop it.
    return _codes(kind, v, step, shift, qn, qp, True), (v, step, shift, qn, qp)


def _codes_backward(kind: str, divide: bool, residuals: Any, g: jax.Array) -> Any:
    """With code = u inside the clip: d code / d v = 1 / (step shift), d code / d step = -u / step.

    Together with v_hat = code * step this gives the formulas at the top of the file.
    """
    v, step, shift, qn, qp = residuals
    u = v / step / shift
    top = qp + 1 if kind == "floor" else qp  # floor reaches its top code over a whole unit
    g_inside = jnp.where((u > qn) & (u < top), g, 0)
    d_step = -jnp.sum(g_inside * u) / step
    return g_inside / (step * shift), d_step, None, None, None


_codes.defvjp(_codes_forward, _codes_backward)


def code_histogram(codes: jax.Array, bits: int, signed: bool) -> jax.Array:
    """How often each integer code of a width occurs: int32 ``[2^bits]``, from Qn to Qp.

    A "4-bit" layer that uses 15 levels, or one that was never quantised, shows here.
    """
    qn, _ = integer_range(bits, signed)
    whole = jnp.floor(codes).astype(jnp.int32).ravel() - qn
    return jnp.bincount(whole, length=2**bits)


__getattr__ = deprecated.module_getattr(__name__)
