"""Evaluation: accuracy of many policies with one compilation, three protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax.bits import sample_random
from bitmixer_jax.data import Dataset, normalize
from bitmixer_jax.errors import UserError
from bitmixer_jax.models import Network
from bitmixer_jax.pairs import never_visited


class Evaluator:
    """Counts right answers of a network on a data set, for any policy, with one compilation.

    The images stay on the devices, an equal part on each. ``traces`` counts compilations.
    """

    def __init__(
        self,
        model: Network,
        data: Dataset,
        mean: Any,
        std: Any,
        devices: Sequence[jax.Device] | None = None,
        batch_size: int = 500,
    ):
        """Places the images.

        Args:
          mean, std: ``[C]`` of the training data, in units of 0..255.
          batch_size: images per device and call; the last batch is padded.
        """
        self.model = model
        self.examples = len(data)
        self.traces = 0
        devices = list(devices or jax.local_devices())
        size = min(batch_size, -(-len(data) // len(devices)))
        batches = -(-len(data) // (size * len(devices)))
        total = batches * size * len(devices)
        labels = np.full(total, -1, np.int32)  # -1: padding, never right
        labels[: len(data)] = data.labels
        images = np.zeros((total, *data.image_shape), np.uint8)
        images[: len(data)] = data.images
        grid = (batches, len(devices), size)
        self._batches = [
            (_shard(i, devices), _shard(y, devices))
            for i, y in zip(
                images.reshape(*grid, *data.image_shape), labels.reshape(grid), strict=True
            )
        ]

        def count(variables: Any, images: jax.Array, labels: jax.Array, bits: Any) -> jax.Array:
            self.traces += 1
            x = normalize(images, mean, std)
            logits: Any = model.apply(variables, x, bits=bits, train=False)
            right = jnp.sum(jnp.argmax(logits, -1) == labels)
            # argmax of NaN is a class, too: a broken network must not score by chance.
            return jnp.where(jnp.isfinite(logits).all(), right, -1)

        self._count: Callable[..., jax.Array] = jax.pmap(
            count, in_axes=(None, 0, 0, None), devices=devices
        )

    def top1(
        self, variables: Any, policies: Any, progress: Callable[..., Any] = iter
    ) -> np.ndarray:
        """Accuracy of each policy: float64 ``[M]`` in 0..1.

        Args:
          variables: of the network.
          policies: int32 ``[M, L]``.
          progress: wraps the iterable of policies, to show how far it is.

        Raises:
          UserError: a policy does not fit, needs BN statistics that no step has seen
            (`pairs.recalibrate`), or gives logits that are not finite.
        """
        if self.model.quant.space is None:
            policies = np.zeros((len(policies), self.model.num_layers), np.int32)
        else:
            policies = self.model.space.check(policies, self.model.num_layers)
        missing = never_visited(self.model, variables["batch_stats"], policies)
        if missing:
            layer, before, own = missing[0]
            raise UserError(
                f"{len(missing)} pairs of widths were never visited in training, such as {before}->"
                f"{own} bits at {layer}: their BN statistics are unknown; recalibrate them "
                "(--recalibrate)"
            )
        scores = []
        for policy in progress(policies):
            counts = [self._count(variables, i, y, policy) for i, y in self._batches]
            right = np.concatenate([np.asarray(c) for c in counts])
            if (right < 0).any():
                raise UserError(
                    f"policy {policy.tolist()}: the logits are not finite; this network is broken"
                )
            scores.append(right.sum() / self.examples)
        return np.asarray(scores)


def _shard(array: np.ndarray, devices: Sequence[jax.Device]) -> jax.Array:
    """Puts slice d of ``array`` ``[D, ...]`` on device d, as pmap wants it."""
    if len(devices) == 1:
        return jax.device_put(array, devices[0])
    mesh = jax.sharding.Mesh(np.asarray(devices), ("batch",))
    spec = jax.sharding.PartitionSpec("batch")
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))


def random_policies(
    model: Network, number: int, seed: int, groups: Sequence[int] | None = None
) -> np.ndarray:
    """``number`` policies with each layer's width drawn evenly: int32 ``[number, L]``."""
    keys = jax.random.split(jax.random.key(seed), number)
    draw = jax.vmap(lambda key: sample_random(key, model.space, model.num_layers, groups))
    return np.asarray(draw(keys))


def evaluate(
    evaluator: Evaluator,
    variables: Any,
    *,
    uniform: bool = True,
    random: int = 0,
    seed: int = 0,
    policy: Any = None,
    groups: Sequence[int] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Evaluates by the three protocols, which are never mixed.

    Args:
      uniform: each width in all layers.
      random: number of random policies.
      seed: of the random policies.
      policy: ``[L]`` a policy of one's own.
      groups: layers that share a width in random policies.
      progress: see `Evaluator.top1`.

    Returns:
      ``{"examples": int, "uniform": {width: top1}, "random": {"policies", "mean", "std", "worst",
      "average_bits", "scores"}, "policy": {"widths", "top1"}}``, without what was not asked for;
      top1 in 0..1, "scores" those of each random policy.
      A float twin has the key "float" alone.
    """
    model = evaluator.model
    result: dict[str, Any] = {"examples": evaluator.examples}
    if model.quant.space is None:
        return result | {"float": float(evaluator.top1(variables, [None], progress)[0])}
    space, layers = model.space, model.num_layers
    blocks = []
    if uniform:
        blocks.append(np.stack([space.uniform(width, layers) for width in space.choices]))
    if random:
        blocks.append(random_policies(model, random, seed, groups))
    if policy is not None:
        blocks.append(space.check(policy, layers)[None])
    if not blocks:
        return result
    scores = evaluator.top1(variables, np.concatenate(blocks), progress)
    if uniform:
        result["uniform"] = {str(w): float(s) for w, s in zip(space.choices, scores, strict=False)}
        scores = scores[space.n :]
    if random:
        mine, drawn = scores[:random], blocks[1 if uniform else 0]
        result["random"] = {
            "policies": random,
            "mean": float(mine.mean()),
            "std": float(mine.std()),
            "worst": float(mine.min()),
            "average_bits": float(drawn.mean()),
            "scores": [float(s) for s in mine],
        }
    if policy is not None:
        result["policy"] = {"widths": blocks[-1][0].tolist(), "top1": float(scores[-1])}
    return result
