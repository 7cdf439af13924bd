"""Linen layers whose bit-width is an argument: QuantActivation, QuantConv, QuantDense, TBN.

A quantised layer quantises its input once, at its own width. Then it convolves codes with codes,
and normalises with the batch norm of its pair of widths (predecessor, own). A width is given as an
*index* into ``QuantConfig.space.choices``: a Python int is static, and XLA compiles a program for
that width alone; an int32 scalar may be traced, and one program serves all widths.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bitmixer_jax import deprecated, quantizers
from bitmixer_jax.errors import UserError
from bitmixer_jax.layer_table import LayerInfo, Padding
from bitmixer_jax.policy import BitSpace

Norm = Literal["transitional", "per_width"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Says what is quantised in a network, and how.

        activations  weights   used by
        False        False     the full-precision baseline
        True         False     stage 1 (our reading of the paper)
        True         True      stages 2 and 3, inference

    The variables are the same in the last two cases, so a stage takes over the variables of the
    stage before as they are.

    Attributes:
      space: widths that a layer may take; None makes the full-precision baseline, which has one
        plain BN for each kernel.
      activations: whether the input of each layer is quantised.
      weights: whether its kernels are quantised.
      weight_quantizer: a name in ``quantizers.WEIGHT_QUANTIZERS``.
      norm: "transitional" (a BN for each pair of widths) or "per_width" (a BN for each own width).
      momentum: of the running statistics, 0..1.
      epsilon: what is added to the variance.
      axis_name: device axis over which batch statistics are averaged; None: they are not.
      compute_dtype: "float32" or "bfloat16", of the operands of a convolution of codes ("bfloat16"
        is exact up to 8 bits, and sums are float32); in a baseline, of all convolutions.

    Raises:
      UserError: a value that is not allowed, or weights without activations.

    Examples:
      >>> from bitmixer_jax.layers import QuantConfig
      >>> quant = QuantConfig(weight_quantizer="double")
      >>> quant.space.choices, quant.n, quant.baseline().weights
      ((2, 3, 4), 3, False)
    """

    space: BitSpace | None = dataclasses.field(default_factory=BitSpace)
    activations: bool = True
    weights: bool = True
    weight_quantizer: str = "floor"
    norm: Norm = "transitional"
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        for value, allowed, what in (
            (self.weight_quantizer, tuple(quantizers.WEIGHT_QUANTIZERS), "weight quantiser"),
            (self.norm, ("transitional", "per_width"), "norm"),
            (self.compute_dtype, ("float32", "bfloat16"), "compute_dtype"),
        ):
            if value not in allowed:
                raise UserError(f"{what}: got {value!r}; choose from {', '.join(allowed)}")
        if self.space is None:
            object.__setattr__(self, "activations", False)
            object.__setattr__(self, "weights", False)
        if self.weights and not self.activations:
            raise UserError(
                "quantisation: weights without activations is not a stage; quantise both",
                "conflict",
            )

    @property
    def n(self) -> int:
        """Number of widths; 1 for the baseline."""
        return 1 if self.space is None else self.space.n

    @property
    def quantizer(self) -> quantizers.WeightQuantizer:
        """The weight quantiser, which answers all that depends on the choice of it."""
        return quantizers.WEIGHT_QUANTIZERS[self.weight_quantizer]

    def baseline(self) -> QuantConfig:
        """Returns the same settings for the full-precision baseline: nothing is quantised."""
        return dataclasses.replace(self, space=None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _conv(
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


def _conv_forward(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    groups: int,
    dtype: str,
    exact: bool,
) -> Any:
    return _conv(x, kernel, strides, padding, groups, dtype, exact), (
        x.astype(dtype),
        kernel.astype(dtype),
    )


def _conv_backward(
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


_conv.defvjp(_conv_forward, _conv_backward)


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
        sums = _conv(codes, kernel, self.strides, self.padding, self.groups, dtype, exact)
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


class TransitionalBatchNorm(nn.Module):
    """Batch norm with its own parameters and statistics for each pair of widths (Bit-Mixer).

    A pair is (width of the layer that produced this layer's input, width of this layer). With P
    widths of the predecessor and n own widths, the variables are

        params/scale, params/bias             float32 [P, n, C]
        batch_stats/mean, batch_stats/var     float32 [P, n, C]
        batch_stats/count                     int32   [P, n]  training steps that used the pair

    A training step reads and updates the one pair that it uses. A pair with count 0 has no
    statistics (`bitmixer_jax.pairs`).

    Attributes:
      quant: the settings; n, momentum and epsilon are read.
      predecessor_widths: P, which is n, or 1 where the predecessor has no width of its own (the
        real-valued stem) or its width does not count ("per_width").

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from bitmixer_jax.layers import QuantConfig, TransitionalBatchNorm
      >>> norm = TransitionalBatchNorm(QuantConfig(), predecessor_widths=3)
      >>> sums = jnp.ones((1, 4, 4, 8))
      >>> variables = norm.init(jax.random.key(0), sums, None, 0, 0, train=False)
      >>> variables["params"]["scale"].shape
      (3, 3, 8)

    Reference: Bulat and Tzimiropoulos, Bit-Mixer, ICCV 2021, arXiv 2103.17267.
    """

    quant: QuantConfig
    predecessor_widths: int = 1

    @nn.compact
    def __call__(
        self,
        sums: jax.Array,
        step_size: jax.Array | None,
        predecessor: Any,
        index: Any,
        train: bool,
    ) -> jax.Array:
        """Normalises ``step_size * sums`` with the batch norm of a pair.

        Args:
          sums: float32 ``[N, H, W, C]``.
          step_size: scalar, or None for 1.
          predecessor: index of the predecessor's width; ignored where P is 1.
          index: index of the width of this layer.
          train: use the batch's statistics, and update the running ones.

        Returns:
          float32 ``[N, H, W, C]``.
        """
        table = (self.predecessor_widths, self.quant.n)
        shape = (*table, sums.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        count = self.variable("batch_stats", "count", jnp.zeros, table, jnp.int32)
        pair = (predecessor if self.predecessor_widths > 1 else 0, index)
        # mean(step_size x) = step_size mean(x): scaling [C] statistics saves a pass over sums.
        factor = jnp.float32(1) if step_size is None else step_size
        if train or self.is_initializing():
            batch_mean = jnp.mean(sums, (0, 1, 2))
            batch_square = jnp.mean(jnp.square(sums), (0, 1, 2))
            if self.quant.axis_name is not None and not self.is_initializing():
                batch_mean, batch_square = lax.pmean(
                    (batch_mean, batch_square), self.quant.axis_name
                )
            batch_var = jnp.maximum(batch_square - jnp.square(batch_mean), 0)
            now_mean, now_var = factor * batch_mean, jnp.square(factor) * batch_var
            if not self.is_initializing():
                # A plain average at first (keep = 0, 1/2, 2/3, ...), an exponential one later: a
                # pair is used rarely, and with momentum alone would stay near its initial values.
                visits = count.value[pair].astype(jnp.float32)
                keep = jnp.minimum(self.quant.momentum, visits / (visits + 1))
                mean.value = mean.value.at[pair].set(
                    keep * mean.value[pair] + (1 - keep) * lax.stop_gradient(now_mean)
                )
                var.value = var.value.at[pair].set(
                    keep * var.value[pair] + (1 - keep) * lax.stop_gradient(now_var)
                )
                count.value = count.value.at[pair].add(1)
        else:
            now_mean, now_var = mean.value[pair], var.value[pair]
        multiplier, offset = fold(
            scale[pair], bias[pair], now_mean, now_var, factor, self.quant.epsilon
        )
        return multiplier * sums + offset


def fold(
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    step_size: Any,
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """Turns batch norm of ``step_size * sums`` into one multiplier and one offset per channel.

    ``scale * (step_size * sums - mean) / sqrt(var + epsilon) + bias == multiplier * sums + offset``

    Args:
      scale, bias, mean, var: float32 ``[..., C]``.
      step_size: scalar.
      epsilon: what is added to the variance.

    Returns:
      multiplier and offset, float32 ``[..., C]`` each.
    """
    gain = scale * lax.rsqrt(var + epsilon)
    return gain * step_size, bias - gain * mean


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
