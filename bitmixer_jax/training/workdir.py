"""The configuration file of a workdir: the first start writes it, every later start compares it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from bitmixer_jax.data import Dataset, StreamingDataset
from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.data.streams import MEAN
from bitmixer_jax.deprecated import CONFIG_KEYS, MODEL_SETTINGS, new_keys
from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.files import cannot_write, read_json, user_path, write_whole

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"  # held by the process that trains in the folder


def parse_source(source: str | pathlib.Path) -> tuple[pathlib.Path, str]:
    """Splits WORKDIR or WORKDIR@STAGE into folder and stage; the stage is "" if none is named.

    A path may hold an @ of its own: if the whole path exists, it is a folder.

        >>> parse_source("runs/digits@weights")
        (PosixPath('runs/digits'), 'weights')
    """
    path = user_path(source)
    folder, _, stage = str(path).rpartition("@")
    try:
        if not folder or path.exists():
            return path, ""
    except OSError as error:  # such as a name that is too long
        raise UserError(
            f"{str(source)[:200]}: cannot be read ({reason(error)})", "not-readable"
        ) from None
    return pathlib.Path(folder), stage


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """Returns what differs between two JSON trees, one "path: old -> new" each.

    >>> differences({"seed": 0, "model": {"width": 4}}, {"seed": 1, "model": {"width": 4}})
    ['config.seed: 0 -> 1']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{path}.{key}"
            if key not in old:
                found.append(f"{inner}: absent -> {new[key]!r}")
            elif key not in new:
                found.append(f"{inner}: {old[key]!r} -> absent")
            else:
                found += differences(old[key], new[key], inner)
        return found
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def create_or_check_workdir(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    free: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
    write: bool = True,
) -> None:
    """Creates the workdir of a run, or checks that it holds a run of this configuration.

    Args:
      workdir: folder of the run.
      config: the configuration, a JSON tree.
      free: names of settings that may change between starts, such as "log_every".
      defaults: values of settings that did not exist when an older run was started.
      write: False only checks. Of several processes only the first one writes.

    Raises:
      UserError: the folder cannot be written, holds a run of another configuration (the message
        lists what differs), or holds other files where a run's should be.
    """
    path = workdir / CONFIG_FILE
    config = json.loads(json.dumps(config))  # as it will be read: tuples are lists
    if not write and not path.exists():
        raise UserError(
            f"{workdir}: not what the first process sees; give all processes one shared --workdir",
            "other-run",
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            # A setting that is younger than the run has its default on both sides.
            saved = _filled(read_config(workdir), defaults or {})
            found = [
                line
                for line in differences(saved, _filled(config, defaults or {}))
                if not _is_free(line.partition(":")[0].removeprefix("config."), free)
            ]
            if found:
                raise UserError(
                    f"{path}: this workdir holds a run of another configuration: "
                    f"{'; '.join(found)}. Give the same configuration, or another --workdir",
                    "other-run",
                )
        # To write a configuration beside checkpoints of another run would claim them for this one.
        elif (workdir / "checkpoints").exists():
            raise UserError(
                f"{workdir}: has checkpoints but no {CONFIG_FILE}, so it is not a whole run; "
                "choose another --workdir",
                "other-run",
            )
        if not write:
            return
        # Also if it exists: free settings may have changed, and names or settings be new.
        write_whole(path, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise cannot_write(workdir, error, "workdir") from None


def _is_free(name: str, free: Iterable[str]) -> bool:
    """Returns whether a setting is one of the free ones, or part of one."""
    return any(f"{name}.".startswith(f"{allowed}.") for allowed in free)


def _filled(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON tree completed with what ``defaults`` has and it lacks."""
    found = {**defaults, **tree}
    for key, value in tree.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping):
            found[key] = _filled(value, defaults[key])
    return found


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the configuration of the run in ``workdir``: a JSON tree with present names.

    Raises:
      UserError: there is no run, or its configuration cannot be read.
    """
    path = pathlib.Path(workdir) / CONFIG_FILE
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir}: no run here ({CONFIG_FILE} is missing)", "no-run") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})", "not-readable") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({reason(error)})", "damaged") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the configuration of a run", "wrong-format")
    return with_orientation(_with_new_names(config))


def _with_new_names(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a saved configuration with settings and keys under their present names."""
    config = new_keys(config, CONFIG_KEYS)
    if isinstance(config.get("model"), dict):
        config["model"] = new_keys(config["model"], MODEL_SETTINGS)
    return config


def with_orientation(config: dict[str, Any]) -> dict[str, Any]:
    """Adds ``stream.orientation`` to a configuration that was saved before the setting existed.

    Orientation tags of streamed images were ignored then. The setting has no meaning for sets in
    memory, and for ImageNet its default is what was done.
    """
    stream, about = config.get("stream", {}), config.get("dataset_info")
    if not isinstance(stream, dict) or "orientation" in stream or not isinstance(about, dict):
        return config
    # A streamed set is normalised with the statistics of ImageNet; a set in memory has its own.
    streamed = about.get("mean") == [float(x) for x in MEAN]
    auto = StreamSettings().for_dataset(str(config.get("dataset"))).orientation
    orientation = "ignore" if streamed and auto != "ignore" else "auto"
    return {**config, "stream": {**stream, "orientation": orientation}}


def describe_dataset(data: Dataset | StreamingDataset) -> dict[str, Any]:
    """Returns the "dataset_info" of a training set, for its ``config.json``.

    Returns:
      "classes" (names), "image_shape" ``[H, W, C]``, "examples" (their number), "mean" and "std"
      ``[C]`` in units of 0..255.
    """
    return {
        "classes": list(data.classes),
        "image_shape": list(data.image_shape),
        "examples": len(data),
        "mean": [float(x) for x in data.mean],
        "std": [float(x) for x in data.std],
    }


def read_dataset_info(path: pathlib.Path, info: Any) -> dict[str, Any]:
    """Checks the "dataset_info" of a configuration and returns it.

    Args:
      path: of the configuration, for messages.
      info: see `describe_dataset`.

    Raises:
      UserError: something is missing, or has another type or range.
    """

    def count(value: Any) -> bool:
        # `type`, because a bool is an instance of int.
        return type(value) is int and 1 <= value < 2**31

    def numbers(value: Any, least: float) -> bool:
        return (
            isinstance(value, list)
            and len(value) == info["image_shape"][2]
            and all(type(x) in (int, float) and least < x < 1e6 for x in value)
        )

    checks = {
        "classes": lambda v: (
            isinstance(v, list) and len(v) > 0 and all(isinstance(name, str) for name in v)
        ),
        "image_shape": lambda v: isinstance(v, list) and len(v) == 3 and all(map(count, v)),
        "examples": count,
        "mean": lambda v: numbers(v, -1e6),
        "std": lambda v: numbers(v, 0),
    }
    if not isinstance(info, dict):
        raise UserError(
            f'{path}: "dataset_info", the data of this network, is missing or damaged', "damaged"
        )
    for key, good in checks.items():
        if not good(info.get(key)):
            raise UserError(
                f'{path}: "dataset_info" has a missing or damaged entry {key!r}', "damaged"
            )
    return info
