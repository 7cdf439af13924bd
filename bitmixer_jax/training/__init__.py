"""Training: settings, stages, losses, the step, the loop, checkpoints.

The names below load on first use, because `trained` imports some of these modules and the loop
imports `trained`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitmixer_jax import deprecated

if TYPE_CHECKING:
    from bitmixer_jax.training.config import Run
    from bitmixer_jax.training.config_file import load_config
    from bitmixer_jax.training.defaults import baseline_config, default_config
    from bitmixer_jax.training.loop import Interrupted, train
    from bitmixer_jax.training.stages import Stage
    from bitmixer_jax.training.step import TrainState

_HOME = {
    "Interrupted": "loop",
    "Run": "config",
    "Stage": "stages",
    "TrainState": "step",
    "baseline_config": "defaults",
    "default_config": "defaults",
    "load_config": "config_file",
    "train": "loop",
}
__all__ = [
    "Interrupted",
    "Run",
    "Stage",
    "TrainState",
    "baseline_config",
    "default_config",
    "load_config",
    "train",
]
_deprecated = deprecated.module_getattr(__name__)


def load_trained(source: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Deprecated: `bitmixer_jax.trained.load` returns what this returns, by name."""
    from bitmixer_jax import trained

    deprecated.warn("training.load_trained", "bitmixer_jax.load")
    found = trained.load(source)
    return found.run, found.model, found.variables


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return _deprecated(name)
