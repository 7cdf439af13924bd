"""Runs a network in integers: codes times codes, summed in int32, one multiplication per layer.

Codes and their sums are exact. The multiplier and offset of a layer, the stem and head if they are
real-valued, and residual additions are float32, in the order of the simulated network.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bitmixer_jax.data import ImageReader
from bitmixer_jax.export.integer_model import FloatStem, Head, IntegerModel, Layer
from bitmixer_jax.layer_table import KernelInfo
from bitmixer_jax.loaded_model import LoadedModel
from bitmixer_jax.models.graph import Node, run_graph
from bitmixer_jax.models.network import REAL_OPS
from bitmixer_jax.quantizers import integer_range


def run_integer(network: IntegerModel, images: jax.Array, bits: Any) -> jax.Array:
    """Computes the logits of images with the integers of a network.

    Args:
      network: of `to_integer_model` or `load_packed`; in a function that is compiled its arrays
        become constants of the program.
      images: float32 ``[N, H, W, C]``, normalised.
      bits: policy ``[L]`` of widths: a tuple of ints (static), or an int32 array (may be traced).

    Returns:
      float32 ``[N, num_classes]``; NaN if a traced width is not one of the choices. Up to the head
      they are those of the simulated network bit for bit; there the order of a float sum may
      differ.

    Raises:
      UserError: a policy that does not fit.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import bitmixer_jax as bm
      >>> from bitmixer_jax.export.integer_model import to_integer_model
      >>> settings = dict(num_classes=2, image_shape=(4, 4, 1), width=1, stage_sizes=(1,))
      >>> model = bm.create_model("resnet8", **settings)
      >>> images, policy = jnp.ones((1, 4, 4, 1)), jnp.array([2, 4])
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), images, policy)
      >>> variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
      >>> about = dict(mean=[0], std=[1], classes=("a", "b"), weights_digest="")
      >>> network = to_integer_model(model, variables, **about)
      >>> jax.jit(lambda images, bits: run_integer(network, images, bits))(images, policy).shape
      (1, 2)
    """
    return tensors(network, images, bits)[network.graph[-1].outputs[0]]


def from_integer_model(network: IntegerModel) -> LoadedModel:
    """An integer model ready to run: its weights are constants of the program."""

    def forward(weights: Any, images: jax.Array, bits: Any) -> Any:
        return run_integer(network, images, bits)

    return LoadedModel(
        forward=forward,
        weights=(),
        space=network.space,
        names=network.names,
        layers=tuple(layer.info for layer in network.layers),
        counts=network.counts,
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
    """Computes every tensor of the graph, by name. Arguments and errors as `run_integer`."""
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
        return _layer(network, network.stem, x, (0,), 0)[0]

    def layer(node: Node, x: jax.Array) -> tuple[jax.Array, ...]:
        place = places[node.layer]
        return _layer(network, layers[place], x, indices, indices[place])

    def head(node: Node, x: jax.Array) -> jax.Array:
        logits = _head(network.head, x)
        return logits if valid is None else jnp.where(valid, logits, jnp.nan)

    return run_graph(
        network.graph, images, {**REAL_OPS, "stem": stem, "layer": layer, "head": head}
    )


def _layer(
    network: IntegerModel, layer: Layer, x: jax.Array, indices: Any, own: Any
) -> tuple[jax.Array, ...]:
    """Computes a layer at the width number ``own``, under the policy of ``indices`` ``[L]``."""
    signed = layer.info.signed
    quantizer, space, _ = network.widths_of(layer)
    limits = jnp.asarray([integer_range(b, signed) for b in space.choices], jnp.float32)[own]
    reciprocal = 1 / jnp.asarray(layer.step_size)[own]
    codes = jnp.clip(jnp.round(x * reciprocal), limits[0], limits[1])
    # Codes that end in a half are doubled: then they are odd integers.
    doubled = quantizer.half != 0
    span = 2 ** (space.widest - 1)
    largest = max(abs(v) for v in integer_range(space.widest, signed))
    small = largest <= 127 and (2 * span - 1 if doubled else span) <= 128
    dtype = jnp.int8 if small else jnp.int32
    outputs = []
    for kernel in layer.kernels:
        weights = network.codes_at(layer, kernel, own).astype(dtype)
        sums = _conv(codes.astype(dtype), 2 * weights + 1 if doubled else weights, kernel.info)
        values = sums.astype(jnp.float32) * (0.5 if doubled else 1.0)
        pair = layer.info.norm_row(indices, len(kernel.count)), own
        multiplier, offset = jnp.asarray(kernel.multiplier)[pair], jnp.asarray(kernel.offset)[pair]
        outputs.append(multiplier * values + offset)
    return tuple(outputs)


def _conv(codes: jax.Array, weights: jax.Array, info: KernelInfo) -> jax.Array:
    """Returns the sums of products, int32."""
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
    if head.step_sizes is None:
        kernel = jnp.asarray(head.kernel)
        return jnp.asarray(head.bias) + jnp.matmul(pooled, kernel, precision=lax.Precision.HIGHEST)
    input_step_size, kernel_step_size = (jnp.float32(size) for size in head.step_sizes)
    low, high = integer_range(8, False)
    codes = jnp.clip(jnp.round(pooled * (1 / input_step_size)), low, high).astype(jnp.int32)
    sums = codes @ jnp.asarray(head.kernel, jnp.int32)
    scale = input_step_size * kernel_step_size
    return jnp.asarray(head.bias) + scale * sums.astype(jnp.float32)
