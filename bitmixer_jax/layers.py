"""Linen layers whose bit-width is an argument: QuantActivation, QuantConv, QuantDense, TBN.

A quantised layer quantises its input once, at its own width. Then it convolves codes with codes,
and normalises with the batch norm of its pair of widths (predecessor, own). A width is given as an
*index* into ``QuantConfig.space.choices``: a Python int is static, and XLA compiles a program for
that width alone; an int32 scalar may be traced, and one program serves all widths.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bitmixer_jax import deprecated, quantizers
from bitmixer_jax.arithmetic import conv
from bitmixer_jax.batch_norm import TransitionalBatchNorm as TransitionalBatchNorm
from bitmixer_jax.batch_norm import fold as fold
from bitmixer_jax.layer_table import LayerInfo, Padding
from bitmixer_jax.quant_config import QuantConfig as QuantConfig


class QuantActivation(nn.Module):
    """Quantises the input of a layer: ``codes = clip(round(x / step_size), Qn, Qp)``.

    Variables: ``params/step`` float32 ``[n]``, a step size for each width. `init` sets them from
    the values of x (LSQ). The full-precision baseline has none.

    Attributes:
      quant: what is quantised, and how.
      signed: whether the input has both signs.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from bitmixer_jax.layers import QuantActivation, QuantConfig
      >>> x = jnp.linspace(0, 1, 12).reshape(1, 2, 2, 3)
      >>> (codes, step_size), _ = QuantActivation(QuantConfig()).init_with_output(
      ...     jax.random.key(0), x, index=0
      ... )
      >>> sorted(set(codes.ravel().tolist()))  # 2 bits
      [0.0, 1.0, 2.0]

    Reference: Esser et al., Learned Step Size Quantization, ICLR 2020, eq. 1 and 2.
    """

    quant: QuantConfig
    signed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, index: Any) -> tuple[jax.Array, jax.Array | None]:
        """Quantises x at width ``index``.

        Args:
          x: float32 ``[N, ...]``.
          index: of the width: int, or int32 scalar, which may be traced.

        Returns:
          codes float32, shape of x, and the float32 scalar that multiplies them; (x, None) where
          activations are not quantised.
        """
        space = self.quant.space
        if space is None:
            return x, None
        # "step" is the name of the leaf in checkpoints and files, which must stay readable.
        step_sizes = self.param(
            "step",
            lambda _: jnp.stack(
                [quantizers.init_step_size(x, b, self.signed) for b in space.choices]
            ),
        )
        if not self.quant.activations:
            return x, None
        return quantizers.activation_codes(x, step_sizes, index, space, self.signed)


class _Kernel(nn.Module):
    """The kernel of a layer, quantised. Base of QuantConv and QuantDense."""

    quant: QuantConfig

    def codes(self, shape: tuple[int, ...], init: Any, index: Any) -> tuple[jax.Array, Any]:
        """Returns (codes, step size) of the kernel; (kernel, None) where it stays real."""
        kernel = self.param("kernel", init, shape, jnp.float32)
        space, quantizer = self.quant.space, self.quant.quantizer
        if space is None:
            return kernel, None
        step_sizes = self.param(  # "step": as in QuantActivation
            "step",
            lambda _: jnp.stack(
                [quantizers.init_step_size(kernel, b, True) for b in quantizer.step_widths(space)]
            ),
        )
        if not self.quant.weights:
            return kernel, None
        return quantizer.quantize(kernel, step_sizes, index, space)


def _product(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    return b if a is None else a if b is None else a * b


class QuantConv(_Kernel):
    """2-D convolution of codes with the codes of a kernel.

    Variables: ``params/kernel`` float32 ``[kh, kw, C_in / groups, C_out]``, and ``params/step``
    float32 ``[1]``, or ``[n]`` if the weight quantiser is not nested.

    Attributes:
      quant: what is quantised, and how.
      features: C_out.
      kernel_size: (kh, kw).
      strides: of the convolution.
      padding: ((top, bottom), (left, right)).
      groups: into which the channels are divided.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from bitmixer_jax.layers import QuantConfig, QuantConv
      >>> codes, step_size = jnp.ones((1, 4, 4, 3)), jnp.float32(0.5)
      >>> conv = QuantConv(QuantConfig(), features=5)
      >>> (sums, scale), _ = conv.init_with_output(jax.random.key(0), codes, step_size, index=0)
      >>> sums.shape, float(sums[0, 1, 1, 0] % 0.5)  # halves, as "floor" codes are
      ((1, 4, 4, 5), 0.0)
    """

    features: int = 1
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Padding = ((1, 1), (1, 1))
    groups: int = 1

    @nn.compact
    def __call__(
        self, codes: jax.Array, step_size: jax.Array | None, index: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        """Convolves ``codes`` with the kernel at width ``index``.

        Args:
          codes: float32 ``[N, H, W, C_in]``, or real values.
          step_size: what multiplies the codes: a scalar, or None for 1.
          index: of the width: int, or int32 scalar, which may be traced.

        Returns:
          sums float32 ``[N, H', W', C_out]`` and the scalar (None: 1) that multiplies them. The
          batch norm that follows takes both, which saves a pass over the tensor.
        """
        shape = (*self.kernel_size, codes.shape[-1] // self.groups, self.features)
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel, kernel_step_size = self.codes(shape, init, index)
        # Real-valued operands keep float32: bfloat16 is exact for codes only.
        exact = step_size is not None and kernel_step_size is not None
        dtype = self.quant.compute_dtype if exact or self.quant.space is None else "float32"
        sums = conv(codes, kernel, self.strides, self.padding, self.groups, dtype, exact)
        return sums, _product(step_size, kernel_step_size)


class QuantDense(_Kernel):
    """Dense layer: codes times the codes of a kernel, plus a real-valued bias.

    Variables: ``params/kernel`` float32 ``[C_in, C_out]``, ``params/bias`` float32 ``[C_out]``, and
    ``params/step`` as in QuantConv.

    Attributes:
      quant: what is quantised, and how.
      features: C_out.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from bitmixer_jax.layers import QuantConfig, QuantDense
      >>> dense = QuantDense(QuantConfig(), features=5)
      >>> y, _ = dense.init_with_output(jax.random.key(0), jnp.ones((2, 3)), jnp.float32(0.5), 0)
      >>> y.shape
      (2, 5)
    """

    features: int = 1

    @nn.compact
    def __call__(self, codes: jax.Array, step_size: jax.Array | None, index: Any) -> jax.Array:
        """Multiplies ``codes`` by the kernel at width ``index`` and adds the bias.

        Args:
          codes: float32 ``[N, C_in]``, or real values.
          step_size: what multiplies the codes: a scalar, or None for 1.
          index: of the width: int, or int32 scalar, which may be traced.

        Returns:
          real values, float32 ``[N, C_out]``.
        """
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel, kernel_step_size = self.codes((codes.shape[-1], self.features), init, index)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        scale = _product(step_size, kernel_step_size)
        sums = codes @ kernel
        return bias + (sums if scale is None else scale * sums)


class QuantLayer(nn.Module):
    """A layer as its LayerInfo describes it: quantises, then convolves and normalises by kernel.

    Attributes:
      info: the layer's shapes, kernels and predecessor.
      quant: what is quantised, and how.
    """

    info: LayerInfo
    quant: QuantConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, predecessor: Any, index: Any, train: bool
    ) -> tuple[jax.Array, ...]:
        """Returns the normalised output ``[N, H', W', C_out]`` of each kernel.

        Args:
          x: float32 ``[N, H, W, C]``.
          predecessor: index of the predecessor's width; ignored where it does not count.
          index: index of the width of this layer.
          train: see TransitionalBatchNorm.
        """
        rows = self.info.norm_rows(self.quant.n, self.quant.norm)
        codes, step_size = QuantActivation(self.quant, self.info.signed, name="input")(x, index)
        outputs = []
        for kernel in self.info.kernels:
            sums, scale = QuantConv(
                self.quant,
                features=kernel.shape[-1],
                kernel_size=kernel.shape[:2],
                strides=kernel.strides,
                padding=kernel.padding,
                groups=kernel.groups,
                name=kernel.name,
            )(codes, step_size, index)
            norm = TransitionalBatchNorm(self.quant, rows, name=f"{kernel.name}_norm")
            outputs.append(norm(sums, scale, predecessor, index, train))
        return tuple(outputs)


__getattr__ = deprecated.module_getattr(__name__)
