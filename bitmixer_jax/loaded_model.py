"""What a `Runtime` needs of a network, wherever the network comes from."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bitmixer_jax import deprecated
from bitmixer_jax.data import ImageReader
from bitmixer_jax.data.image_files import reader_of_run
from bitmixer_jax.errors import UserError
from bitmixer_jax.export.integer_engine import run_integer
from bitmixer_jax.export.integer_model import IntegerModel
from bitmixer_jax.export.packed import load_packed
from bitmixer_jax.files import user_path
from bitmixer_jax.layer_table import LayerInfo
from bitmixer_jax.models import Network
from bitmixer_jax.pairs import find_uncalibrated
from bitmixer_jax.policy import BitSpace
from bitmixer_jax.training import load_trained
from bitmixer_jax.training.checkpoints import digest
from bitmixer_jax.training.workdir import parse_source


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A network ready to be compiled.

    Attributes:
      forward: function of (weights, images, bits): logits float32 ``[N, K]`` of images float32
        ``[N, H, W, C]``, normalised, at a policy that is a tuple of ints or a traced int32 ``[L]``.
      weights: pytree of arrays.
      space: the choices.
      names: ``[L]`` layer names.
      layers: the layer table.
      counts: int32 ``[P, n]`` of each layer, training steps that used each pair of widths.
      image_shape: ``(H, W, C)``.
      classes: ``[K]`` names.
      mean, std: ``[C]`` in units of 0..255.
      weights_digest: of the trained weights, which fronts and exports carry.
      reader: reads image files as evaluation did.
    """

    forward: Callable[[Any, jax.Array, Any], Any]
    weights: Any
    space: BitSpace
    names: tuple[str, ...]
    layers: tuple[LayerInfo, ...]
    counts: Sequence[Any]
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    weights_digest: str
    reader: ImageReader

    def uncalibrated(self, policy: np.ndarray) -> list[tuple[str, int, int]]:
        """Finds the pairs of a policy ``[L]`` without statistics, as `pairs.uncalibrated_pairs`."""
        return find_uncalibrated(self.layers, self.counts, self.space.choices, policy[None])


def from_variables(
    model: Network,
    variables: Any,
    *,
    mean: Any,
    std: Any,
    classes: Sequence[str],
    reader: ImageReader | None = None,
) -> LoadedModel:
    """A trained network, simulated: codes are whole numbers in floating point.

    Args:
      variables: "params" and "batch_stats".
      mean, std, classes: of the training data.
      reader: see `LoadedModel`; None: files are read as sets in memory are.

    Raises:
      UserError: a float twin.
    """
    own = {name: variables[name] for name in ("params", "batch_stats")}
    counts = [np.asarray(own["batch_stats"][name]["conv_norm"]["count"]) for name in model.names]

    def forward(weights: Any, images: jax.Array, bits: Any) -> Any:
        # Real values (stem, head) as precisely as engines elsewhere compute them.
        with jax.default_matmul_precision("highest"):
            return model.apply(weights, images, bits=bits, train=False)

    return LoadedModel(
        forward=forward,
        weights=own,
        space=model.space,  # refuses a float twin
        names=model.names,
        layers=model.layers,
        counts=counts,
        image_shape=model.image_shape,
        classes=tuple(classes),
        mean=np.asarray(mean, np.float32),
        std=np.asarray(std, np.float32),
        weights_digest=digest(own),
        reader=reader or ImageReader(model.image_shape),
    )


def from_integer_model(network: IntegerModel) -> LoadedModel:
    """A network read from a packed file, run in integers."""

    def forward(weights: Any, images: jax.Array, bits: Any) -> Any:
        return run_integer(network, images, bits)

    return LoadedModel(
        forward=forward,
        weights=(),  # constants of the programme
        space=network.space,
        names=network.names,
        layers=tuple(layer.info for layer in network.layers),
        counts=network.counts,
        image_shape=network.image_shape,
        classes=network.classes,
        mean=network.mean,
        std=network.std,
        weights_digest=network.weights_digest,
        reader=ImageReader.from_json(
            network.about.get("images"), network.image_shape, "packed file"
        ),
    )


def load(source: str | pathlib.Path) -> LoadedModel:
    """Loads a workdir (WORKDIR or WORKDIR@STAGE) or a packed file.

    Raises:
      UserError: neither is there, or it is damaged, or a float twin.
    """
    source = user_path(source)
    try:
        if source.exists() and not source.is_dir():
            return from_integer_model(load_packed(source))
        folder, _ = parse_source(source)
        there = folder.exists()
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None
    if not there:
        raise UserError(f"{source}: no such workdir or packed file")
    run, model, variables = load_trained(source)
    about = run.dataset_info
    assert about is not None  # `load_trained` sets it
    return from_variables(
        model,
        variables,
        mean=about["mean"],
        std=about["std"],
        classes=about["classes"],
        reader=reader_of_run(run.dataset, model.image_shape, about["mean"], run.stream),
    )


__getattr__ = deprecated.module_getattr(__name__)
