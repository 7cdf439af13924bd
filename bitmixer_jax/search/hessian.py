"""Sensitivities from second derivatives, instead of from measured losses.

As in HAWQ-V2 (Dong et al., NeurIPS 2020): with H the Hessian of the loss in the weights of a kernel
of N weights, and w_c its weights at width c,

    s[c] = 1/2 * trace(H) / N * |w_c - w_widest|^2

The trace is Hutchinson's estimate, the mean of v.(Hv) over random signs v. Our reading: H is taken
at the widest policy, with straight-through derivatives; what a narrower width does to activations
is not in it.
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
    """Trace of the Hessian of the mean loss in each kernel, at the widest policy.

    Args:
      images: float32 ``[N, H, W, C]``, normalised.
      labels: int32 ``[N]``.
      key: consumed; draws the random signs.
      samples: how many sign vectors the estimate averages.

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
        for layer, own in kernels.items():
            changed = {name: {**params[layer][name], "kernel": own[name]} for name in own}
            params[layer] = {**params[layer], **changed}
        logits: Any = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            images,
            bits=bits,
            train=False,
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def along(kernels: Any, signs: Any, *data: Any) -> jax.Array:
        slopes = jax.tree.map(jnp.vdot, jax.grad(loss)(kernels, *data), signs)
        return sum(jax.tree.leaves(slopes), jnp.float32(0))

    @jax.jit
    def sample(key: jax.Array, kernels: Any, *data: Any) -> Any:
        leaves, tree = jax.tree.flatten(kernels)
        keys = jax.random.split(key, len(leaves))
        signs = jax.tree.unflatten(
            tree,
            [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)],
        )
        # Reverse over reverse: the quantisers have no forward-mode rule.
        products = jax.grad(along)(kernels, signs, *data)
        return jax.tree.map(jnp.vdot, signs, products)

    data = (variables, images, labels)  # arguments: XLA would fold constants for seconds
    found = [jax.device_get(sample(k, kernels, *data)) for k in jax.random.split(key, samples)]
    return jax.tree.map(lambda *values: float(np.mean(values)), *found)


def sensitivity(
    problem: Problem,
    model: Network,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    samples: int = 16,
) -> np.ndarray:
    """Estimated loss of each width for each group of layers: float64 ``[G, n]``.

    Arguments as `traces`; consumes ``key``. A negative trace (noise) counts as none.
    """
    found = traces(model, variables, images, labels, key, samples)
    table = np.zeros((problem.size, problem.space.n))
    quantizer, space = model.quant.quantizer, model.space
    for group, layer in zip(problem.groups, model.layers, strict=True):
        for kernel in layer.kernels:
            own = variables["params"][layer.name][kernel.name]
            weights = []
            for choice in range(space.n):
                codes, step_size = quantizer.quantize(own["kernel"], own["step"], choice, space)
                weights.append(np.asarray(codes * step_size, np.float64))
            change = np.asarray([((w - weights[-1]) ** 2).mean() for w in weights])
            table[group] += 0.5 * max(found[layer.name][kernel.name], 0.0) * change
    return table
