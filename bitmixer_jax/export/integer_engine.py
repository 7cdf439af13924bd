"""Runs a network network in integers: codes times codes, summed in int32, one rescale per layer.

What is exact: codes, and their sums. The one multiplier and offset of a layer, stem and
head if they are real-valued, and residual additions are float32, in the order in which the
simulated network does them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bitmixer_jax.data import ImageReader
from bitmixer_jax.export.integer_model import FloatStem, Head, IntegerModel, Layer, truncate_bits
from bitmixer_jax.layer_table import KernelInfo
from bitmixer_jax.loaded_model import LoadedModel, calibrated_pairs
from bitmixer_jax.models.graph import Node, run_graph
from bitmixer_jax.models.network import REAL_OPS
from bitmixer_jax.quantizers import integer_range


def run_integer(network: IntegerModel, images: jax.Array, bits: Any) -> jax.Array:
    """Logits float32 ``[N, num_classes]`` of a network network.

    Args:
      network: its arrays become constants of a compiled programme that calls this.
      images: float32 ``[N, H, W, C]``, normalised.
      bits: policy ``[L]``: a tuple of ints (static), or an int32 array (data). Traced
        widths that are not among the choices give NaN.

    Raises:
      UserError: a policy that does not fit.
    """
    return tensors(network, images, bits)[network.graph[-1].outputs[0]]


def from_integer_model(network: IntegerModel) -> LoadedModel:
    """An integer model ready to run: its weights are constants of the program."""
    counts = [layer.kernels[0].count for layer in network.layers]

    def forward(weights: Any, images: jax.Array, bits: Any) -> Any:
        return run_integer(network, images, bits)

    return LoadedModel(
        forward=forward,
        weights=(),
        space=network.space,
        names=network.names,
        predecessors=tuple(layer.info.predecessor for layer in network.layers),
        calibrated=calibrated_pairs(counts, network.space.n),
        image_shape=network.image_shape,
        classes=network.classes,
        mean=network.mean,
        std=network.std,
        weights_digest=network.weights_digest,
        reader=ImageReader.from_json(
            network.about.get("images"), network.image_shape, "packed file"
        ),
    )


def tensors(network: IntegerModel, images: jax.Array, bits: Any) -> dict[str, jax.Array]:
    """Every tensor of the graph by name, as `run_integer`."""
    space, layers = network.space, network.layers
    if isinstance(bits, tuple | list):
        indices: Any = [space.index(int(b)) for b in space.check(bits, len(layers))]
        valid = None
    else:
        if not isinstance(bits, jax.core.Tracer):
            space.check(bits, len(layers))
        indices, valid = space.index(bits), space.valid(jnp.asarray(bits))
    places = {layer.info.name: place for place, layer in enumerate(layers)}

    def stem(node: Node, x: jax.Array) -> jax.Array:
        if isinstance(network.stem, FloatStem):
            return _float_stem(network.stem, x)
        return _layer(network.stem, x, 0, 0, (8,), "independent", 8)[0]

    def layer(node: Node, x: jax.Array) -> tuple[jax.Array, ...]:
        place = places[node.layer]
        info = layers[place].info
        predecessor = indices[info.predecessor] if info.predecessor >= 0 else 0
        return _layer(
            layers[place],
            x,
            predecessor,
            indices[place],
            space.choices,
            network.weight_quantizer,
            network.code_bits,
        )

    def head(node: Node, x: jax.Array) -> jax.Array:
        logits = _head(network.head, x)
        return logits if valid is None else jnp.where(valid, logits, jnp.nan)

    return run_graph(
        network.graph, images, {**REAL_OPS, "stem": stem, "layer": layer, "head": head}
    )


def _layer(
    layer: Layer,
    x: jax.Array,
    predecessor: Any,
    index: Any,
    choices: tuple[int, ...],
    kind: str,
    code_bits: int,
) -> tuple[jax.Array, ...]:
    signed = layer.info.signed
    edges = jnp.asarray([integer_range(b, signed) for b in choices], jnp.float32)[index]
    codes = jnp.clip(jnp.round(x * (1 / jnp.asarray(layer.step)[index])), edges[0], edges[1])
    largest = max(abs(v) for v in integer_range(choices[-1], signed))
    shift = jnp.asarray([code_bits - b for b in choices], jnp.int8)[index]
    outputs = []
    for kernel in layer.kernels:
        if kind == "independent":
            weights = jnp.asarray(kernel.codes)[index]
        else:
            weights = truncate_bits(jnp.asarray(kernel.codes[0]), shift, kind, code_bits)
        # A floor quantiser's codes end in a half: twice the codes are odd integers.
        doubled = kind == "floor"
        span = 2 ** (choices[-1] - 1)
        small = largest <= 127 and (2 * span - 1 if doubled else span) <= 128
        dtype = jnp.int8 if small else jnp.int32
        weights = weights.astype(dtype)
        sums = _conv(codes.astype(dtype), 2 * weights + 1 if doubled else weights, kernel.info)
        values = sums.astype(jnp.float32) * (0.5 if doubled else 1.0)
        row = predecessor if len(kernel.count) > 1 else 0
        multiplier = jnp.asarray(kernel.multiplier)[row, index]
        outputs.append(multiplier * values + jnp.asarray(kernel.offset)[row, index])
    return tuple(outputs)


def _conv(codes: jax.Array, weights: jax.Array, info: KernelInfo) -> jax.Array:
    """Sums int32."""
    return lax.conv_general_dilated(
        codes,
        weights,
        info.strides,
        info.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=info.groups,
        preferred_element_type=jnp.int32,
    )


def _float_stem(stem: FloatStem, x: jax.Array) -> jax.Array:
    sums = lax.conv_general_dilated(
        x,
        jnp.asarray(stem.kernel),
        stem.info.strides,
        stem.info.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=stem.info.groups,
        precision=lax.Precision.HIGHEST,
    )
    return jnp.asarray(stem.multiplier) * sums + jnp.asarray(stem.offset)


def _head(head: Head, x: jax.Array) -> jax.Array:
    pooled = jnp.mean(x, (1, 2))
    if head.steps is None:
        kernel = jnp.asarray(head.kernel)
        return jnp.asarray(head.bias) + jnp.matmul(pooled, kernel, precision=lax.Precision.HIGHEST)
    input_step, kernel_step = head.steps
    low, high = integer_range(8, False)
    codes = jnp.clip(jnp.round(pooled * (1 / jnp.float32(input_step))), low, high).astype(jnp.int32)
    sums = codes @ jnp.asarray(head.kernel, jnp.int32)
    scale = jnp.float32(input_step) * jnp.float32(kernel_step)
    return jnp.asarray(head.bias) + scale * sums.astype(jnp.float32)
