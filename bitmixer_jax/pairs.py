"""The pairs of widths of Transitional Batch-Norm: which a policy uses, which training visited.

A pair that no training step visited has no statistics. It is known (visits are counted), refused
by evaluation, and can be recalibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax import deprecated
from bitmixer_jax.data import normalize
from bitmixer_jax.errors import UserError
from bitmixer_jax.models import LayerInfo, Network

Variables = Mapping[str, Any]


def pairs_used(model: Network, policies: jax.Array) -> dict[str, jax.Array]:
    """Which TBN pairs each layer uses under any of the policies: bool ``[P, n]`` by layer.

    Args:
      policies: int32 ``[M, L]``.
    """
    index = model.space.index(jnp.asarray(policies))
    own = jax.nn.one_hot(index, model.space.n, dtype=bool)  # [M, L, n]
    used = {}
    for i, layer in enumerate(model.layers):
        if layer.predecessor >= 0 and model.quant.norm == "transitional":
            before = own[:, layer.predecessor, :, None]
        else:
            before = jnp.ones((own.shape[0], 1, 1), bool)
        used[layer.name] = jnp.any(before & own[:, i, None, :], axis=0)
    return used


def uncalibrated_pairs(
    model: Network, batch_stats: Variables, policies: Any
) -> list[tuple[str, int, int]]:
    """Pairs that the policies use and no training step visited: their statistics are unknown.

    Args:
      policies: int32 ``[M, L]``.

    Returns:
      (layer name, previous width, own width) of each; predecessor is 0 where it has no say.
    """
    if model.quant.space is None:
        return []
    found = []
    choices = model.space.choices
    used = pairs_used(model, jnp.asarray(policies))
    for layer in model.layers:
        count = np.asarray(batch_stats[layer.name]["conv_norm"]["count"])
        for p, c in np.argwhere(np.asarray(used[layer.name]) & (count == 0)):
            found.append((layer.name, choices[p] if len(count) > 1 else 0, choices[c]))
    return found


def fill_uncalibrated_pairs(variables: Variables, layers: tuple[LayerInfo, ...]) -> dict[str, Any]:
    """Hand-over to a layer-wise stage: each pair not visited so far starts from its [c, c] slice.

    Copies scale, bias, mean and var; counts stay, as a copied pair has not been visited. With no
    layer drawing its own width, the network computes what it did before.
    """
    params, stats = jax.tree.map(jnp.asarray, (variables["params"], variables["batch_stats"]))
    for layer in layers:
        for kernel in layer.kernels:
            norm = f"{kernel.name}_norm"
            count = stats[layer.name][norm]["count"]
            if count.shape[0] == 1:
                continue
            diagonal = jnp.arange(count.shape[1])
            fresh = ((count == 0) & (count[diagonal, diagonal] > 0)[None, :])[..., None]

            def filled(table: jax.Array, fresh: Any = fresh, diagonal: Any = diagonal) -> jax.Array:
                return jnp.where(fresh, table[diagonal, diagonal][None], table)

            for tree, leaves in ((params, ("scale", "bias")), (stats, ("mean", "var"))):
                for leaf in leaves:
                    tree[layer.name][norm][leaf] = filled(tree[layer.name][norm][leaf])
    return {"params": params, "batch_stats": stats}


def covering_policies(model: Network) -> np.ndarray:
    """n^2 policies that use every pair of widths at every layer: int32 ``[n^2, L]``."""
    n, choices = model.space.n, np.asarray(model.space.choices, np.int32)
    layer = np.arange(model.num_layers)
    return np.stack(
        [choices[(start + jump * layer) % n] for start in range(n) for jump in range(n)]
    )


def recalibrate(
    model: Network, variables: Any, images: np.ndarray, mean: Any, std: Any, batch_size: int = 128
) -> dict[str, Any]:
    """Estimates the BN statistics of the pairs that no training step visited; leaves all others.

    Scale and bias of such a pair become those of its [c, c] pair; mean and variance the average
    over the batches of ``images``, run through policies that cover all pairs.

    Args:
      images: uint8 ``[N, H, W, C]`` of the training data, at least one batch.
      mean, std: ``[C]`` for normalisation.

    Returns:
      new variables, in which every pair counts as visited.
    """
    if len(images) < batch_size:
        raise UserError(
            f"recalibration: {len(images)} images; give at least {batch_size}", "no-data"
        )
    start = fill_uncalibrated_pairs(variables, model.layers)

    @jax.jit
    def update(stats: Any, batch: jax.Array, bits: jax.Array) -> Any:
        x = normalize(batch, mean, std)
        state = {"params": start["params"], "batch_stats": stats}
        return model.apply(state, x, bits=bits, train=True, mutable=["batch_stats"])[1]

    stats = start["batch_stats"]
    for i in range(len(images) // batch_size):
        batch = images[i * batch_size : (i + 1) * batch_size]
        for policy in covering_policies(model):
            stats = update(stats, batch, policy)["batch_stats"]
    old = variables["batch_stats"]
    merged = dict(old)
    for layer in model.layers:
        norms = {}
        for norm, table in old[layer.name].items():
            unseen = np.asarray(table["count"]) == 0
            norms[norm] = {
                leaf: jnp.where(
                    unseen if leaf == "count" else unseen[..., None],
                    stats[layer.name][norm][leaf],
                    table[leaf],
                )
                for leaf in table
            }
        merged[layer.name] = norms
    return {"params": start["params"], "batch_stats": merged}


__getattr__ = deprecated.module_getattr(__name__)
