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
from bitmixer_jax.models import Network
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
      before: ``[L]`` which layer's width precedes each layer's own; -1: none.
      visited: bool ``[L, n, n]`` whether training visited (width before, own width).
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
    before: tuple[int, ...]
    visited: np.ndarray
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    weights_digest: str
    reader: ImageReader

    def unvisited(self, policy: np.ndarray) -> list[tuple[str, int, int]]:
        """Pairs of a policy ``[L]`` that training never visited: (layer, width before, own).

        The width before is 0 where it has no say.
        """
        index = np.searchsorted(self.space.choices, policy)
        found = []
        for layer, name in enumerate(self.names):
            predecessor = index[self.before[layer]] if self.before[layer] >= 0 else 0
            if not self.visited[layer, predecessor, index[layer]]:
                width = int(policy[self.before[layer]]) if self.before[layer] >= 0 else 0
                found.append((name, width, int(policy[layer])))
        return found


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
    counts = [own["batch_stats"][name]["conv_norm"]["count"] for name in model.names]

    def forward(weights: Any, images: jax.Array, bits: Any) -> Any:
        # Real values (stem, head) as precisely as engines elsewhere compute them.
        with jax.default_matmul_precision("highest"):
            return model.apply(weights, images, bits=bits, train=False)

    return LoadedModel(
        forward=forward,
        weights=own,
        space=model.space,  # refuses a float twin
        names=model.names,
        before=tuple(layer.predecessor for layer in model.layers),
        visited=_visited(counts, model.space.n),
        image_shape=model.image_shape,
        classes=tuple(classes),
        mean=np.asarray(mean, np.float32),
        std=np.asarray(std, np.float32),
        weights_digest=digest(own),
        reader=reader or ImageReader(model.image_shape),
    )


def from_integer_model(network: IntegerModel) -> LoadedModel:
    """A network read from a packed file, run in integers."""
    counts = [layer.kernels[0].count for layer in network.layers]

    def forward(weights: Any, images: jax.Array, bits: Any) -> Any:
        return run_integer(network, images, bits)

    return LoadedModel(
        forward=forward,
        weights=(),  # constants of the programme
        space=network.space,
        names=network.names,
        before=tuple(layer.info.predecessor for layer in network.layers),
        visited=_visited(counts, network.space.n),
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


def _visited(counts: Sequence[Any], n: int) -> np.ndarray:
    """Counts ``[P, n]`` of each layer, P n or 1, as bool ``[L, n, n]``."""
    return np.stack([np.broadcast_to(np.asarray(count) > 0, (n, n)) for count in counts])


__getattr__ = deprecated.module_getattr(__name__)
