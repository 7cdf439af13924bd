"""A run laid out in steps: what is trained when, from which state, and how it is loaded again."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bitmixer_jax.data import Dataset, Order, StreamingDataset, normalize
from bitmixer_jax.errors import UserError
from bitmixer_jax.files import user_path
from bitmixer_jax.models import Network
from bitmixer_jax.training import config as configuration
from bitmixer_jax.training.checkpoints import Checkpoints
from bitmixer_jax.training.claims import CONFIG_FILE, parse_source, read_config, read_data_info
from bitmixer_jax.training.config import Run
from bitmixer_jax.training.optimizer import make_optimizer
from bitmixer_jax.training.stages import Stage, start_from
from bitmixer_jax.training.step import TrainState
from bitmixer_jax.training.torchvision import load_torchvision


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run laid out in steps.

    Attributes:
      run: the configuration.
      model: the network, as after the last stage.
      examples: number of training images.
      steps_per_epoch: whole batches in them; each epoch leaves out another remainder.
      ends: step at which each stage ends.
    """

    run: Run
    model: Network
    examples: int
    steps_per_epoch: int
    ends: tuple[int, ...]

    def start(self, stage: int) -> int:
        """First step of a stage."""
        return self.ends[stage - 1] if stage else 0

    def optimizer(self, stage: int) -> Any:
        """The optimiser of a stage."""
        steps = self.ends[stage] - self.start(stage)
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


def make_plan(run: Run, model: Network, examples: int) -> Plan:
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
    return Plan(run, model, examples, per_epoch, tuple(int(end) for end in np.cumsum(lengths)))


def initial_state(plan: Plan, train: Dataset | StreamingDataset) -> TrainState:
    """The state a run starts with: fresh, or from other weights (``config.init_from``)."""
    run, model = plan.run, plan.model
    images = train.subset(plan.rows(0)).images
    batch = normalize(jnp.asarray(images), train.mean, train.std)
    key = jax.random.key(run.seed)
    make = jax.jit(lambda key, images: init(model, key, images))
    variables = make(key, batch)
    if run.init_from:
        _, source = load_weights(run.init_from, model)
        started = start_from(source, variables)
        if run.is_float or "step" in source["params"][model.names[0]]["conv"]:
            variables = started
        else:  # from a float twin: step sizes from its own activations and kernels
            variables = _with_new_steps(model, started, key, batch)
    return plan.state(variables["params"], variables["batch_stats"], 0, 0)


def _with_new_steps(
    model: Network, variables: Mapping[str, Any], key: jax.Array, images: jax.Array
) -> dict[str, Any]:
    """The variables with the step sizes that `init` would set for these kernels and images."""
    leaves = traverse_util.flatten_dict(variables["params"])
    kept = {path: leaf for path, leaf in leaves.items() if path[-1] != "step"}
    _, made = model.apply(
        {
            "params": traverse_util.unflatten_dict(kept),
            "batch_stats": variables["batch_stats"],
        },
        images,
        bits=(model.space.widest,) * model.num_layers,
        train=True,
        rngs={"params": key},
        mutable=["params", "batch_stats"],
    )
    return {"params": made["params"], "batch_stats": variables["batch_stats"]}


def load_weights(source: str, model: Network) -> tuple[Network, dict[str, Any]]:
    """A network and its variables, to start or to learn from.

    Args:
      source: of `load_trained`, or a file with a torchvision state_dict: then it is the float twin
        of ``model`` (`torchvision.load_torchvision`).
    """
    path = user_path(source)
    if path.is_file():
        return model.float_twin(), load_torchvision(path, model)
    return load_trained(source)[1:]


def load_trained(source: str | pathlib.Path) -> tuple[Run, Network, dict[str, Any]]:
    """Loads a network from a workdir: its run, the network as of that stage, its variables.

    Args:
      source: WORKDIR (its newest checkpoint), or WORKDIR@STAGE (the end of that stage).

    Raises:
      UserError: no run there, no checkpoint yet, no such stage, or a damaged checkpoint.
    """
    folder, name = parse_source(source)
    saved = read_config(folder)
    about = read_data_info(folder / CONFIG_FILE, saved.pop("made_for", None))
    try:
        run = dataclasses.replace(configuration.read(saved), data_info=about)
        model = run.build(len(about["classes"]), tuple(about["image_shape"]))
        plan = make_plan(run, model, about["examples"])
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE}: {error}") from None
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        kind = type(error).__name__
        raise UserError(f"{folder / CONFIG_FILE}: damaged ({kind}: {error})") from None
    checkpoints = Checkpoints(folder, keep_steps=plan.ends, read_only=True)
    step = None
    if name:
        names = [stage.name for stage in run.stages]
        if name not in names:
            raise UserError(f"{source}: no stage {name!r}; its stages are {', '.join(names)}")
        step = plan.ends[names.index(name)]
    state = checkpoints.restore(plan.abstract_state(), step)
    checkpoints.close()
    if state is None:
        raise UserError(f"{folder}: no checkpoint yet; train it first")
    stage = run.stages[_stage_of(plan, int(state.step))]
    if not name and int(state.step) < plan.ends[-1]:
        logging.getLogger(__name__).warning(
            "%s: not trained to its end: step %d of %d, stage %s",
            *(folder, int(state.step), plan.ends[-1], stage.name),
        )
    return run, as_of(plan.model, stage), state.variables


def _stage_of(plan: Plan, step: int) -> int:
    """The stage in which a state of ``step`` steps was made."""
    return next((i for i, end in enumerate(plan.ends) if step <= end), len(plan.ends) - 1)


def as_of(model: Network, stage: Stage) -> Network:
    """The network with what that stage quantises."""
    return model.clone(quant=stage.quantization(model.quant))
