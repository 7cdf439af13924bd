"""The schedule of a run: which stage, optimiser and examples each of its steps has."""

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
    """A run, divided into steps. Stages are given by their index.

    Attributes:
      run: the configuration.
      model: the network with everything quantised, or the full-precision baseline.
      examples: number of training images.
      steps_per_epoch: number of whole batches in them. The images beyond are left out; they are
        others in each epoch.
      stage_ends: for each stage the number of steps, since the run began, at which it ends.
    """

    run: Run
    model: Network
    examples: int
    steps_per_epoch: int
    stage_ends: tuple[int, ...]

    def start(self, stage: int) -> int:
        """Returns the number of steps at which a stage begins."""
        return self.stage_ends[stage - 1] if stage else 0

    def stage_of(self, step: int) -> int:
        """Returns the stage that made the state of ``step`` steps."""
        later = (i for i, end in enumerate(self.stage_ends) if step <= end)
        return next(later, len(self.stage_ends) - 1)

    def optimizer(self, stage: int) -> Any:
        """Returns the optimiser of a stage."""
        steps = self.stage_ends[stage] - self.start(stage)
        return make_optimizer(self.run.optimizer, self.run.stages[stage], steps)

    def rows(self, step: int) -> np.ndarray:
        """Returns which examples a step trains on: int32 ``[B]``.

        The order is a function of (seed, epoch), so a resumed run sees the same batches.
        """
        return self.order.rows(step)

    @property
    def order(self) -> Order:
        """Returns the order of the training images."""
        return Order(self.run.seed, self.examples, self.run.batch_size)

    def state(self, params: Any, batch_stats: Any, stage: int, step: int) -> TrainState:
        """Returns a state with fresh optimiser state; the moving average starts from ``params``."""
        # A copy: the step donates its state, and one buffer cannot be donated twice.
        ema = jax.tree.map(jnp.array, params) if self.run.optimizer.ema else None
        opt_state = self.optimizer(stage).init(params)
        return TrainState(jnp.int32(step), params, batch_stats, opt_state, ema)

    def abstract_state(self) -> TrainState:
        """Returns the shapes and dtypes of a state. They are the same in all stages."""

        # Only traced, so that it costs no memory: shapes follow from the network alone.
        def build() -> TrainState:
            images = jnp.zeros((1, *self.model.image_shape))
            variables = init(self.model, jax.random.key(0), images)
            return self.state(variables["params"], variables["batch_stats"], 0, 0)

        return jax.eval_shape(build)


def init(model: Network, key: jax.Array, images: jax.Array) -> dict[str, Any]:
    """Returns fresh variables of a network. Consumes ``key``.

    Args:
      model: the network.
      key: of `jax.random.key`.
      images: normalised, float32 ``[N, H, W, C]``; step sizes are set from them.
    """
    # Step sizes of all widths are set from inputs that the layers before gave at the widest width,
    # where they are nearest to real values.
    bits = None
    if model.quant.space is not None:
        bits = (model.space.widest,) * model.num_layers
    return dict(model.init(key, images, bits=bits, train=False))


def make_schedule(run: Run, model: Network, examples: int) -> TrainSchedule:
    """Divides a run into steps.

    Args:
      run: the configuration.
      model: its network.
      examples: number of training images.

    Raises:
      UserError: there is not one whole batch in the data, or there are too many steps.

        >>> from bitmixer_jax.training.config import default_config, read
        >>> run = read(default_config())
        >>> schedule = make_schedule(run, run.build(10, (8, 8, 1)), examples=1437)
        >>> schedule.steps_per_epoch, schedule.stage_ends
        (11, (55, 165, 330))
    """
    if run.batch_size > examples:
        raise UserError(f"config.batch_size = {run.batch_size}: more than the {examples} images")
    per_epoch = examples // run.batch_size
    # A small fraction of an epoch is still one step: no stage of a configuration is skipped.
    lengths = [max(1, round(stage.epochs * per_epoch)) for stage in run.stages]
    if sum(lengths) >= 2**31:  # steps are int32 on devices
        raise UserError(
            f"config.stages: {sum(lengths):.3g} steps in all; a run has at most 2^31 - 1; lower "
            "the epochs"
        )
    return TrainSchedule(
        run, model, examples, per_epoch, tuple(int(end) for end in np.cumsum(lengths))
    )


def as_of(model: Network, stage: Stage) -> Network:
    """Returns the network with what that stage quantises."""
    return model.clone(quant=stage.quant_config(model.quant))
