"""The weight quantisers, one class each; whatever depends on the choice is asked of its object.

Notation: w weights, s learned step size, b bits, h the widest width, d = h - b.

    floor        code = clip(floor(w / (s 2^d)), Qn, Qp) + 1/2,              step size s 2^d
                 nested: the integer part at b bits is the one at h bits, shifted right by d
                 (AdaBits; reported for Bit-Mixer)
    double       code = clip((q_h + 2^(d-1)) >> d, Qn, Qp),                  step size s 2^d
                 where q_h = clip(round(w / s), Qn_h, Qp_h)
                 nested, rounded twice (Double Rounding, arXiv 2502.01199)
    independent  code = clip(round(w / s_b), Qn, Qp),                        step size s_b
                 one step size for each width (plain LSQ); not nested
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bitmixer_jax.deprecated import renamed_arguments
from bitmixer_jax.policy import BitSpace
from bitmixer_jax.quantizers.lsq import (
    gradient_scale,
    integer_range,
    lookup,
    nearest,
    scale_gradient,
    straight_through,
)


class WeightQuantizer:
    """Turns the weights of a kernel into integer codes, at any width of a network.

    Objects have no state; `WEIGHT_QUANTIZERS` holds one of each class. A new quantiser is a new
    subclass there: layers, costs, files and engines ask it for all that they need.

    A file or an engine stores *integer codes*: the whole part of the codes of `quantize`, so that
    ``weights = (integer_codes + half) * step_size``. If widths are nested, it stores those of the
    widest width alone, and `truncate` gives the others.

    Attributes:
      name: in ``QuantConfig.weight_quantizer`` and in files.
      nested: whether the integer codes of each width follow from those of the widest.
      half: what an integer code needs added to be a value (before the step size): 0 or 0.5.
      truncation_rounds: whether `truncate` rounds to the nearest code. Else it rounds down.
    """

    name: str
    nested = True
    half = 0.0
    truncation_rounds = False

    @staticmethod
    def rounding(u: jax.Array, shift: Any, qn: Any, qp: Any) -> jax.Array:
        """Returns the codes of ``u = w / s``; for widths that share s, shift is 2^d, else 1."""
        raise NotImplementedError("each weight quantiser rounds in its own way")

    def step_widths(self, space: BitSpace) -> tuple[int, ...]:
        """Returns the width of each step size that is learned: the widest if nested, else all."""
        return (space.widest,) if self.nested else space.choices

    def step_size_count(self, space: BitSpace) -> int:
        """Returns how many step sizes a kernel learns."""
        return len(self.step_widths(space))

    def quantize(
        self, w: jax.Array, step_sizes: jax.Array, index: Any, space: BitSpace
    ) -> tuple[jax.Array, jax.Array]:
        """Quantises weights: see `weight_codes`; ``step_sizes`` is ``[step_size_count(space)]``."""
        rows = [
            (*integer_range(b, True), 2.0 ** (space.widest - b), gradient_scale(w.size, b, True))
            for b in space.choices
        ]
        qn, qp, shift, scale = lookup(rows, index)
        if self.nested:
            # A shared step size s moves in proportion as the one in use, s_b = s shift, would on
            # its own: hence d s_b / d s = 1 / shift (our derivation). The chain rule's shift is 4^d
            # times that: at two bits of {2, 3, 4} s moves 16 times faster than LSQ's balance with
            # the weights, and diverges.
            step_size = scale_gradient(step_sizes[0], scale / jnp.square(shift))
        else:
            step_size, shift = scale_gradient(step_sizes[index], scale), jnp.float32(1)
        codes = straight_through(self.rounding, self.half, w, step_size, (shift, qn, qp))
        return codes, step_size * shift

    def truncate(self, codes: Any, shift: Any, code_bits: int) -> Any:
        """Returns the integer codes of a narrower width, if widths are nested.

        Args:
          codes: integers of ``code_bits`` bits, any shape, numpy or jax.
          shift: how many of their bit-planes go: ``code_bits`` - width; may be traced.
          code_bits: how many they have.
        """
        if not self.truncation_rounds:
            return codes >> shift
        wide = codes.astype("int32")  # the half that is added may leave int8
        top = (1 << (code_bits - 1 - shift)) - 1
        rounded = (wide + ((1 << shift) >> 1)) >> shift
        return (rounded - (rounded - top) * (rounded > top)).astype(codes.dtype)

    def codes_at(self, stored: Any, index: Any, space: BitSpace, code_bits: int) -> Any:
        """Returns the integer codes at the width ``space.choices[index]``.

        Args:
          stored: integers ``[S, ...]``: S = 1, of ``code_bits`` bits, if widths are nested; else
            S = n, one set for each width.
          index: int, or int32 scalar of jax, which may be traced.
        """
        if not self.nested:
            return stored[index]
        if isinstance(index, int):
            return self.truncate(stored[0], code_bits - space.choices[index], code_bits)
        shifts = jnp.asarray([code_bits - b for b in space.choices], jnp.int8)
        return self.truncate(stored[0], shifts[index], code_bits)

    def planes(self, bits: int, space: BitSpace) -> int:
        """Returns how many bit-planes a width reads: rounding needs one more, if there is one."""
        return min(bits + self.truncation_rounds, space.widest)

    def plane_names(self, space: BitSpace) -> list[list[str]]:
        """Returns the names of the bit-planes in a packed file, most significant first.

        There is a list for each set of integer codes: "plane.0", ... if widths are nested, else
        "plane.3bits.0", ... for each width.
        """
        if self.nested:
            return [[f"plane.{i}" for i in range(space.widest)]]
        return [[f"plane.{b}bits.{i}" for i in range(b)] for b in space.choices]


class Floor(WeightQuantizer):
    """Rounds down to codes that end in a half: nested (AdaBits; reported for Bit-Mixer)."""

    name = "floor"
    half = 0.5

    @staticmethod
    def rounding(u: jax.Array, shift: Any, qn: Any, qp: Any) -> jax.Array:
        """See WeightQuantizer.rounding."""
        # u / shift is exact, as shift is a power of two: the codes nest.
        return jnp.clip(jnp.floor(u / shift), qn, qp) + 0.5


class DoubleRounding(WeightQuantizer):
    """Rounds to the widest grid, then to the narrower one: nested (arXiv 2502.01199)."""

    name = "double"
    truncation_rounds = True

    @staticmethod
    def rounding(u: jax.Array, shift: Any, qn: Any, qp: Any) -> jax.Array:
        """See WeightQuantizer.rounding."""
        widest = jnp.clip(jnp.round(u), qn * shift, (qp + 1) * shift - 1)
        return jnp.clip(jnp.floor(widest / shift + 0.5), qn, qp)


class Independent(WeightQuantizer):
    """Rounds to the nearest code, with a step size for each width: plain LSQ, not nested."""

    name = "independent"
    nested = False
    rounding = staticmethod(nearest)


WEIGHT_QUANTIZERS: Mapping[str, WeightQuantizer] = {
    quantizer.name: quantizer for quantizer in (Floor(), DoubleRounding(), Independent())
}
FIRST_LAST_QUANTIZER = Independent.name  # of the first and last layers, if they are int8


def _named(name: str) -> WeightQuantizer:
    if name not in WEIGHT_QUANTIZERS:
        raise ValueError(
            f"unknown weight quantiser {name!r}; choose from {', '.join(WEIGHT_QUANTIZERS)}"
        )
    return WEIGHT_QUANTIZERS[name]


@renamed_arguments(kind="quantizer")
def step_size_count(quantizer: str, space: BitSpace) -> int:
    """Returns how many step sizes a weight quantiser learns for a kernel.

    Args:
      quantizer: a name in ``WEIGHT_QUANTIZERS``.
      space: the widths.

    Returns:
      1 if widths are nested, else the number of widths.

    Raises:
      ValueError: unknown name.
    """
    return _named(quantizer).step_size_count(space)


@renamed_arguments(steps="step_sizes", kind="quantizer")
def weight_codes(
    w: jax.Array, step_sizes: jax.Array, index: Any, space: BitSpace, quantizer: str = "floor"
) -> tuple[jax.Array, jax.Array]:
    """Quantises weights to the width b = ``space.choices[index]``.

    ``codes * step_size`` approximates w; the formulas of each quantiser are at the top of the file,
    and the gradients at the top of lsq.py. The gradient of ``step_sizes`` is already scaled: by
    ``g = 1 / sqrt(N Qp)``, N the number of weights, and for a step size that all widths share by
    ``g / 4^d`` (our derivation), so that ``d L / d s = g 2^-d d L / d (s 2^d)``.

    Args:
      w: weights, any shape, float32.
      step_sizes: float32 ``[1]``, of the widest width, if widths are nested; else ``[n]``.
      index: int, or int32 scalar, which may be traced.
      space: the n widths.
      quantizer: a name in ``WEIGHT_QUANTIZERS``.

    Returns:
      codes: float32, shape of w: whole numbers, or halves between them for "floor".
      step_size: the float32 scalar that multiplies the codes.

    Raises:
      ValueError: unknown quantiser.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bitmixer_jax import BitSpace
      >>> w = jnp.array([-0.9, -0.1, 0.3, 5.0])
      >>> codes, step_size = weight_codes(w, jnp.array([0.25]), 0, BitSpace((2, 3)))
      >>> codes.tolist(), float(step_size)
      ([-1.5, -0.5, 0.5, 1.5], 0.5)

    References:
      floor: Jin et al., AdaBits, CVPR 2020. double: arXiv 2502.01199. independent: Esser et al.,
      Learned Step Size Quantization, ICLR 2020, eq. 1-5.
    """
    return _named(quantizer).quantize(w, step_sizes, index, space)
