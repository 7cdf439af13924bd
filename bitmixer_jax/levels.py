"""Counts the quantisation levels that a trained network uses, which shows mistakes of training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax import quantizers
from bitmixer_jax.data import normalize
from bitmixer_jax.layers import QuantActivation
from bitmixer_jax.models import Network
from bitmixer_jax.trained import Trained


@dataclasses.dataclass(frozen=True)
class LevelCount:
    """Numbers of levels that one layer uses at one width.

    Attributes:
      layer: its name.
      bits: the width; there are 2^bits levels.
      weights: how many levels its kernels use.
      activations: how many levels its input uses, on the images given.
      saturated: share (0..1) of the activations at the highest level.
    """

    layer: str
    bits: int
    weights: int
    activations: int
    saturated: float


def levels_of(trained: Trained, data_dir: str | None = None) -> list[LevelCount]:
    """Counts the levels in use on 256 training images. Arguments as `Trained.load_split`."""
    data = trained.load_split(trained.run.train_split, data_dir)
    few = data.subset(np.arange(min(256, len(data))))
    images = normalize(jnp.asarray(few.images), data.mean, data.std)
    return levels_used(trained.model, trained.variables, images)


def levels_used(model: Network, variables: Any, images: jax.Array) -> list[LevelCount]:
    """Counts the levels that each layer uses, with all layers at each width in turn.

    Args:
      model: a switchable network.
      variables: of the network, trained.
      images: float32 ``[N, H, W, C]``, normalised; a few hundred are enough.

    Returns:
      a LevelCount for each width and layer.
    """
    space = model.space

    @jax.jit
    def inputs(variables: Any, images: Any, bits: Any) -> Any:
        _, seen = model.apply(
            variables,
            images,
            bits=bits,
            capture_intermediates=lambda module, _: isinstance(module, QuantActivation),
            mutable=["intermediates"],
        )
        return seen["intermediates"]

    found = []
    for index, bits in enumerate(space.choices):
        seen = inputs(variables, images, space.uniform(bits, model.num_layers))
        for layer in model.layers:
            codes, _ = seen[layer.name]["input"]["__call__"][0]
            of_input = np.asarray(quantizers.code_histogram(codes, bits, layer.signed))
            of_weights = np.zeros(2**bits, np.int64)
            for kernel in layer.kernels:
                own = variables["params"][layer.name][kernel.name]
                quantize = model.quant.quantizer.quantize
                w_codes, _ = quantize(own["kernel"], own["step"], index, space)
                of_weights += np.asarray(quantizers.code_histogram(w_codes, bits, True))
            found.append(
                LevelCount(
                    layer.name,
                    bits,
                    int((of_weights > 0).sum()),
                    int((of_input > 0).sum()),
                    float(of_input[-1] / of_input.sum()),
                )
            )
    return found
