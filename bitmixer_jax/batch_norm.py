"""Transitional Batch-Norm, and batch norm folded into one multiplier and offset."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bitmixer_jax.quant_config import QuantConfig


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
