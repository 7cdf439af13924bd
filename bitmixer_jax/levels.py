"""Which quantisation levels a trained network really uses: the check against silent mistakes."""

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
    """Levels in use in one layer at one width.

    Attributes:
      layer: its name.
      bits: the width; 2^bits levels are there to be used.
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
    """Counts the levels in use, with all layers at each width in turn.

    Args:
      images: float32 ``[N, H, W, C]``, normalised; a few hundred are enough.
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
                held = variables["params"][layer.name][kernel.name]
                w_codes, _ = quantizers.weight_codes(
                    held["kernel"], held["step"], index, space, model.quant.weight_quantizer
                )
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
