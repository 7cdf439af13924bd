"""A run laid out in steps: which stage, optimiser and examples each step has."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax.data import Order
from bitmixer_jax.errors import UserError
from bitmixer_jax.models import Network
from bitmixer_jax.training.config import Run
from bitmixer_jax.training.optimizer import make_optimizer
from bitmixer_jax.training.stages import Stage
from bitmixer_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class TrainSchedule:
    """A run laid out in steps.

    Attributes:
      run: the configuration.
      model: the network, as after the last stage.
      examples: number of training images.
      steps_per_epoch: whole batches in them; each epoch leaves out another remainder.
      stage_ends: step at which each stage ends.
    """

    run: Run
    model: Network
    examples: int
    steps_per_epoch: int
    stage_ends: tuple[int, ...]

    def start(self, stage: int) -> int:
        """First step of a stage."""
        return self.stage_ends[stage - 1] if stage else 0

    def stage_of(self, step: int) -> int:
        """The stage in which a state of ``step`` steps was made."""
        later = (i for i, end in enumerate(self.stage_ends) if step <= end)
        return next(later, len(self.stage_ends) - 1)

    def optimizer(self, stage: int) -> Any:
        """The optimiser of a stage."""
        steps = self.stage_ends[stage] - self.start(stage)
        return make_optimizer(self.run.optimizer, self.run.stages[stage], steps)

    def rows(self, step: int) -> np.ndarray:
        """Which examples step ``step`` takes: int32 ``[B]``, a function of (seed, epoch) alone."""
        return self.order.rows(step)

    @property
    def order(self) -> Order:
        """The order of the training images."""
        return Order(self.run.seed, self.examples, self.run.batch_size)

    def state(self, params: Any, batch_stats: Any, stage: int, step: int) -> TrainState:
        """A state with fresh optimiser state."""
        ema = jax.tree.map(jnp.array, params) if self.run.optimizer.ema else None
        opt_state = self.optimizer(stage).init(params)
        return TrainState(jnp.int32(step), params, batch_stats, opt_state, ema)

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state, the same in all stages."""

        def build() -> TrainState:
            images = jnp.zeros((1, *self.model.image_shape))
            variables = init(self.model, jax.random.key(0), images)
            return self.state(variables["params"], variables["batch_stats"], 0, 0)

        return jax.eval_shape(build)


def init(model: Network, key: jax.Array, images: jax.Array) -> dict[str, Any]:
    """Variables of a network; step sizes are set from ``images`` float32 ``[N, H, W, C]``.

    Consumes ``key``.
    """
    bits = None
    if model.quant.space is not None:
        bits = (model.space.widest,) * model.num_layers
    return dict(model.init(key, images, bits=bits, train=False))


def make_schedule(run: Run, model: Network, examples: int) -> TrainSchedule:
    """Lays out a run for a training set of ``examples`` images.

    Raises:
      UserError: there is not one whole batch in the data.
    """
    if run.batch_size > examples:
        raise UserError(f"config.batch_size = {run.batch_size}: more than the {examples} images")
    per_epoch = examples // run.batch_size
    lengths = [max(1, round(stage.epochs * per_epoch)) for stage in run.stages]
    if sum(lengths) >= 2**31:
        raise UserError(
            f"config.stages: {sum(lengths):.3g} steps in all; a run has at most 2^31 - 1; lower "
            "the epochs"
        )
    return TrainSchedule(
        run, model, examples, per_epoch, tuple(int(end) for end in np.cumsum(lengths))
    )


def as_of(model: Network, stage: Stage) -> Network:
    """The network with what that stage quantises."""
    return model.clone(quant=stage.quant_config(model.quant))
