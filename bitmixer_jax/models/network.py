"""Network, the base of the model families: the layer table, and policies as arguments."""

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
from bitmixer_jax.quantizers import FIRST_LAST_QUANTIZER

Selection = Literal["layer", "block"]


class Network(nn.Module):
    """A network whose layers change their bit-width at runtime. Base of the model families.

    ``logits = model.apply(variables, images, bits=policy)``. `create_model` builds one.

    Attributes:
      num_classes: number of logits.
      image_shape: ``(H, W, C)`` of one image.
      quant: what is quantised, and how.
      first_last_layers: "float", real-valued as in the paper's peers, or "int8", at a fixed 8 bits:
        the stem (first convolution) and the head (last linear layer).

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10, image_shape=(8, 8, 3), width=4)
      >>> images, policy = jnp.zeros((2, 8, 8, 3)), jnp.array([4, 3, 2, 2, 3, 4])
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images, policy)[0].shape
      (2, 10)
    """

    num_classes: int = 10
    image_shape: tuple[int, int, int] = (32, 32, 3)
    quant: QuantConfig = QuantConfig()
    first_last_layers: str = "float"

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The layer table: a LayerInfo for each element of a policy."""
        raise NotImplementedError("each model family describes its layers")

    @property
    def graph(self) -> tuple[Node, ...]:
        """Connections of the layers, from the images to the logits."""
        raise NotImplementedError("each model family describes its graph")

    @property
    def stem_conv(self) -> KernelInfo:
        """The first convolution, whose width is fixed."""
        raise NotImplementedError("each model family describes its stem")

    @property
    def stem_info(self) -> LayerInfo:
        """The stem, described as a layer; it is not in the layer table."""
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
        """Number of inputs of the head, after pooling."""
        return self.layers[-1].kernels[0].output[-1]

    @property
    def num_layers(self) -> int:
        """Number of layers L: the length of a policy."""
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """The ``[L]`` layer names, as in policy files."""
        return tuple(layer.name for layer in self.layers)

    @property
    def space(self) -> BitSpace:
        """The widths of this network.

        Raises:
          UserError: this is a full-precision baseline, which has none.
        """
        if self.quant.space is None:
            raise UserError(
                "a full-precision baseline has no bit-widths; use the network that it belongs to",
                "no-widths",
            )
        return self.quant.space

    def groups(self, selection: Selection = "layer") -> tuple[int, ...]:
        """Returns which layers draw a width together: the number of its group for each layer.

        Args:
          selection: "layer" (each alone) or "block" (all of a block).

        Returns:
          ``[L]`` ints.

        Raises:
          UserError: selection is neither "layer" nor "block".
        """
        if selection == "layer":
            return tuple(range(self.num_layers))
        if selection == "block":
            return tuple(layer.block for layer in self.layers)
        raise UserError(f'selection: got {selection!r}; choose "layer" or "block"')

    def baseline(self) -> Network:
        """Returns the full-precision baseline: not quantised, one plain BN for each kernel."""
        return self.clone(quant=self.quant.baseline())

    def first_last_quant(self) -> QuantConfig:
        """Returns the QuantConfig of stem and head: not quantised, or a fixed width of 8 bits."""
        if self.quant.space is None:
            return self.quant
        if self.first_last_layers == "float":  # real values: bfloat16 is exact for codes only
            return dataclasses.replace(self.quant.baseline(), compute_dtype="float32")
        return QuantConfig(
            space=BitSpace((8,)),
            activations=self.quant.activations,
            weights=self.quant.weights,
            weight_quantizer=FIRST_LAST_QUANTIZER,
            norm="per_width",
            momentum=self.quant.momentum,
            epsilon=self.quant.epsilon,
            axis_name=self.quant.axis_name,
            compute_dtype=self.quant.compute_dtype,
        )

    def indices(self, bits: Any) -> tuple[Any, jax.Array | None]:
        """Turns a policy into an index for each layer.

        Args:
          bits: static widths (a tuple or list of ints), or an int32 array ``[L]``, which may be
            traced. A baseline ignores it.

        Returns:
          ``[L]`` indices (ints if static), and whether all traced widths are valid (else None).

        Raises:
          UserError: no policy, the wrong length, or (if not traced) an unknown width.
        """
        if self.quant.space is None:
            return (0,) * self.num_layers, None
        if bits is None:
            raise UserError(
                "bits: give a policy, one width per layer, such as model.space.uniform(...)",
                "missing-value",
            )
        if isinstance(bits, tuple | list):
            widths = self.space.check(bits, self.num_layers)
            if widths.ndim == 1:
                return tuple(self.space.index(width) for width in widths.tolist()), None
            bits = widths
        bits = np.asarray(bits) if isinstance(bits, int) else bits
        if bits.shape != (self.num_layers,):
            raise UserError(
                f"bits: shape {bits.shape}; give one width per layer, ({self.num_layers},)",
                "policy-length",
            )
        if not isinstance(bits, jax.core.Tracer):
            self.space.check(bits, self.num_layers)
        return self.space.index(bits), self.space.valid(jnp.asarray(bits))

    @nn.compact
    def __call__(self, images: jax.Array, bits: Any = None, train: bool = False) -> jax.Array:
        """Computes the logits of images under a policy.

        Args:
          images: float32 ``[N, H, W, C]``, normalised.
          bits: policy ``[L]`` of widths: a tuple of ints (static: compiled for it alone), or an
            int32 array (may be traced: one program serves all policies).
          train: use batch statistics, and update the running ones (collection ``batch_stats``).

        Returns:
          float32 ``[N, num_classes]``; NaN if a traced width is not one of the choices.

        Raises:
          UserError: images or policy do not fit the network.
        """
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise UserError(
                f"images: shape {images.shape}; this network takes (N, {self.image_shape})",
                "bad-shape",
            )
        indices, valid = self.indices(bits)
        table = {layer.name: (place, layer) for place, layer in enumerate(self.layers)}

        def stem(node: Node, x: jax.Array) -> jax.Array:
            return QuantLayer(self.stem_info, self.first_last_quant(), name="stem")(x, 0, 0, train)[
                0
            ]

        def layer(node: Node, x: jax.Array) -> tuple[jax.Array, ...]:
            place, info = table[node.layer]
            rows = info.norm_rows(self.quant.n, self.quant.norm)
            run = QuantLayer(info, self.quant, name=info.name)
            return run(x, info.norm_row(indices, rows), indices[place], train)

        ops = {**REAL_OPS, "stem": stem, "layer": layer, "head": lambda node, x: self._head(x)}
        logits = run_graph(self.graph, images, ops)[self.graph[-1].outputs[0]]
        # A traced width cannot raise an error: NaN shows that it is not one of the choices.
        return logits if valid is None else jnp.where(valid, logits, jnp.nan)

    def _head(self, x: jax.Array) -> jax.Array:
        """Averages over all pixels and applies the last linear layer."""
        quant = self.first_last_quant()
        pooled = jnp.mean(x, (1, 2))
        codes, step_size = QuantActivation(quant, name="head_input")(pooled, 0)
        return QuantDense(quant, features=self.num_classes, name="head")(codes, step_size, 0)


def _shortcut(node: Node, x: jax.Array) -> jax.Array:
    """Takes every ``stride``-th pixel and adds zero channels (option A of He et al.)."""
    more = node.channels - x.shape[-1]
    return jnp.pad(x[:, :: node.stride, :: node.stride], ((0, 0), (0, 0), (0, 0), (0, more)))


REAL_OPS: dict[str, Callable[..., jax.Array]] = {
    "relu": lambda node, x: nn.relu(x),
    "relu6": lambda node, x: nn.relu6(x),
    "max_pool": lambda node, x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))),
    "shortcut": _shortcut,
    "add": lambda node, x, y: x + y,
}
