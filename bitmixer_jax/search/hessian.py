"""Sensitivities of widths from second derivatives of the loss, as in HAWQ-V2.

For a kernel of N weights, H is the Hessian of the loss in these weights, and w_c holds the weights
that are quantised to width c. The sensitivity is

    s[c] = trace(H) / N * |w_c - w_widest|^2 / 2

The trace is Hutchinson's estimate: the mean of v . (H v) over vectors v of random signs.

HAWQ-V2 takes the distance to the real-valued weights, and has no factor 1/2. Our choices are the
distance to w_widest, so that the widest width has sensitivity 0; H for the widest policy; and
straight-through derivatives of the quantisers. What a narrower width does to the activations is not
included.

Reference: Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization, NeurIPS 2020.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bitmixer_jax.models import Network
from bitmixer_jax.search.problem import Problem


def traces(
    model: Network,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    samples: int = 16,
) -> dict[str, dict[str, float]]:
    """Estimates the trace of the Hessian of the mean loss in each kernel, for the widest policy.

    Args:
      model: a network whose layers have widths.
      variables: of the network, "params" and "batch_stats".
      images: float32 ``[N, H, W, C]``, normalised.
      labels: int32 ``[N]``.
      key: a random key; consumed. It draws the random signs.
      samples: how many vectors of signs to average over, 1 or more.

    Returns:
      ``{layer name: {kernel name: trace}}``.
    """
    bits = jnp.asarray(model.space.uniform(model.space.widest, model.num_layers))
    kernels = {
        layer.name: {
            k.name: variables["params"][layer.name][k.name]["kernel"] for k in layer.kernels
        }
        for layer in model.layers
    }

    def loss(kernels: Any, variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        params = dict(variables["params"])
        for layer, by_name in kernels.items():
            changed = {k: {**params[layer][k], "kernel": value} for k, value in by_name.items()}
            params[layer] = {**params[layer], **changed}
        logits: Any = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            images,
            bits=bits,
            train=False,
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def directional_derivative(kernels: Any, signs: Any, *data: Any) -> jax.Array:
        products = jax.tree.map(jnp.vdot, jax.grad(loss)(kernels, *data), signs)
        return sum(jax.tree.leaves(products), jnp.float32(0))

    @jax.jit
    def sample(key: jax.Array, kernels: Any, *data: Any) -> Any:
        leaves, tree = jax.tree.flatten(kernels)
        keys = jax.random.split(key, len(leaves))
        signs = jax.tree.unflatten(
            tree,
            [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)],
        )
        # H v by reverse mode over reverse mode, as the quantisers have no rule for forward mode.
        products = jax.grad(directional_derivative)(kernels, signs, *data)
        return jax.tree.map(jnp.vdot, signs, products)

    # These are arguments, because XLA takes seconds to fold them if they are constants.
    data = (variables, images, labels)
    drawn = [jax.device_get(sample(k, kernels, *data)) for k in jax.random.split(key, samples)]
    return jax.tree.map(lambda *values: float(np.mean(values)), *drawn)


def sensitivity(
    problem: Problem,
    model: Network,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    samples: int = 16,
) -> np.ndarray:
    """Estimates what each width of each group of layers adds to the loss.

    A group adds up the sensitivities of its kernels. A trace that is estimated as negative, which
    is noise, counts as 0.

    Args:
      problem: gives the groups of layers.
      model, variables, images, labels, samples: as in `traces`.
      key: a random key; consumed.

    Returns:
      float64 ``[G, n]``, in nats; for `IntegerProgram`.
    """
    by_layer = traces(model, variables, images, labels, key, samples)
    table = np.zeros((problem.size, problem.space.n))
    quantizer, space = model.quant.quantizer, model.space
    for group, layer in zip(problem.groups, model.layers, strict=True):
        for kernel in layer.kernels:
            params = variables["params"][layer.name][kernel.name]
            w, step_sizes = params["kernel"], params["step"]
            weights = []
            for choice in range(space.n):
                codes, step_size = quantizer.quantize(w, step_sizes, choice, space)
                weights.append(np.asarray(codes * step_size, np.float64))
            change = np.asarray([((v - weights[-1]) ** 2).mean() for v in weights])
            table[group] += 0.5 * max(by_layer[layer.name][kernel.name], 0.0) * change
    return table
