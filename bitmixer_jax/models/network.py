"""What every switchable network shares: the layer table, policies as arguments, float ends."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax.bits import BitSpace
from bitmixer_jax.errors import UserError
from bitmixer_jax.layer_table import KernelInfo, LayerInfo
from bitmixer_jax.layers import (
    QuantActivation,
    QuantDense,
    Quantization,
    QuantLayer,
)

Selection = Literal["layer", "block"]


class Network(nn.Module):
    """Base of the model families: ``logits = model.apply(variables, images, bits=policy)``.

    Attributes:
      num_classes: width of the head.
      image_shape: ``(H, W, C)`` of one image.
      quant: what is quantised, and how.
      ends: "float" (the protocol of the paper's peers) or "int8": stem and head at a fixed 8 bits.
    """

    num_classes: int = 10
    image_shape: tuple[int, int, int] = (32, 32, 3)
    quant: Quantization = Quantization()
    ends: str = "float"

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """One LayerInfo per quantised layer, in the order in which data meets them."""
        raise NotImplementedError("each model family describes its layers")

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
            previous=-1,
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

    def float_twin(self) -> Network:
        """The same network with quantisation off and one plain BN per kernel."""
        return self.clone(quant=self.quant.float_twin())

    def end_quant(self) -> Quantization:
        """Quantization of stem and head: off, or one fixed width of 8 bits."""
        if self.quant.space is None:
            return self.quant
        if self.ends == "float":  # real values: bfloat16 is exact for codes only
            return dataclasses.replace(self.quant.float_twin(), compute_dtype="float32")
        return Quantization(
            space=BitSpace((8,)),
            activations=self.quant.activations,
            weights=self.quant.weights,
            weight_kind="independent",
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

    def check_images(self, images: jax.Array) -> None:
        """Raises UserError unless images are ``[N, *image_shape]``."""
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise UserError(
                f"images: shape {images.shape}; this network takes (N, {self.image_shape})"
            )

    def quant_layer(
        self, info: LayerInfo, x: jax.Array, indices: Any, train: bool
    ) -> tuple[jax.Array, ...]:
        """Runs one layer of the table at its place in the policy. Call it in a compact method."""
        place = self.names.index(info.name)
        previous = indices[info.previous] if info.previous >= 0 else 0
        return QuantLayer(info, self.quant, name=info.name)(x, previous, indices[place], train)

    def stem(self, images: jax.Array, train: bool) -> jax.Array:
        """First convolution and its norm, real-valued or at 8 bits. Call it in a compact method."""
        return QuantLayer(self.stem_info, self.end_quant(), name="stem")(images, 0, 0, train)[0]

    def head(self, x: jax.Array, valid: jax.Array | None) -> jax.Array:
        """Global average pooling and the last linear layer: logits ``[N, num_classes]``."""
        quant = self.end_quant()
        pooled = jnp.mean(x, (1, 2))
        codes, step = QuantActivation(quant, name="head_input")(pooled, 0)
        logits = QuantDense(quant, features=self.num_classes, name="head")(codes, step, 0)
        # Traced widths cannot raise: an unknown one must not pass for an answer.
        return logits if valid is None else jnp.where(valid, logits, jnp.nan)
