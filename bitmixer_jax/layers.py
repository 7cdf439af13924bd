"""Linen layers whose bit-width is an argument: QuantActivation, QuantConv, QuantDense, TBN.

A quantised layer is: quantise the input once at its width, convolve codes with codes, and
normalise with the batch-norm slice of the pair (width of the layer before, own width). Widths
arrive as an *index* into ``QuantConfig.space.choices``: a Python int (static: the compiler
specialises) or an int32 scalar (traced: one programme serves all widths).
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
    """What is quantised in a network, and how. Truth table of the two flags:

        activations  weights   used by
        False        False     the float twin
        True         False     stage 1 (our reading of the paper)
        True         True      stages 2 and 3, inference

    The variables are the same in the last two cases, so a state uses the stages as it is.

    Attributes:
      space: widths that a layer may take; None is the float twin, with one plain BN per kernel.
      activations: quantise the input of each layer.
      weights: quantise its kernels.
      weight_quantizer: one of ``quantizers.WEIGHT_QUANTIZERS``.
      norm: "transitional" (a BN per pair of widths) or "per_width" (a BN per own width).
      momentum: of the running statistics.
      epsilon: added to the variance.
      axis_name: device axis over which batch statistics are averaged; None keeps them local.
      compute_dtype: of the operands of a convolution of codes ("bfloat16" is exact up to 8 bits;
        sums are float32); in a float twin, of all convolutions.
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
            (self.weight_quantizer, quantizers.WEIGHT_QUANTIZERS, "weight quantiser"),
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
                "quantisation: weights without activations is not a stage; quantise both"
            )

    @property
    def n(self) -> int:
        """Number of widths; 1 for the float twin."""
        return 1 if self.space is None else self.space.n

    def baseline(self) -> QuantConfig:
        """The same settings with quantisation off and one plain BN per kernel."""
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
    """Convolution with operands in ``dtype`` and float32 sums, also in the backward pass.

    ``exact`` operands (codes) lose nothing in the fewer bits that accelerators multiply by default,
    whatever precision is asked for around them (`jax.default_matmul_precision`).
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
    """Quantises the input of a layer.

    Variables: ``params/step`` float32 ``[n]``, a step size per width, set from the images that
    `init` is called with (LSQ). The float twin has none.
    """

    quant: QuantConfig
    signed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, index: Any) -> tuple[jax.Array, jax.Array | None]:
        """Returns (codes, step) for x ``[N, ...]``; (x, None) where nothing is quantised."""
        space = self.quant.space
        if space is None:
            return x, None
        steps = self.param(
            "step",
            lambda _: jnp.stack(
                [quantizers.init_step_size(x, b, self.signed) for b in space.choices]
            ),
        )
        if not self.quant.activations:
            return x, None
        return quantizers.activation_codes(x, steps, index, space, self.signed)


class _Kernel(nn.Module):
    """The kernel of a layer, quantised. Base of QuantConv and QuantDense."""

    quant: QuantConfig

    def codes(self, shape: tuple[int, ...], init: Any, index: Any) -> tuple[jax.Array, Any]:
        """Returns (codes, step) of the kernel ``shape``; (kernel, None) where it stays real."""
        kernel = self.param("kernel", init, shape, jnp.float32)
        space = self.quant.space
        if space is None:
            return kernel, None
        kind = self.quant.weight_quantizer
        widths = space.choices if kind == "independent" else (space.widest,)
        steps = self.param(
            "step",
            lambda _: jnp.stack([quantizers.init_step_size(kernel, b, True) for b in widths]),
        )
        if not self.quant.weights:
            return kernel, None
        return quantizers.weight_codes(kernel, steps, index, space, kind)


def _product(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    return b if a is None else a if b is None else a * b


class QuantConv(_Kernel):
    """2-D convolution of codes.

    Variables: ``params/kernel`` float32 ``[kh, kw, C_in / groups, C_out]``; ``params/step``
    float32 ``[1]`` (nested quantisers) or ``[n]`` (independent).
    """

    features: int = 1
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Padding = ((1, 1), (1, 1))
    groups: int = 1

    @nn.compact
    def __call__(
        self, codes: jax.Array, step: jax.Array | None, index: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        """Convolves ``codes`` ``[N, H, W, C_in]`` with the kernel at width ``index``.

        Returns:
          sums ``[N, H', W', C_out]`` float32 and the scalar (None: 1) by which they are to be
          multiplied; the batch norm that follows takes both and saves a pass over the tensor.
        """
        shape = (*self.kernel_size, codes.shape[-1] // self.groups, self.features)
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel, kernel_step = self.codes(shape, init, index)
        # Real-valued operands keep float32: bfloat16 is exact for codes only.
        exact = step is not None and kernel_step is not None
        dtype = self.quant.compute_dtype if exact or self.quant.space is None else "float32"
        sums = _conv(codes, kernel, self.strides, self.padding, self.groups, dtype, exact)
        return sums, _product(step, kernel_step)


class QuantDense(_Kernel):
    """Dense layer of codes, with a real-valued bias.

    Variables: ``params/kernel`` float32 ``[C_in, C_out]``, ``params/bias`` ``[C_out]``,
    ``params/step`` as in QuantConv.
    """

    features: int = 1

    @nn.compact
    def __call__(self, codes: jax.Array, step: jax.Array | None, index: Any) -> jax.Array:
        """Maps ``codes`` ``[N, C_in]`` to real values ``[N, C_out]`` float32."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel, kernel_step = self.codes((codes.shape[-1], self.features), init, index)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        scale = _product(step, kernel_step)
        sums = codes @ kernel
        return bias + (sums if scale is None else scale * sums)


class TransitionalBatchNorm(nn.Module):
    """Batch norm with one set of parameters and statistics per pair of widths (Bit-Mixer).

    The pair is (width of the layer that produced this layer's input, width of this layer). With P
    previous widths (n, or 1 after the float stem) and n own widths, the variables are

        params/scale, params/bias             float32 [P, n, C]
        batch_stats/mean, batch_stats/var     float32 [P, n, C]
        batch_stats/count                     int32   [P, n]  training steps that used the pair

    A step reads and updates the one pair it uses. Running statistics are the plain
    average of the first visits to a pair and an exponential one from then on, so that a rarely
    visited pair is not biased towards its starting values.
    """

    quant: QuantConfig
    predecessor: int = 1

    @nn.compact
    def __call__(
        self, sums: jax.Array, step: jax.Array | None, predecessor: Any, index: Any, train: bool
    ) -> jax.Array:
        """Normalises ``step * sums``.

        Args:
          sums: ``[N, H, W, C]`` float32.
          step: scalar or None (1).
          predecessor: index of the width of the layer before; 0 where P is 1.
          index: index of the width of this layer.
          train: use the batch's statistics, and update the running ones.

        Returns:
          ``[N, H, W, C]`` float32.
        """
        table = (self.predecessor, self.quant.n)
        shape = (*table, sums.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        count = self.variable("batch_stats", "count", jnp.zeros, table, jnp.int32)
        pair = (predecessor, index)
        # sums stay unscaled: mean(step x) = step mean(x) costs nothing on [C].
        factor = jnp.float32(1) if step is None else step
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
    scale: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array, step: Any, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Batch norm of ``step * sums`` as one multiplier and one offset per channel: two ``[..., C]``.

    ``scale * (step * sums - mean) / sqrt(var + epsilon) + bias == multiplier * sums + offset``
    """
    gain = scale * lax.rsqrt(var + epsilon)
    return gain * step, bias - gain * mean


class QuantLayer(nn.Module):
    """A layer as its LayerInfo describes it: quantise, convolve, normalise; once per kernel."""

    info: LayerInfo
    quant: QuantConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, predecessor: Any, index: Any, train: bool
    ) -> tuple[jax.Array, ...]:
        """Returns the normalised output ``[N, H', W', C_out]`` of each kernel.

        Args:
          x: ``[N, H, W, C]`` float32.
          predecessor, index: of the widths of the layer before and of this one.
          train: see TransitionalBatchNorm.
        """
        after_layer = self.info.predecessor >= 0 and self.quant.norm == "transitional"
        codes, step = QuantActivation(self.quant, self.info.signed, name="input")(x, index)
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
            )(codes, step, index)
            norm = TransitionalBatchNorm(
                self.quant, self.quant.n if after_layer else 1, name=f"{kernel.name}_norm"
            )
            outputs.append(norm(sums, scale, predecessor if after_layer else 0, index, train))
        return tuple(outputs)


__getattr__ = deprecated.module_getattr(__name__)
