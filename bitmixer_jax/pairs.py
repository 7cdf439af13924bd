"""The pairs of widths of transitional batch norm: which a policy uses, and which are calibrated.

A pair is calibrated if a training step used it, or `recalibrate` did: then it has statistics. Steps
are counted for each pair, in tables ``[P, n]`` (rows: width of the predecessor, columns: own
width). Evaluation refuses a policy that uses a pair without statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax import deprecated
from bitmixer_jax.data import normalize
from bitmixer_jax.errors import UserError
from bitmixer_jax.models import LayerInfo, Network

Variables = Mapping[str, Any]


def calibrated(count: Any) -> Any:
    """Returns which pairs have statistics: bool ``[P, n]`` of the counts ``[P, n]``."""
    return count > 0


def pairs_used(model: Network, policies: jax.Array) -> dict[str, jax.Array]:
    """Finds the pairs that each layer uses under any of the policies.

    Args:
      model: a switchable network.
      policies: int32 ``[M, L]``, may be traced.

    Returns:
      bool ``[P, n]`` by layer name.

    Examples:
      >>> import jax.numpy as jnp
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10, space=bm.BitSpace((2, 4)))
      >>> used = pairs_used(model, jnp.array([[2, 4, 4, 4, 4, 4]]))
      >>> used["stage1.block1.conv2"].tolist()  # 4 bits after 2
      [[False, True], [False, False]]
    """
    n = model.space.n
    own = jax.nn.one_hot(model.space.index(jnp.asarray(policies)), n, dtype=bool)  # [M, L, n]
    used = {}
    for i, layer in enumerate(model.layers):
        if layer.norm_rows(n, model.quant.norm) > 1:
            predecessor = own[:, layer.predecessor, :, None]
        else:
            predecessor = jnp.ones((own.shape[0], 1, 1), bool)
        used[layer.name] = jnp.any(predecessor & own[:, i, None, :], axis=0)
    return used


def find_uncalibrated(
    layers: Sequence[LayerInfo], counts: Sequence[Any], choices: Sequence[int], policies: Any
) -> list[tuple[str, int, int]]:
    """Finds the pairs that policies use and that have no statistics.

    Args:
      layers: the layer table, L of them.
      counts: int32 ``[P, n]`` of each layer.
      choices: the n widths, ascending.
      policies: widths ``[M, L]``, each one of the choices.

    Returns:
      (layer name, width of the predecessor, own width) of each; the width of the predecessor is 0
      where it does not count.
    """
    index = np.searchsorted(choices, policies)
    found = []
    for i, (layer, count) in enumerate(zip(layers, counts, strict=True)):
        used = np.zeros(np.shape(count), bool)
        used[layer.norm_row(index.T, len(count)), index[:, i]] = True
        for row, own in np.argwhere(used & ~calibrated(np.asarray(count))):
            found.append((layer.name, choices[row] if len(count) > 1 else 0, choices[own]))
    return found


def uncalibrated_pairs(
    model: Network, batch_stats: Variables, policies: Any
) -> list[tuple[str, int, int]]:
    """Finds the pairs that policies use and no training step used: their statistics are unknown.

    Args:
      model: a network; the full-precision baseline has no such pairs.
      batch_stats: its variables of that name.
      policies: int32 ``[M, L]``.

    Returns:
      (layer name, width of the predecessor, own width) of each; the width of the predecessor is 0
      where it does not count.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10, space=bm.BitSpace((2, 4)))
      >>> images = jnp.zeros((1, *model.image_shape))
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), images, jnp.full(6, 4))
      >>> untrained = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes["batch_stats"])
      >>> uncalibrated_pairs(model, untrained, [[2, 4, 4, 4, 4, 4]])[:2]
      [('stage1.block1.conv1', 0, 2), ('stage1.block1.conv2', 2, 4)]
    """
    if model.quant.space is None:
        return []
    counts = [batch_stats[name]["conv_norm"]["count"] for name in model.names]
    return find_uncalibrated(model.layers, counts, model.space.choices, np.asarray(policies))


def fill_uncalibrated_pairs(variables: Variables, layers: tuple[LayerInfo, ...]) -> dict[str, Any]:
    """Copies the batch norm of the pair [c, c] to each pair [p, c] that has no statistics yet.

    A stage in which each layer draws its own width starts so: as long as all layers have one
    width, the network computes what it did before. Scale, bias, mean and var are copied; counts
    stay, as no step used the copied pair.

    Args:
      variables: "params" and "batch_stats".
      layers: the layer table.

    Returns:
      new variables.
    """
    params, stats = jax.tree.map(jnp.asarray, (variables["params"], variables["batch_stats"]))
    for layer in layers:
        for kernel in layer.kernels:
            norm = f"{kernel.name}_norm"
            count = stats[layer.name][norm]["count"]
            if count.shape[0] == 1:
                continue
            diagonal = jnp.arange(count.shape[1])
            known = calibrated(count)
            fresh = (~known & known[diagonal, diagonal][None, :])[..., None]

            def filled(table: jax.Array, fresh: Any = fresh, diagonal: Any = diagonal) -> jax.Array:
                return jnp.where(fresh, table[diagonal, diagonal][None], table)

            for tree, leaves in ((params, ("scale", "bias")), (stats, ("mean", "var"))):
                for leaf in leaves:
                    tree[layer.name][norm][leaf] = filled(tree[layer.name][norm][leaf])
    return {"params": params, "batch_stats": stats}


def covering_policies(model: Network) -> np.ndarray:
    """Returns policies that together use every pair of widths at every layer.

    Layer l of policy (i, j) has the width number ``(i + j l) mod n``.

    Args:
      model: a switchable network.

    Returns:
      int32 ``[n^2, L]``.

    Examples:
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10, space=bm.BitSpace((2, 4)))
      >>> covering_policies(model).tolist()[:2]
      [[2, 2, 2, 2, 2, 2], [2, 4, 2, 4, 2, 4]]
    """
    n, choices = model.space.n, np.asarray(model.space.choices, np.int32)
    layer = np.arange(model.num_layers)
    return np.stack(
        [choices[(start + jump * layer) % n] for start in range(n) for jump in range(n)]
    )


def recalibrate(
    model: Network, variables: Any, images: np.ndarray, mean: Any, std: Any, batch_size: int = 128
) -> dict[str, Any]:
    """Estimates the statistics of the pairs that no training step used, and leaves all others.

    Scale and bias of such a pair become those of its [c, c] pair. Its mean and variance become the
    averages over the batches of ``images``, under policies that use all pairs.

    Args:
      model: a switchable network.
      variables: "params" and "batch_stats".
      images: uint8 ``[N, H, W, C]`` of the training data, at least one batch.
      mean, std: ``[C]`` for normalisation.
      batch_size: images in a batch; those left over are not used.

    Returns:
      new variables, in which every pair is calibrated.

    Raises:
      UserError: fewer images than a batch.
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
            known = calibrated(np.asarray(table["count"]))
            norms[norm] = {
                leaf: jnp.where(
                    known if leaf == "count" else known[..., None],
                    table[leaf],
                    stats[layer.name][norm][leaf],
                )
                for leaf in table
            }
        merged[layer.name] = norms
    return {"params": start["params"], "batch_stats": merged}


__getattr__ = deprecated.module_getattr(__name__)
