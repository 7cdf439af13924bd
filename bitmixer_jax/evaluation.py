"""Evaluation: accuracy of many policies with one compilation, three protocols."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bitmixer_jax import deprecated
from bitmixer_jax.data import Dataset, StreamingDataset, normalize
from bitmixer_jax.distributed import local_batch_indices, local_devices, shard
from bitmixer_jax.errors import UserError
from bitmixer_jax.models import Network
from bitmixer_jax.pairs import covering_policies, recalibrate, uncalibrated_pairs
from bitmixer_jax.policy import as_policy, sample_random
from bitmixer_jax.trained import Trained, load

Progress = Callable[[list[Any]], Iterable[Any]]


class UncalibratedPairs(UserError):
    """Policies need batch norm statistics of pairs that no training step visited."""

    default_code = "uncalibrated"


class Scores(NamedTuple):
    """How well policies do: float64 ``[M]`` each.

    Attributes:
      top1: accuracy, 0..1.
      loss: mean cross-entropy, nats.
    """

    top1: np.ndarray
    loss: np.ndarray


class Evaluator:
    """Scores a network on a data set under any policies, with one compilation.

    The images stay on the devices, an equal part on each; streamed ones are decoded once for all
    policies of a call of `scores`. One call of the compiled programme runs up to ``policies`` of
    them over one batch: how many is data, as they are. ``traces`` counts compilations. If the
    devices belong to several processes, all of them call `scores`; each computes the part of its
    own devices, and the sums go to all.

    Attributes:
      examples: number of images; of streamed ones, those that could be read in the last `scores`.
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
        """Places the images.

        Args:
          mean, std: ``[C]`` of the training data, in units of 0..255.
          devices: to compute on; None takes those of this process.
          batch_size: images per device and call; the last batch is padded.
          policies: most that one call runs.
        """
        self.model = model
        self.examples = len(data)
        self.traces = 0
        self._policies = policies
        devices = list(devices or jax.local_devices())
        size = min(batch_size, -(-len(data) // len(devices)))
        whole = size * len(devices)
        self._number = -(-len(data) // whole)
        own, here = local_batch_indices(devices, whole), local_devices(devices)
        self._shared = len(here) < len(devices)
        self._feed: Callable[[], Iterable[Any]]
        if isinstance(data, StreamingDataset):
            self._feed = lambda: _stream(data, here, whole, own)
        else:
            resident = _place(data, here, whole, own)
            self._feed = lambda: resident

        def score(
            variables: Any, images: jax.Array, labels: jax.Array, policies: Any, number: Any
        ) -> tuple[jax.Array, jax.Array]:
            """Right answers int32 and summed losses float32, ``[K]`` each, of the first ``number``.

            A loop, not vmap: with kernels that differ, XLA makes vmap a grouped convolution, which
            took 7 to 12 times as long on CPU.
            """
            self.traces += 1
            x = normalize(images, mean, std)

            def body(i: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                with jax.default_matmul_precision("highest"):  # of real values, on accelerators
                    logits: Any = model.apply(variables, x, bits=policies[i], train=False)
                right = jnp.sum(jnp.argmax(logits, -1) == labels)
                # argmax of NaN is a class, too: a broken network must not score by chance.
                right = jnp.where(jnp.isfinite(logits).all(), right, -1)
                loss = optax.softmax_cross_entropy_with_integer_labels(
                    logits, jnp.maximum(labels, 0), where=labels >= 0
                )
                return sums[0].at[i].set(right), sums[1].at[i].set(loss.sum())

            size = policies.shape[0]
            nothing = (jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.float32))
            return jax.lax.fori_loop(0, number, body, nothing)

        self._score: Callable[..., tuple[jax.Array, jax.Array]] = jax.pmap(
            score, in_axes=(None, 0, 0, None, None), devices=here
        )

    def top1(self, variables: Any, policies: Any, progress: Progress = iter) -> np.ndarray:
        """Accuracy of each policy: float64 ``[M]`` in 0..1. Arguments and errors as `scores`."""
        return self.scores(variables, policies, progress).top1

    def scores(self, variables: Any, policies: Any, progress: Progress = iter) -> Scores:
        """Accuracy and loss of each policy.

        Args:
          variables: of the network.
          policies: int32 ``[M, L]``.
          progress: wraps the list of calls to make, to show how far it is.

        Raises:
          UserError: a policy does not fit, needs BN statistics that no step has seen
            (`pairs.recalibrate`), or gives logits that are not finite.
        """
        if self.model.quant.space is None:
            policies = np.zeros((len(policies), self.model.num_layers), np.int32)
        else:
            policies = self.model.space.check(policies, self.model.num_layers)
        missing = uncalibrated_pairs(self.model, variables["batch_stats"], policies)
        if missing:
            layer, before, own = missing[0]
            raise UncalibratedPairs(
                f"{len(missing)} pairs of widths were never visited in training, such as "
                f"{before or 'any'}->{own} bits at {layer}: their BN statistics are unknown; train "
                "for longer, or recalibrate them (evaluate --recalibrate)"
            )
        right = np.zeros(len(policies), np.int64)
        loss = np.zeros(len(policies), np.float64)
        most = self._policies
        starts = range(0, len(policies), most)
        # Batches outermost: each is streamed once, whatever the number of policies.
        calls = [(batch, start) for batch in range(self._number) for start in starts]
        feed = iter(self._feed()) if calls else iter(())
        examples = 0
        for _, start in progress(calls):
            if not start:
                images, labels, there = next(feed)
                examples += there
            rows = policies[start : start + most]
            padded = np.concatenate([rows, np.repeat(rows[:1], most - len(rows), axis=0)])
            counts, losses = self._score(variables, images, labels, padded, np.int32(len(rows)))
            # Gathered over devices: [D, K].
            found = np.asarray(counts)[:, : len(rows)]
            broken = np.flatnonzero((found < 0).any(0))
            if len(broken):
                raise UserError(
                    f"policy {rows[broken[0]].tolist()}: the logits are not finite; "
                    "this network is broken",
                    "not-finite",
                )
            right[start : start + most] += found.sum(0)
            loss[start : start + most] += np.asarray(losses, np.float64)[:, : len(rows)].sum(0)
        if calls:
            if self._shared:
                right, loss, examples = _sum_over_processes(right, loss, examples)
            self.examples = examples
            if not examples:
                raise UserError("evaluation: none of the images can be read", "no-data")
        return Scores(right / self.examples, loss / self.examples)


def _place(data: Dataset, devices: Sequence[jax.Device], whole: int, own: np.ndarray) -> list[Any]:
    """Batches of (images, labels, how many there are), on the devices; the last one is padded.

    Args:
      whole: images in a batch, of all processes.
      own: int ``[b]`` places in it that ``devices`` take.
    """
    total = -(-len(data) // whole) * whole
    labels = np.full(total, -1, np.int32)  # -1: padding, never right
    labels[: len(data)] = data.labels
    images = np.zeros((total, *data.image_shape), np.uint8)
    images[: len(data)] = data.images
    return [
        _batch(i[own], y[own], devices)
        for i, y in zip(
            images.reshape(-1, whole, *data.image_shape), labels.reshape(-1, whole), strict=True
        )
    ]


def _stream(
    data: StreamingDataset, devices: Sequence[jax.Device], whole: int, own: np.ndarray
) -> Iterator[Any]:
    """The same, decoded on the way."""
    loader = data.evaluation(whole, own)
    try:
        for images, labels in loader:
            yield _batch(images, labels, devices)
    finally:
        loader.close()


def _batch(
    images: np.ndarray, labels: np.ndarray, devices: Sequence[jax.Device]
) -> tuple[jax.Array, jax.Array, int]:
    return *shard((images, labels), devices), int((labels >= 0).sum())


def _sum_over_processes(
    right: np.ndarray, loss: np.ndarray, examples: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Sums of what each process found; float64 travels as bytes, as JAX would round it."""
    from jax.experimental import multihost_utils

    mine = np.concatenate([right, loss, [examples]])  # counts are exact in float64
    heard = multihost_utils.process_allgather(np.frombuffer(mine.tobytes(), np.uint8))
    found = np.frombuffer(np.asarray(heard).tobytes(), np.float64).reshape(-1, len(mine)).sum(0)
    policies = len(right)
    return found[:policies].astype(np.int64), found[policies:-1], int(found[-1])


def random_policies(
    model: Network, number: int, seed: int, groups: Sequence[int] | None = None
) -> np.ndarray:
    """``number`` policies with each layer's width drawn evenly: int32 ``[number, L]``."""
    keys = jax.random.split(jax.random.key(seed), number)
    draw = jax.vmap(lambda key: sample_random(key, model.space, model.num_layers, groups))
    return np.asarray(draw(keys))


def evaluate(
    source: Trained | str | pathlib.Path,
    *,
    policy: Any = None,
    changes: Mapping[str, int] | None = None,
    random: int = 0,
    seed: int = 0,
    uniform: bool = True,
    data_dir: str | None = None,
    progress: Progress = iter,
    **others: Any,
) -> dict[str, Any]:
    """Measures the test accuracy of a trained network by the three protocols.

    The protocols are never mixed: every uniform width, random policies, one policy of your own.

        result = bm.evaluate("runs/digits", random=100, policy=3)
        result["uniform"]["4"], result["random"]["mean"], result["policy"]["top1"]

    Args:
      source: WORKDIR, WORKDIR@STAGE, or what `trained.load` returned.
      policy: as `policy.as_policy` reads it: widths, one width for all layers, text, a file.
      changes: widths of some layers of that policy, by name: see `policy.with_widths`.
      random: number of random policies.
      seed: of the random policies.
      uniform: evaluate each width in all layers.
      data_dir: where the data are, if not where training found them.
      progress: wraps the list of calls to make, to show how far it is.

    Returns:
      as `evaluate_protocols`.

    Raises:
      UserError: as `trained.load`, `Run.load` and `Evaluator.scores`.
    """
    if isinstance(source, Evaluator):  # up to version 0.1: evaluate(evaluator, variables, ...)
        deprecated.warn("evaluation.evaluate(evaluator, ...)", "evaluate_protocols")
        return evaluate_protocols(
            source, policy, uniform=uniform, random=random, seed=seed, progress=progress, **others
        )
    assert not others
    trained = load(source)
    if policy is not None:
        policy = as_policy(policy, trained.model.names, trained.model.space, changes)
    elif changes:
        raise UserError("changes of widths: of a policy; give one, such as 4", "missing-value")
    if random:
        trained.require_widths("draw")
    return evaluate_protocols(
        make_evaluator(trained, data_dir),
        trained.variables,
        uniform=uniform,
        random=random,
        seed=seed,
        policy=policy,
        groups=trained.groups,
        progress=progress,
    )


def make_evaluator(trained: Trained, data_dir: str | None = None) -> Evaluator:
    """Returns an Evaluator of a trained network on its test split."""
    data = trained.load_split(trained.run.test_split, data_dir)
    size = trained.run.evaluate_batch
    return Evaluator(trained.model, data, data.mean, data.std, batch_size=size)


def recalibrate_missing(
    trained: Trained, data_dir: str | None = None
) -> tuple[Trained, list[tuple[str, int, int]]]:
    """Estimates the BN statistics of the pairs that training never visited.

    1,024 images of the training split are used: see `pairs.recalibrate`.

    Returns:
      the network with statistics for all pairs; and the pairs that had none, as
      `pairs.uncalibrated_pairs` names them. Without such pairs the network is returned as it is.
    """
    trained.require_widths("recalibrate")
    model, run = trained.model, trained.run
    missing = uncalibrated_pairs(model, trained.variables["batch_stats"], covering_policies(model))
    if not missing:
        return trained, []
    data = trained.load_split(run.train_split, data_dir)
    order = np.random.default_rng(run.seed).permutation(len(data))
    images = data.subset(order[: 8 * 128]).images
    size = min(128, len(images))
    variables = recalibrate(model, trained.variables, images, data.mean, data.std, size)
    return dataclasses.replace(trained, variables=variables), missing


def evaluate_protocols(
    evaluator: Evaluator,
    variables: Any,
    *,
    uniform: bool = True,
    random: int = 0,
    seed: int = 0,
    policy: Any = None,
    groups: Sequence[int] | None = None,
    progress: Progress = iter,
) -> dict[str, Any]:
    """Evaluates variables by the three protocols, with an Evaluator of the network.

    Args:
      uniform: each width in all layers.
      random: number of random policies.
      seed: of the random policies.
      policy: ``[L]`` a policy of one's own.
      groups: layers that share a width in random policies.
      progress: as `evaluate`.

    Returns:
      ``{"examples": int, "uniform": {width: top1}, "random": {"policies", "mean", "std", "worst",
      "average_bits", "scores"}, "policy": {"widths", "top1"}}``, without what was not asked for;
      top1 in 0..1, "scores" those of each random policy.
      A full-precision baseline has "examples" and "float".
    """
    model = evaluator.model
    result: dict[str, Any] = {"examples": evaluator.examples}
    if model.quant.space is None:
        top1 = float(evaluator.top1(variables, [None], progress)[0])
        return {"examples": evaluator.examples, "float": top1}
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
    result["examples"] = evaluator.examples  # of streamed ones, some may be unreadable
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


__getattr__ = deprecated.module_getattr(__name__)
