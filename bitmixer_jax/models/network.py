"""What every switchable network shares: the layer table, policies as arguments, float ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.layer_table import KernelInfo, LayerInfo
from bitmixer_jax.layers import (
    QuantActivation,
    QuantConfig,
    QuantDense,
    QuantLayer,
)
from bitmixer_jax.models.graph import Node, run_graph
from bitmixer_jax.policy import BitSpace

Selection = Literal["layer", "block"]


class Network(nn.Module):
    """Base of the model families: ``logits = model.apply(variables, images, bits=policy)``.

    Attributes:
      num_classes: width of the head.
      image_shape: ``(H, W, C)`` of one image.
      quant: what is quantised, and how.
      first_last_layers: "float" (the protocol of the paper's peers) or "int8": stem and head at a
        fixed 8 bits.
    """

    num_classes: int = 10
    image_shape: tuple[int, int, int] = (32, 32, 3)
    quant: QuantConfig = QuantConfig()
    first_last_layers: str = "float"

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """One LayerInfo per quantised layer, in the order in which data meets them."""
        raise NotImplementedError("each model family describes its layers")

    @property
    def graph(self) -> tuple[Node, ...]:
        """How layers are connected, from "images" to the logits."""
        raise NotImplementedError("each model family describes its wiring")

    @property
    def stem_conv(self) -> KernelInfo:
        """The first convolution, which has no width of its own."""
        raise NotImplementedError("each model family describes its stem")

    @property
    def stem_info(self) -> LayerInfo:
        """The stem as a layer: it is described as the others are, but is not in the table."""
        return LayerInfo(
            name="stem",
            kind="conv",
            kernels=(self.stem_conv,),
            predecessor=-1,
            block=-1,
            signed=True,  # normalised images
            input=self.image_shape,
        )

    @property
    def features(self) -> int:
        """Inputs of the head, after pooling."""
        return self.layers[-1].kernels[0].output[-1]

    @property
    def num_layers(self) -> int:
        """L, the length of a policy."""
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """``[L]`` layer names, as policy files spell them."""
        return tuple(layer.name for layer in self.layers)

    @property
    def space(self) -> BitSpace:
        """The widths of this network.

        Raises:
          UserError: this is a float twin, which has none.
        """
        if self.quant.space is None:
            raise UserError("a float twin has no bit-widths; use the network it was made from")
        return self.quant.space

    def groups(self, selection: Selection = "layer") -> tuple[int, ...]:
        """``[L]`` which layers draw a width together: each alone, or all of a block.

        Raises:
          UserError: selection is neither "layer" nor "block".
        """
        if selection == "layer":
            return tuple(range(self.num_layers))
        if selection == "block":
            return tuple(layer.block for layer in self.layers)
        raise UserError(f'selection: got {selection!r}; choose "layer" or "block"')

    def baseline(self) -> Network:
        """The same network with quantisation off and one plain BN per kernel."""
        return self.clone(quant=self.quant.baseline())

    def first_last_quant(self) -> QuantConfig:
        """QuantConfig of stem and head: off, or one fixed width of 8 bits."""
        if self.quant.space is None:
            return self.quant
        if self.first_last_layers == "float":  # real values: bfloat16 is exact for codes only
            return dataclasses.replace(self.quant.baseline(), compute_dtype="float32")
        return QuantConfig(
            space=BitSpace((8,)),
            activations=self.quant.activations,
            weights=self.quant.weights,
            weight_quantizer="independent",
            norm="per_width",
            momentum=self.quant.momentum,
            epsilon=self.quant.epsilon,
            axis_name=self.quant.axis_name,
            compute_dtype=self.quant.compute_dtype,
        )

    def indices(self, bits: Any) -> tuple[Any, jax.Array | None]:
        """Turns a policy into one index per layer.

        Args:
          bits: static widths (a tuple or list of ints), or an int32 array ``[L]``, which may be
            traced. Ignored by a float twin.

        Returns:
          ``[L]`` indices (ints if static), and whether all traced widths are valid (else None).

        Raises:
          UserError: no policy, the wrong length, or (if not traced) an unknown width.
        """
        if self.quant.space is None:
            return (0,) * self.num_layers, None
        if bits is None:
            raise UserError(
                "bits: give a policy, one width per layer, such as model.space.uniform(...)"
            )
        if isinstance(bits, tuple | list):
            widths = self.space.check(bits, self.num_layers)
            if widths.ndim == 1:
                return tuple(self.space.index(width) for width in widths.tolist()), None
            bits = widths
        bits = np.asarray(bits) if isinstance(bits, int) else bits
        if bits.shape != (self.num_layers,):
            raise UserError(
                f"bits: shape {bits.shape}; give one width per layer, ({self.num_layers},)"
            )
        if not isinstance(bits, jax.core.Tracer):
            self.space.check(bits, self.num_layers)
        return self.space.index(bits), self.space.valid(jnp.asarray(bits))

    @nn.compact
    def __call__(self, images: jax.Array, bits: Any = None, train: bool = False) -> jax.Array:
        """Returns logits float32 ``[N, num_classes]``.

        Args:
          images: float32 ``[N, H, W, C]``, normalised.
          bits: policy ``[L]``: a tuple of ints (static) or an int32 array (data, may be traced).
          train: use batch statistics, and update the running ones (collection ``batch_stats``).

        Raises:
          UserError: images or policy do not fit the network.
        """
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise UserError(
                f"images: shape {images.shape}; this network takes (N, {self.image_shape})"
            )
        indices, valid = self.indices(bits)
        table = {layer.name: (place, layer) for place, layer in enumerate(self.layers)}

        def stem(node: Node, x: jax.Array) -> jax.Array:
            return QuantLayer(self.stem_info, self.first_last_quant(), name="stem")(x, 0, 0, train)[
                0
            ]

        def layer(node: Node, x: jax.Array) -> tuple[jax.Array, ...]:
            place, info = table[node.layer]
            predecessor = indices[info.predecessor] if info.predecessor >= 0 else 0
            run = QuantLayer(info, self.quant, name=info.name)
            return run(x, predecessor, indices[place], train)

        ops = {**REAL_OPS, "stem": stem, "layer": layer, "head": lambda node, x: self._head(x)}
        logits = run_graph(self.graph, images, ops)[self.graph[-1].outputs[0]]
        # Traced widths cannot raise: an unknown one must not pass for an answer.
        return logits if valid is None else jnp.where(valid, logits, jnp.nan)

    def _head(self, x: jax.Array) -> jax.Array:
        """Global average pooling and the last linear layer."""
        quant = self.first_last_quant()
        pooled = jnp.mean(x, (1, 2))
        codes, step = QuantActivation(quant, name="head_input")(pooled, 0)
        return QuantDense(quant, features=self.num_classes, name="head")(codes, step, 0)


def _shortcut(node: Node, x: jax.Array) -> jax.Array:
    """Every second pixel with zero channels behind it (option A of He et al.)."""
    more = node.channels - x.shape[-1]
    return jnp.pad(x[:, :: node.stride, :: node.stride], ((0, 0), (0, 0), (0, 0), (0, more)))


REAL_OPS: dict[str, Callable[..., jax.Array]] = {
    "relu": lambda node, x: nn.relu(x),
    "relu6": lambda node, x: nn.relu6(x),
    "max_pool": lambda node, x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))),
    "shortcut": _shortcut,
    "add": lambda node, x, y: x + y,
}
