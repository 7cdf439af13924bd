"""What the command line does with a workdir: train and report, evaluate."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bitmixer_jax import data as datasets
from bitmixer_jax import distributed as hosts
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Evaluator, UncalibratedPairs, evaluate
from bitmixer_jax.files import user_path
from bitmixer_jax.levels import levels_used
from bitmixer_jax.models import Network, create_model
from bitmixer_jax.pairs import covering_policies, recalibrate, uncalibrated_pairs
from bitmixer_jax.policy import parse_changes, parse_policy, with_widths
from bitmixer_jax.report import table, write_report
from bitmixer_jax.training import Run, load_trained, train
from bitmixer_jax.training.workdir import read_config


def train_and_report(config: Any, workdir: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """Trains (or goes on), evaluates by the three protocols, and writes ``workdir/report``.

    Args:
      config: see `training.default_config`.

    Of several processes, all compute and the first one writes.

    Returns:
      the folder of the report, and its table of accuracies (Markdown lines).

    Raises:
      as `training.train`.
    """
    run = train(config, workdir)
    _, model, variables = load_trained(workdir)
    random = run.report_random if run.stages[-1].widths == "layer" else 0
    try:
        result = _evaluate(run, model, variables, random=random, seed=run.seed)
    except UncalibratedPairs as error:  # a short run has not met every pair: report what there is
        if hosts.is_primary():
            print(f"report without accuracies: {error}")
        result = _evaluate(run, model, variables, uniform=False)
    saved = read_config(workdir)
    reference = _float_reference(run)
    lines = table(result, reference)
    if not hosts.is_primary():
        return workdir / "report", lines
    return write_report(workdir, model, variables["batch_stats"], result, saved, reference), lines


def evaluate_workdir(
    workdir: str,
    *,
    policy: str | None = None,
    changes: Sequence[str] = (),
    random: int = 0,
    seed: int = 0,
    uniform: bool = True,
    data_dir: str | None = None,
    recalibrate_missing: bool = False,
    count_levels: bool = False,
) -> dict[str, Any]:
    """Evaluates a trained network on its test data.

    Args:
      workdir: WORKDIR or WORKDIR@STAGE.
      policy: as `policy.parse_policy` reads it.
      changes: to that policy, as `policy.parse_changes` reads them.
      random, seed, uniform: see `evaluation.evaluate`.
      data_dir: instead of the one that training used.
      recalibrate_missing: estimate the BN statistics of pairs that training never visited; says
        which. Without it a policy that needs them is an error.
      count_levels: add "levels", the list of `levels.levels_used`.

    Returns:
      the result of `evaluation.evaluate`.
    """
    run, model, variables = load_trained(workdir)
    chosen = None
    if changes and policy is None:
        raise UserError("--set changes a policy: give one, such as --policy 4")
    if policy is not None:
        chosen = choose_policy(model, policy, changes)
    if model.quant.space is None and (random or recalibrate_missing or count_levels):
        raise UserError(f"{workdir}: a float twin has no widths to draw, recalibrate or count")
    recalibrated: list[str] = []
    if recalibrate_missing:
        variables, recalibrated = _recalibrated(run, model, variables, data_dir)
    result = _evaluate(
        run,
        model,
        variables,
        random=random,
        seed=seed,
        uniform=uniform,
        policy=chosen,
        data_dir=data_dir,
    )
    if recalibrated:
        result["recalibrated"] = recalibrated
    if count_levels:
        data = run.load(run.train_split, data_dir)
        few = data.subset(np.arange(min(256, len(data))))
        some = datasets.normalize(jnp.asarray(few.images), data.mean, data.std)
        result["levels"] = levels_used(model, variables, some)
    return result


def choose_policy(model: Network, policy: str, changes: Sequence[str] = ()) -> np.ndarray:
    """Returns the policy int32 ``[L]`` of texts that a person typed."""
    widths = parse_policy(policy, model.names, model.space)
    return with_widths(widths, parse_changes(changes), model.names, model.space)


def network_of(workdir: str | None, name: str | None) -> Network:
    """The network of a workdir; or the one called ``name``, with its usual number of classes."""
    if workdir is not None:
        return load_trained(workdir)[1]
    assert name is not None
    model = create_model(name, num_classes=10)
    return model if model.image_shape[0] == 32 else create_model(name, num_classes=1000)


def _evaluate(
    run: Run, model: Network, variables: Any, *, data_dir: str | None = None, **protocols: Any
) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import track

    test = run.load(run.test_split, data_dir)
    evaluator = Evaluator(model, test, test.mean, test.std, batch_size=run.evaluate_batch)

    def progress(policies: Iterable[Any]) -> Iterable[Any]:
        shown = Console().is_terminal
        return track(list(policies), description="evaluating", transient=True, disable=not shown)

    return evaluate(
        evaluator,
        variables,
        groups=model.groups(run.selection),  # type: ignore[arg-type]
        progress=progress,
        **protocols,
    )


def _recalibrated(
    run: Run, model: Network, variables: Any, data_dir: str | None
) -> tuple[Any, list[str]]:
    """Variables with statistics for all pairs, and the pairs that had none, as text."""
    missing = uncalibrated_pairs(model, variables["batch_stats"], covering_policies(model))
    if not missing:
        print("recalibration: training visited every pair of widths; nothing to do")
        return variables, []
    named = [f"{layer} {before or 'any'}->{own}" for layer, before, own in missing]
    train_data = run.load(run.train_split, data_dir)
    order = np.random.default_rng(run.seed).permutation(len(train_data))
    images = train_data.subset(order[: 8 * 128]).images
    print(
        f"recalibrating {len(named)} pairs of widths never visited in training, with {len(images)} "
        f"training images: {', '.join(named[:6])}{', ...' if len(named) > 6 else ''}"
    )
    size = min(128, len(images))
    new = recalibrate(model, variables, images, train_data.mean, train_data.std, size)
    return new, named


def _float_reference(run: Run) -> float | None:
    """Accuracy of the float twin that a run started from or learned from, if there is one."""
    for workdir in (run.init_from, run.teacher):
        if not workdir or user_path(workdir).is_file():
            continue
        try:
            source, model, variables = load_trained(workdir)
            if source.is_baseline:
                result = _evaluate(source, model, variables, data_dir=run.data_dir or None)
                return float(result["float"])
        except UserError as error:  # it is gone since: the report can do without
            print(f"report without the float twin: {error}")
    return None
