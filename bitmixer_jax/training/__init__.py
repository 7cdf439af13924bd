"""Training: stages, losses, the step, the loop, checkpoints."""

from bitmixer_jax import deprecated
from bitmixer_jax.training.config import Run, baseline_config, default_config, load_config
from bitmixer_jax.training.loop import Interrupted, train
from bitmixer_jax.training.schedule import load_trained
from bitmixer_jax.training.stages import Stage
from bitmixer_jax.training.step import TrainState

__all__ = [
    "Interrupted",
    "Run",
    "Stage",
    "TrainState",
    "baseline_config",
    "default_config",
    "load_config",
    "load_trained",
    "train",
]

__getattr__ = deprecated.module_getattr(__name__)
