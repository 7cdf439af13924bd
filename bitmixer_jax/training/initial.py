"""What a run starts from: fresh variables, or those of another network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from bitmixer_jax import trained
from bitmixer_jax.data import Dataset, StreamingDataset, normalize
from bitmixer_jax.files import user_path
from bitmixer_jax.models import Network
from bitmixer_jax.training.schedule import TrainSchedule, init
from bitmixer_jax.training.stages import transfer_variables
from bitmixer_jax.training.step import TrainState
from bitmixer_jax.training.torchvision import load_torchvision


def initial_state(schedule: TrainSchedule, train: Dataset | StreamingDataset) -> TrainState:
    """The state a run starts with: fresh, or from other weights (``config.init_from``)."""
    run, model = schedule.run, schedule.model
    images = train.subset(schedule.rows(0)).images
    batch = normalize(jnp.asarray(images), train.mean, train.std)
    key = jax.random.key(run.seed)
    make = jax.jit(lambda key, images: init(model, key, images))
    variables = make(key, batch)
    if run.init_from:
        _, source = load_weights(run.init_from, model)
        started = transfer_variables(source, variables)
        if run.is_baseline or "step" in source["params"][model.names[0]]["conv"]:
            variables = started
        else:  # from a float twin: step sizes from its own activations and kernels
            variables = _with_new_step_sizes(model, started, key, batch)
    return schedule.state(variables["params"], variables["batch_stats"], 0, 0)


def _with_new_step_sizes(
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
      source: of `trained.load`, or a file with a torchvision state_dict: then it is the float twin
        of ``model`` (`torchvision.load_torchvision`).
    """
    path = user_path(source)
    if path.is_file():
        return model.baseline(), load_torchvision(path, model)
    found = trained.load(source)
    return found.model, found.variables
