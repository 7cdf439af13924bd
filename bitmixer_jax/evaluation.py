"""Measures the accuracy of a trained network by three protocols.

They are uniform widths, random policies, and one policy that the caller gives. `Evaluator` scores
any network, data set and policies.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bitmixer_jax import deprecated
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluator import Evaluator as Evaluator
from bitmixer_jax.evaluator import Progress as Progress
from bitmixer_jax.evaluator import Scores as Scores
from bitmixer_jax.evaluator import UncalibratedPairs as UncalibratedPairs
from bitmixer_jax.models import Network
from bitmixer_jax.pairs import covering_policies, recalibrate, uncalibrated_pairs
from bitmixer_jax.policy import as_policy, sample_random
from bitmixer_jax.trained import Trained, load

_RECALIBRATION_BATCHES = 8
_RECALIBRATION_BATCH = 128  # images


def random_policies(
    model: Network, number: int, seed: int, groups: Sequence[int] | None = None
) -> np.ndarray:
    """Draws random policies: the width of each layer is drawn with equal probabilities.

    Args:
      model: a switchable network with L layers.
      number: M, how many policies to draw.
      seed: of the draws.
      groups: ``[L]`` group of each layer, if the layers of a group share one width.

    Returns:
      int32 ``[M, L]`` widths.

    Examples:
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10)
      >>> policies = random_policies(model, 100, seed=0)
      >>> policies.shape, sorted(set(policies.ravel().tolist()))
      ((100, 6), [2, 3, 4])
    """
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
    """Measures the test accuracy of a trained network by three protocols.

    The protocols are each uniform width, random policies, and one policy that the caller gives.
    Each has its own entry in the result. An accuracy is a share of right answers, 0..1.

    Args:
      source: WORKDIR, WORKDIR@STAGE, or what `trained.load` returned.
      policy: a policy to evaluate: ``[L]`` widths, one width for all layers, text such as
        "4,3,2,2,3,4", or a policy file. See `policy.as_policy`.
      changes: widths of some layers of that policy, by layer name. See `policy.with_widths`.
      random: number of random policies.
      seed: of the random policies.
      uniform: evaluate each width in all layers.
      data_dir: folder of the data, if they are no longer where training found them.
      progress: wraps the list of calls to make, for example with a progress bar.

    Returns:
      the result of `evaluate_protocols`.

    Raises:
      UserError: as `trained.load`, `Trained.load_split` and `Evaluator.scores`; or the policy does
        not fit the network.

    Examples:
      >>> import bitmixer_jax as bm
      >>> result = bm.evaluate("runs/digits", random=100, policy=3)  # doctest: +SKIP
      >>> result["uniform"]["4"], result["policy"]["top1"]  # doctest: +SKIP
      (0.98, 0.97)
      >>> result["random"]["mean"], result["random"]["worst"]  # doctest: +SKIP
      (0.972, 0.96)
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
        raise UserError("changes of widths need a policy; give one, such as 4", "missing-value")
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
    """Returns an Evaluator of a trained network on its test split.

    Args:
      trained: the network.
      data_dir: folder of the data, if they are no longer where training found them.

    Raises:
      UserError: as `Trained.load_split`.
    """
    data = trained.load_split(trained.run.test_split, data_dir)
    size = trained.run.evaluate_batch
    return Evaluator(trained.model, data, data.mean, data.std, batch_size=size)


def recalibrate_missing(
    trained: Trained, data_dir: str | None = None
) -> tuple[Trained, list[tuple[str, int, int]]]:
    """Estimates the BN statistics of the pairs of widths that training never visited.

    It uses 1,024 images of the training split. See `pairs.recalibrate`.

    Args:
      trained: the network.
      data_dir: folder of the data, if they are no longer where training found them.

    Returns:
      a network in which all pairs are calibrated; and the pairs that were not, as (layer name,
      width of the predecessor, own width). If there are none, the network is ``trained`` itself.

    Raises:
      UserError: the network is a full-precision baseline, or as `Trained.load_split`.

    Examples:
      >>> import bitmixer_jax as bm
      >>> trained = bm.load("runs/digits@weights")  # doctest: +SKIP
      >>> calibrated, pairs = recalibrate_missing(trained)  # doctest: +SKIP
      >>> result = bm.evaluate(calibrated, random=100)  # doctest: +SKIP
    """
    trained.require_widths("recalibrate")
    model, run = trained.model, trained.run
    missing = uncalibrated_pairs(model, trained.variables["batch_stats"], covering_policies(model))
    if not missing:
        return trained, []
    data = trained.load_split(run.train_split, data_dir)
    order = np.random.default_rng(run.seed).permutation(len(data))
    images = data.subset(order[: _RECALIBRATION_BATCHES * _RECALIBRATION_BATCH]).images
    size = min(_RECALIBRATION_BATCH, len(images))
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
    """Evaluates variables by the three protocols, with the Evaluator of a network.

    Args:
      evaluator: of the network and the data set.
      variables: of the network: "params" and "batch_stats".
      uniform: evaluate each width in all layers.
      random: number of random policies.
      seed: of the random policies.
      policy: ``[L]`` widths, one more policy to evaluate.
      groups: ``[L]`` group of each layer, if layers of a group share a width in random policies.
      progress: wraps the list of calls to make, for example with a progress bar.

    Returns:
      a JSON tree. An entry that was not asked for is absent. Accuracies are in 0..1.

      - "examples": number of images.
      - "uniform": accuracy by width, such as ``{"2": 0.93, "3": 0.97, "4": 0.98}``.
      - "random": "policies" (how many), "mean", "std", "worst", "average_bits" (mean width over all
        layers and policies), "scores" (accuracy of each policy).
      - "policy": "widths" and "top1".
      - "float": accuracy of a full-precision baseline, which has this and "examples" alone.

    Raises:
      UserError: as `Evaluator.scores`.

    Examples:
      >>> evaluator = make_evaluator(trained)  # doctest: +SKIP
      >>> evaluate_protocols(evaluator, trained.variables, random=100)  # doctest: +SKIP
      {'examples': 360, 'uniform': {'2': 0.93, ...}, 'random': {'policies': 100, ...}}
    """
    model = evaluator.model
    result: dict[str, Any] = {"examples": evaluator.examples}
    if model.quant.space is None:
        (accuracy,) = evaluator.top1(variables, [None], progress)
        return {"examples": evaluator.examples, "float": float(accuracy)}
    space, layers = model.space, model.num_layers
    by_protocol: dict[str, np.ndarray] = {}
    if uniform:
        by_protocol["uniform"] = np.stack([space.uniform(w, layers) for w in space.choices])
    if random:
        by_protocol["random"] = random_policies(model, random, seed, groups)
    if policy is not None:
        by_protocol["policy"] = space.check(policy, layers)[None]
    if not by_protocol:
        return result
    # One call for all protocols, so that streamed images are decoded once.
    top1 = evaluator.top1(variables, np.concatenate(list(by_protocol.values())), progress)
    ends = np.cumsum([len(policies) for policies in by_protocol.values()])
    scores = dict(zip(by_protocol, np.split(top1, ends[:-1]), strict=True))
    result["examples"] = evaluator.examples  # some streamed images may be unreadable
    if uniform:
        pairs = zip(space.choices, scores["uniform"].tolist(), strict=True)
        result["uniform"] = {str(width): accuracy for width, accuracy in pairs}
    if random:
        result["random"] = {
            "policies": random,
            "mean": float(scores["random"].mean()),
            "std": float(scores["random"].std()),
            "worst": float(scores["random"].min()),
            "average_bits": float(by_protocol["random"].mean()),
            "scores": scores["random"].tolist(),
        }
    if policy is not None:
        widths = by_protocol["policy"][0].tolist()
        result["policy"] = {"widths": widths, "top1": float(scores["policy"][0])}
    return result


__getattr__ = deprecated.module_getattr(__name__)
