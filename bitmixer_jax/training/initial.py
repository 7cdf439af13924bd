"""Makes the first state of a run, fresh or from another network, and loads its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from bitmixer_jax import trained
from bitmixer_jax.data import Dataset, StreamingDataset, normalize, require_classes
from bitmixer_jax.files import user_path
from bitmixer_jax.models import Network
from bitmixer_jax.training.schedule import TrainSchedule, init
from bitmixer_jax.training.stages import transfer_variables
from bitmixer_jax.training.step import TrainState
from bitmixer_jax.training.torchvision import load_torchvision
from bitmixer_jax.training.workdir import parse_source, read_config


def initial_state(schedule: TrainSchedule, train_data: Dataset | StreamingDataset) -> TrainState:
    """Returns the state of step 0: fresh, or with the weights of ``config.init_from``.

    Kernels are drawn from a key of ``config.seed``. Step sizes are set from the first batch.

    Raises:
      UserError: the weights are not there, or are of another network.
    """
    run, model = schedule.run, schedule.model
    images = train_data.subset(schedule.rows(0)).images
    batch = normalize(jnp.asarray(images), train_data.mean, train_data.std)
    key = jax.random.key(run.seed)
    # Compiled as one program: operation by operation, `init` is slow.
    variables = jax.jit(lambda key, images: init(model, key, images))(key, batch)
    if run.init_from:
        _, source = load_weights(run.init_from, model)
        variables = transfer_variables(source, variables)
        # A full-precision baseline has no step sizes. Those of the fresh network do not fit its
        # kernels and activations, so they are set again.
        if not (run.is_baseline or "step" in source["params"][model.names[0]]["conv"]):
            variables = _with_new_step_sizes(model, variables, key, batch)
    return schedule.state(variables["params"], variables["batch_stats"], 0, 0)


def _with_new_step_sizes(
    model: Network, variables: Mapping[str, Any], key: jax.Array, images: jax.Array
) -> dict[str, Any]:
    """Returns the variables with the step sizes that `init` would set for their kernels.

    Flax initialises what ``params`` lacks: so step sizes are left out and made anew in one forward
    pass. Its batch statistics are dropped. Consumes ``key``.
    """
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
    """Loads a network to start from or to learn from.

    Args:
      source: WORKDIR or WORKDIR@STAGE, as `trained.load` takes them, or a file with a torchvision
        state_dict (`load_torchvision`).
      model: the network that is trained; a state_dict is read as its full-precision baseline.

    Returns:
      the network, and its variables.

    Raises:
      UserError: there is nothing to load, or it is damaged.
    """
    path = user_path(source)
    if path.is_file():
        return model.baseline(), load_torchvision(path, model)
    found = trained.load(source)
    return found.model, found.variables


def check_teacher(source: str, classes: Sequence[str]) -> None:
    """Checks that a teacher knows the classes of the data, in their order. Raises UserError."""
    if user_path(source).is_file():  # a state_dict of torchvision names no classes
        return
    folder, _ = parse_source(source)
    info = read_config(folder).get("dataset_info")
    if isinstance(info, Mapping) and isinstance(info.get("classes"), list):
        require_classes(classes, info["classes"], f"config.teacher = {source}: the data")
