"""Loads a trained network from its workdir. Evaluation, search and export all start here."""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from bitmixer_jax import deprecated
from bitmixer_jax.data import Dataset, ImageReader, StreamingDataset
from bitmixer_jax.data.image_files import reader_of_run
from bitmixer_jax.errors import UserError
from bitmixer_jax.models import Network
from bitmixer_jax.training import config as configuration
from bitmixer_jax.training.checkpoints import Checkpoints, digest
from bitmixer_jax.training.config import Run
from bitmixer_jax.training.schedule import as_of, make_schedule
from bitmixer_jax.training.workdir import CONFIG_FILE, parse_source, read_config, read_dataset_info


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A trained network with its settings and its data. `load` and `training.train` make it.

    Attributes:
      source: what was loaded: WORKDIR or WORKDIR@STAGE.
      folder: the workdir.
      config: settings of the run as its ``config.json`` holds them, a JSON tree.
      run: the same settings, checked.
      model: the network. It quantises what its stage quantised: activations, or weights too.
      variables: of the network: "params" and "batch_stats".

    Examples:
      >>> import bitmixer_jax as bm
      >>> trained = bm.load("runs/digits")  # doctest: +SKIP
      >>> trained.model.names[0], trained.model.space.choices  # doctest: +SKIP
      ('stage1.block1.conv1', (2, 3, 4))
      >>> trained.load_split("test").image_shape  # doctest: +SKIP
      (8, 8, 1)
    """

    source: str
    folder: pathlib.Path
    config: Mapping[str, Any]
    run: Run
    model: Network
    variables: dict[str, Any]

    @property
    def dataset_info(self) -> Mapping[str, Any]:
        """The training data: "classes", "image_shape", "examples", "mean" and "std"."""
        assert self.run.dataset_info is not None  # `load` always sets it
        return self.run.dataset_info

    @property
    def is_baseline(self) -> bool:
        """True if this is a full-precision baseline, whose layers have no widths."""
        return self.model.quant.space is None

    @property
    def groups(self) -> tuple[int, ...]:
        """Group of each layer, ``[L]``: layers of a group share a width in random policies."""
        return self.model.groups(self.run.selection)  # type: ignore[arg-type]

    @functools.cached_property
    def weights_digest(self) -> str:
        """SHA-256 of the variables. Fronts and exports hold it, to name the weights they are of."""
        return digest(self.variables)

    @functools.cached_property
    def reader(self) -> ImageReader:
        """Reads image files as the images of the data set were read."""
        run, mean = self.run, self.dataset_info["mean"]
        return reader_of_run(run.dataset, self.model.image_shape, mean, run.stream)

    def load_split(self, split: str, data_dir: str | None = None) -> Dataset | StreamingDataset:
        """Opens a split of the data set, with the mean and deviation of the training images.

        Args:
          split: such as "train", "test" or "train[:1000]".
          data_dir: folder of the data, if they are no longer where training found them.

        Raises:
          UserError: there are no such data, or they have other classes or another image shape than
            the training data.
        """
        return self.run.load(split, data_dir)

    def require_widths(self, purpose: str) -> None:
        """Checks that the layers have widths: that this is no full-precision baseline.

        Args:
          purpose: a verb that says what the widths are needed for, for the message.

        Raises:
          UserError: this is a full-precision baseline.
        """
        if self.is_baseline:
            raise UserError(
                f"{self.source}: a full-precision baseline has no widths to {purpose}", "no-widths"
            )

    def __getattr__(self, name: str) -> Any:
        # Up to version 0.1 `training.train` returned what is now the attribute ``run``.
        if name in Run.__dataclass_fields__:
            deprecated.warn(f"Trained.{name}", f"Trained.run.{name}")
            return getattr(self.run, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def load(source: str | pathlib.Path | Trained) -> Trained:
    """Loads a trained network from a workdir.

    Args:
      source: WORKDIR (its newest checkpoint), or WORKDIR@STAGE (the end of that stage). A `Trained`
        is returned as it is.

    Returns:
      the network with its variables, settings and data.

    Raises:
      UserError: there is no run, no checkpoint or no such stage, or a file is damaged.

    Examples:
      >>> import jax.numpy as jnp
      >>> import bitmixer_jax as bm
      >>> trained = bm.load("runs/digits")  # doctest: +SKIP
      >>> images = jnp.zeros((2, *trained.model.image_shape))  # doctest: +SKIP
      >>> policy = jnp.array([4, 3, 2, 2, 3, 4])  # doctest: +SKIP
      >>> trained.model.apply(trained.variables, images, bits=policy).shape  # doctest: +SKIP
      (2, 10)
      >>> earlier = bm.load("runs/digits@weights")  # doctest: +SKIP
    """
    if isinstance(source, Trained):
        return source
    folder, stage_name = parse_source(source)
    config = read_config(folder)
    settings = dict(config)
    info = read_dataset_info(folder / CONFIG_FILE, settings.pop("dataset_info", None))
    try:
        run = dataclasses.replace(configuration.read(settings), dataset_info=info)
        model = run.build(len(info["classes"]), tuple(info["image_shape"]))
        schedule = make_schedule(run, model, info["examples"])
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE}: {error}", error.code) from None
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder / CONFIG_FILE}: damaged ({problem})", "damaged") from None
    step = None
    if stage_name:
        names = [stage.name for stage in run.stages]
        if stage_name not in names:
            raise UserError(
                f"{source}: no stage {stage_name!r}; its stages are {', '.join(names)}", "no-run"
            )
        step = schedule.stage_ends[names.index(stage_name)]
    checkpoints = Checkpoints(folder, keep_steps=schedule.stage_ends, read_only=True)
    state = checkpoints.restore(schedule.abstract_state(), step)
    checkpoints.close()
    if state is None:
        raise UserError(f"{folder}: no checkpoint yet; train the network first", "no-run")
    step = int(state.step)
    stage = run.stages[schedule.stage_of(step)]
    if not stage_name and step < schedule.stage_ends[-1]:
        logging.getLogger(__name__).warning(
            "%s: training has not ended: step %d of %d, stage %s",
            *(folder, step, schedule.stage_ends[-1], stage.name),
        )
    return Trained(
        source=str(source),
        folder=folder,
        config=config,
        run=run,
        model=as_of(model, stage),
        variables=state.variables,
    )
