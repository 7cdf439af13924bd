"""Training: stages, losses, the step, the loop, checkpoints."""

from bitmixer_jax.training.config import Run, default_config, float_config, load_config
from bitmixer_jax.training.loop import Interrupted, train
from bitmixer_jax.training.plan import load_trained
from bitmixer_jax.training.stages import Stage
from bitmixer_jax.training.step import TrainState

__all__ = [
    "Interrupted",
    "Run",
    "Stage",
    "TrainState",
    "default_config",
    "float_config",
    "load_config",
    "load_trained",
    "train",
]
