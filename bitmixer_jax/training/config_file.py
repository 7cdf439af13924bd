"""Configuration files: Python files with ``get_config()``, and overrides of their settings."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from bitmixer_jax.deprecated import MODEL_SETTINGS, tell
from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.policy import closest
from bitmixer_jax.training.defaults import STAGE_DEFAULTS, model_defaults


def load_config(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a configuration file and applies overrides.

        config = load_config("experiments/configs/digits.py", ["--config.stages.mixed.epochs=3"])

    Args:
      path: a Python file with ``get_config()``; "file.py:variant" calls ``get_config("variant")``.
      overrides: words of a command line, such as "--config.seed=5". A setting of the model or of
        a stage may be one that the file leaves out.

    Raises:
      UserError: no such file, the file raises an error, or an override names no setting or has the
        wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    file = pathlib.Path(str(path).partition(":")[0])
    if not file.is_file():
        raise UserError(f"--config {path}: no such file", "no-such-file")
    overrides = [_with_new_name(word) for word in overrides]
    values = flags.FlagValues()  # not absl's global flags: several files can be read in a process
    # config_flags refuses an override of a setting that the configuration does not have.
    completed = _with_defaults(path, overrides) if overrides else None
    given_file = [f"--config={path}"] if completed is None else []
    words = ["bitmixer", *given_file, *overrides]
    given, sys.argv = sys.argv, words  # config_flags looks for the overrides there, and only there
    try:
        if completed is None:
            holder = config_flags.DEFINE_config_file("config", flag_values=values)
        else:
            holder = config_flags.DEFINE_config_dict("config", completed, flag_values=values)
        values(words)
        config = holder.value
    except flags.Error as error:
        raise UserError(f"--config {path}: {_reason(error)}", "bad-value") from None
    except Exception as error:  # whatever the file does when it runs
        if overrides:
            _check_overrides(path, overrides)
        kind = type(error).__name__
        raise UserError(f"--config {path}: {kind}: {_reason(error)}", "bad-value") from None
    finally:
        sys.argv = given
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config {path}: get_config() must return an ml_collections ConfigDict", "bad-value"
        )
    return config


def _with_defaults(path: str | pathlib.Path, overrides: Sequence[str]) -> ConfigDict | None:
    """Adds the defaults of overridden settings that the file leaves out, as overrides need them.

    A file need not name every setting of a model or of a stage.

    Returns:
      the configuration; None if nothing was added.
    """
    config = load_config(path)
    changed = False
    for word in overrides:
        keys = _keys(word)
        node: Any = config
        for key in keys[:-1]:
            node = node[key] if isinstance(node, ConfigDict) and key in node else None
        if not isinstance(node, ConfigDict) or keys[-1] in node:
            continue
        if keys[:-1] == ["model"]:
            known = model_defaults(config.model.get("name"))
        elif len(keys) == 3 and keys[0] == "stages":
            known = STAGE_DEFAULTS
        else:
            continue
        if keys[-1] in known:
            with node.unlocked():
                node[keys[-1]] = known[keys[-1]]
            changed = True
    return config if changed else None


def _check_overrides(path: str | pathlib.Path, overrides: Sequence[str]) -> None:
    """Raises UserError for the first override that names no setting."""
    config = load_config(path)
    for word in overrides:
        node: Any = config
        for key in _keys(word):
            known = list(node) if isinstance(node, ConfigDict) else []
            if key not in known:
                listed = f"; there are {', '.join(known)}" if known else "; it has no parts"
                hint = closest(key, known) or listed
                name = word.removeprefix("--").partition("=")[0]
                raise UserError(f"--config {path}: {name}: no such setting{hint}", "unknown-name")
            node = node[key]


def _with_new_name(override: str) -> str:
    """Returns an override with the present name of a setting of the model."""
    name, equals, value = override.partition("=")
    head, _, last = name.rpartition(".")
    if head.removeprefix("--") != "config.model" or last not in MODEL_SETTINGS:
        return override
    tell(name, f"{head}.{MODEL_SETTINGS[last]}")
    return f"{head}.{MODEL_SETTINGS[last]}{equals}{value}"


def _keys(override: str) -> list[str]:
    """Returns ["a", "b"] for "--config.a.b=value"."""
    return override.partition("=")[0].split(".")[1:]


def _reason(error: BaseException) -> str:
    return reason(error).strip('"')  # ml_collections raises KeyErrors, whose text is quoted
