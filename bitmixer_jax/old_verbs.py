"""The functions of the modules ``runs``, ``search.workdir`` and ``export.workdir`` of version 0.1.

The old names of these modules stand for this module until version 0.3; see `deprecated`. New code
uses the functions that ``bitmixer_jax/__init__.pyi`` lists.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from bitmixer_jax.evaluation import evaluate, recalibrate_missing
from bitmixer_jax.export import ExportSettings, export_network
from bitmixer_jax.export.verify import summary
from bitmixer_jax.files import user_path
from bitmixer_jax.levels import levels_of
from bitmixer_jax.policy import parse_changes
from bitmixer_jax.report import report
from bitmixer_jax.search import SearchSettings, search_front, search_policy
from bitmixer_jax.search.describe import describe_front, describe_policy
from bitmixer_jax.search.plots import write_front
from bitmixer_jax.trained import load
from bitmixer_jax.training import train

Path = str | pathlib.Path


def Settings(**settings: Any) -> SearchSettings | ExportSettings:
    """Returns settings of an export if there is a format, else settings of a search."""
    if "format" not in settings:
        return SearchSettings(**settings)
    renamed = {"carrier": "storage_dtype", "tables": "norm_dtype"}
    settings = {renamed.get(key, key): value for key, value in settings.items()}
    settings["policy"] = settings.get("policy") or None
    settings["changes"] = parse_changes(settings.get("changes", ()))
    return ExportSettings(**settings)


def train_and_report(config: Any, workdir: Path) -> tuple[pathlib.Path, list[str]]:
    """Trains a network and writes its report. Now: ``report(train(config, workdir))``."""
    return report(train(config, workdir))


def evaluate_workdir(
    workdir: Path,
    *,
    changes: Sequence[str] = (),
    recalibrate_unvisited: bool = False,
    count_levels: bool = False,
    data_dir: str | None = None,
    **protocols: Any,
) -> dict[str, Any]:
    """Evaluates a trained network.

    Now: `evaluation.evaluate`, `evaluation.recalibrate_missing` and `levels.levels_of`.
    """
    trained = load(workdir)
    missing: list[tuple[str, int, int]] = []
    if recalibrate_unvisited:
        trained, missing = recalibrate_missing(trained, data_dir)
    result = evaluate(trained, changes=parse_changes(changes), data_dir=data_dir, **protocols)
    if missing:
        result["recalibrated"] = [f"{layer} {p or 'any'}->{width}" for layer, p, width in missing]
    if count_levels:
        result["levels"] = levels_of(trained, data_dir)
    return result


def search_workdir(
    workdir: Path, budget: Sequence[str], out: Path, settings: Any, overwrite: bool = False
) -> list[str]:
    """Searches for a policy and writes it.

    Now: `search.search_policy`, ``result.save(out)`` and `describe.describe_policy`.
    """
    result = search_policy(workdir, budget, **vars(settings))
    result.save(out, overwrite=overwrite)
    return describe_policy(result)


def front_workdir(
    workdir: Path,
    cost: str,
    out: Path,
    settings: Any,
    random: int = 100,
    overwrite: bool = False,
) -> list[str]:
    """Searches for a front and writes it.

    Now: `search.search_front`, `plots.write_front` and `describe.describe_front`.
    """
    front, session = search_front(workdir, cost, random=random, **vars(settings))
    write_front(out, front, overwrite=overwrite)
    return describe_front(front, session)


def export_workdir(workdir: Path, out: Path, settings: Any, overwrite: bool = False) -> list[str]:
    """Exports a trained network. Now: `export.export_network`."""
    result = export_network(workdir, out, overwrite=overwrite, **vars(settings))
    name = user_path(out).name
    written = f"written: {out} ({result['bytes']:,} bytes), {name}.report.json"
    return [summary(result), written]
