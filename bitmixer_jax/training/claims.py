"""Whose a folder is: the configuration of the run that lives there."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from bitmixer_jax.data.settings import StreamSettings
from bitmixer_jax.data.streams import MEAN
from bitmixer_jax.errors import UserError

CONFIG_FILE = "config.json"


def parse_source(source: str | pathlib.Path) -> tuple[pathlib.Path, str]:
    """Folder and stage ("" if none is named) of WORKDIR or WORKDIR@STAGE.

    A path may hold an @ of its own: what exists is a folder.
    """
    folder, _, stage = str(source).rpartition("@")
    if not folder or pathlib.Path(source).exists():
        return pathlib.Path(source), ""
    return pathlib.Path(folder), stage


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """What differs between two JSON trees, one "path: old -> new" each."""
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


def claim(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    free: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
    write: bool = True,
) -> None:
    """Makes ``workdir`` the home of a run with this configuration, or checks that it is.

    Args:
      config: JSON tree.
      free: top-level keys that may change between starts (how often to log, for example).
      defaults: of settings that a run from before they existed does not name.
      write: false: only check (of several processes one alone writes).

    Raises:
      UserError: the folder cannot be written, holds a run of another configuration (the message
        lists what differs), or holds other files where a run's should be.
    """
    path = workdir / CONFIG_FILE
    config = json.loads(json.dumps(config))
    if not write and not path.exists():
        raise UserError(
            f"{workdir}: not what the first process sees; give all processes one shared --workdir"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            saved = _filled(read_config(workdir), defaults or {})
            found = [
                line
                for line in differences(saved, _filled(config, defaults or {}))
                if line.split(":")[0].split(".")[1] not in free
            ]
            if found:
                raise UserError(
                    f"{path}: this workdir holds a run of another configuration: "
                    f"{'; '.join(found)}. Give the same configuration, or another --workdir"
                )
        elif (workdir / "checkpoints").exists():
            raise UserError(
                f"{workdir}: has checkpoints but no {CONFIG_FILE}, so it is not a whole run; "
                "choose another --workdir"
            )
        if not write:
            return
        # Written beside and renamed: a kill never leaves half a file.
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(config, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"workdir {workdir}: cannot write there ({error.strerror})") from None


def _filled(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON tree with what it lacks taken from another."""
    found = {**defaults, **tree}
    for key, value in tree.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping):
            found[key] = _filled(value, defaults[key])
    return found


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """The configuration of the run in ``workdir``, a JSON tree.

    Raises:
      UserError: there is no run, or its configuration cannot be read.
    """
    path = pathlib.Path(workdir) / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir}: no run here ({CONFIG_FILE} is missing)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the configuration of a run")
    return with_orientation(config)


def with_orientation(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with how its images are turned, if it is from before one could say.

    Streamed images were not turned then. For sets in memory the setting has no meaning; for
    ImageNet its default is what was done.
    """
    stream, about = config.get("stream", {}), config.get("made_for")
    if not isinstance(stream, dict) or "orientation" in stream or not isinstance(about, dict):
        return config
    streamed = about.get("mean") == [float(x) for x in MEAN]
    auto = StreamSettings().for_dataset(str(config.get("dataset"))).orientation
    way = "ignore" if streamed and auto != "ignore" else "auto"
    return {**config, "stream": {**stream, "orientation": way}}
