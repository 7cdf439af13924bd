"""Scores a network under many policies with one compilation: `Evaluator`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bitmixer_jax.data import Dataset, StreamingDataset, normalize
from bitmixer_jax.distributed import local_batch_indices, local_devices, shard
from bitmixer_jax.errors import UserError
from bitmixer_jax.models import Network
from bitmixer_jax.pairs import uncalibrated_pairs

# Wraps the list of calls to make, for example with a progress bar.
Progress = Callable[[list[Any]], Iterable[Any]]


class UncalibratedPairs(UserError):
    """A policy uses a pair of widths that training never visited: it has no BN statistics."""

    default_code = "uncalibrated"


class Scores(NamedTuple):
    """Accuracy and loss of M policies.

    Attributes:
      top1: accuracy of each policy, float64 ``[M]`` in 0..1.
      loss: mean cross-entropy of each policy, float64 ``[M]`` in nats.
    """

    top1: np.ndarray
    loss: np.ndarray


class Evaluator:
    """Scores a network on a data set under any policies, with one compilation.

    The images stay on the devices, an equal part on each. Streamed images are decoded once for each
    call of `scores`, whatever the number of policies. If the devices belong to several processes,
    all processes must call `scores`, and all get the scores on the whole data set.

    Attributes:
      model: the network.
      examples: number of images. For streamed data: of those that the last `scores` could read.
      traces: how often JAX traced the program: once, whatever the policies.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import bitmixer_jax as bm
      >>> from bitmixer_jax import data
      >>> digits = data.load("digits", "test[:20]")
      >>> model = bm.create_model("resnet8", num_classes=10, image_shape=(8, 8, 1), width=4)
      >>> baseline = model.baseline()  # it has no widths, so it needs no training to be scored
      >>> shapes = jax.eval_shape(baseline.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)  # all logits are 0
      >>> evaluator = Evaluator(baseline, digits, digits.mean, digits.std)
      >>> scores = evaluator.scores(zeros, [None])
      >>> scores.top1.shape, scores.loss.round(3).tolist()  # ln 10 nats
      ((1,), [2.303])
    """

    def __init__(
        self,
        model: Network,
        data: Dataset | StreamingDataset,
        mean: Any,
        std: Any,
        devices: Sequence[jax.Device] | None = None,
        batch_size: int = 500,
        policies: int = 16,
    ):
        """Places the images on the devices.

        Args:
          model: the network.
          data: images uint8 ``[N, H, W, C]`` and their labels.
          mean: ``[C]`` mean of the training images, in units of 0..255.
          std: ``[C]`` standard deviation of the training images, in units of 0..255.
          devices: to compute on; None: the devices of this process.
          batch_size: images per device and call; the last batch is padded.
          policies: largest number of policies in one call of the compiled program.
        """
        self.model = model
        self.examples = len(data)
        self.traces = 0
        self._policies_per_call = policies
        devices = list(devices or jax.local_devices())
        batch_size = min(batch_size, -(-len(data) // len(devices))) * len(devices)  # of all devices
        self._num_batches = -(-len(data) // batch_size)
        devices_here = local_devices(devices)
        indices = local_batch_indices(devices, batch_size)
        self._several_processes = len(devices_here) < len(devices)
        self._batches: Callable[[], Iterable[Any]]
        if isinstance(data, StreamingDataset):
            self._batches = lambda: _stream(data, devices_here, batch_size, indices)
        else:
            placed = _place(data, devices_here, batch_size, indices)
            self._batches = lambda: placed

        def score(
            variables: Any, images: jax.Array, labels: jax.Array, policies: Any, number: Any
        ) -> tuple[jax.Array, jax.Array]:
            """Scores a batch under the first ``number`` of K policies.

            Returns:
              right answers int32 ``[K]``, or -1 if a logit is not finite; summed losses float32
              ``[K]``. Both are 0 after the first ``number``.
            """
            self.traces += 1
            x = normalize(images, mean, std)

            def body(i: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                # Accelerators would compute products of real values (stem, head) with fewer bits.
                with jax.default_matmul_precision("highest"):
                    logits: Any = model.apply(variables, x, bits=policies[i], train=False)
                right = jnp.sum(jnp.argmax(logits, -1) == labels)
                # argmax of NaN is a class, too: a broken network must not score by chance.
                right = jnp.where(jnp.isfinite(logits).all(), right, -1)
                loss = optax.softmax_cross_entropy_with_integer_labels(
                    logits, jnp.maximum(labels, 0), where=labels >= 0
                )
                return sums[0].at[i].set(right), sums[1].at[i].set(loss.sum())

            # A loop over policies, and not vmap: each policy has its own kernels, so XLA turns a
            # vmapped convolution into a grouped one, which took 7 to 12 times as long on CPU.
            size = policies.shape[0]
            zeros = (jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.float32))
            return jax.lax.fori_loop(0, number, body, zeros)

        # pmap over the devices of this process: each device returns the sums of its own images.
        # Devices and processes never communicate, so none waits for another.
        self._score: Callable[..., tuple[jax.Array, jax.Array]] = jax.pmap(
            score, in_axes=(None, 0, 0, None, None), devices=devices_here
        )

    def top1(self, variables: Any, policies: Any, progress: Progress = iter) -> np.ndarray:
        """Returns the accuracy of each policy: float64 ``[M]`` in 0..1.

        Arguments and errors are those of `scores`.
        """
        return self.scores(variables, policies, progress).top1

    def scores(self, variables: Any, policies: Any, progress: Progress = iter) -> Scores:
        """Returns the accuracy and the loss of each policy.

        Args:
          variables: of the network: "params" and "batch_stats".
          policies: int32 ``[M, L]`` widths. For a full-precision baseline only M counts.
          progress: wraps the list of calls to make, for example with a progress bar.

        Raises:
          UncalibratedPairs: a policy uses a pair of widths that training never visited.
          UserError: a policy does not fit the network, the logits are not finite, or no image can
            be read.
        """
        if self.model.quant.space is None:
            policies = np.zeros((len(policies), self.model.num_layers), np.int32)
        else:
            policies = self.model.space.check(policies, self.model.num_layers)
        missing = uncalibrated_pairs(self.model, variables["batch_stats"], policies)
        if missing:
            layer, predecessor, width = missing[0]
            raise UncalibratedPairs(
                f"{len(missing)} pairs of widths were never visited in training, such as "
                f"{predecessor or 'any'}->{width} bits at {layer}: their BN statistics are "
                "unknown; train for longer, or recalibrate them"
            )
        right = np.zeros(len(policies), np.int64)
        loss = np.zeros(len(policies), np.float64)
        size = self._policies_per_call
        # The outer loop is over batches, so that each batch is streamed once for all policies.
        starts = range(0, len(policies), size)
        calls = [(batch, start) for batch in range(self._num_batches) for start in starts]
        batches = iter(self._batches()) if calls else iter(())
        examples = 0
        for _, start in progress(calls):
            if start == 0:
                images, labels, count = next(batches)
                examples += count
            part = policies[start : start + size]
            number = len(part)
            # Always K policies, so that the program is compiled once; the padding is not computed.
            padded = np.concatenate([part, np.repeat(part[:1], size - number, axis=0)])
            answers = self._score(variables, images, labels, padded, np.int32(number))
            part_right, part_loss = (np.asarray(x)[:, :number] for x in answers)  # [D, number]
            broken = np.flatnonzero((part_right < 0).any(0))
            if len(broken):
                raise UserError(
                    f"policy {part[broken[0]].tolist()}: the logits are not finite; "
                    "this network is broken",
                    "not-finite",
                )
            right[start : start + size] += part_right.sum(0)
            loss[start : start + size] += part_loss.astype(np.float64).sum(0)
        if calls:
            if self._several_processes:
                right, loss, examples = _sum_over_processes(right, loss, examples)
            self.examples = examples
            if not examples:
                raise UserError("evaluation: none of the images can be read", "no-data")
        return Scores(right / self.examples, loss / self.examples)


def _place(
    data: Dataset, devices: Sequence[jax.Device], batch_size: int, indices: np.ndarray
) -> list[Any]:
    """Places a data set on the devices of this process.

    Args:
      data: the data set.
      devices: of this process.
      batch_size: images in a batch, over all processes.
      indices: int ``[b]``: which images of a batch this process takes.

    Returns:
      (images, labels, number of images without padding) of each batch. Only the last has padding.
    """
    total = -(-len(data) // batch_size) * batch_size
    labels = np.full(total, -1, np.int32)  # -1 marks padding: no answer is right, no loss counts
    labels[: len(data)] = data.labels
    images = np.zeros((total, *data.image_shape), np.uint8)
    images[: len(data)] = data.images
    return [
        _shard_batch(images[start + indices], labels[start + indices], devices)
        for start in range(0, total, batch_size)
    ]


def _stream(
    data: StreamingDataset, devices: Sequence[jax.Device], batch_size: int, indices: np.ndarray
) -> Iterator[Any]:
    """Yields the same batches as `_place`, decoded one after the other."""
    loader = data.evaluation(batch_size, indices)
    try:
        for images, labels in loader:
            yield _shard_batch(images, labels, devices)
    finally:
        loader.close()


def _shard_batch(
    images: np.ndarray, labels: np.ndarray, devices: Sequence[jax.Device]
) -> tuple[jax.Array, jax.Array, int]:
    return *shard((images, labels), devices), int((labels >= 0).sum())


def _sum_over_processes(
    right: np.ndarray, loss: np.ndarray, examples: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the sums of the arguments over all processes."""
    from jax.experimental import multihost_utils

    sums = np.concatenate([right, loss, [examples]])  # float64 holds these counts exactly
    # JAX would round float64 to float32, so the numbers are sent as bytes.
    gathered = multihost_utils.process_allgather(np.frombuffer(sums.tobytes(), np.uint8))
    by_process = np.frombuffer(np.asarray(gathered).tobytes(), np.float64)
    sums = by_process.reshape(-1, len(sums)).sum(0)
    return sums[: len(right)].astype(np.int64), sums[len(right) : -1], int(sums[-1])
