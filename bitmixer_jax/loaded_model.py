"""A network ready to run, wherever it comes from, and its compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bitmixer_jax import deprecated
from bitmixer_jax.data import ImageReader, normalize
from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.layer_table import LayerInfo
from bitmixer_jax.models import Network
from bitmixer_jax.pairs import find_uncalibrated
from bitmixer_jax.policy import BitSpace, check_policy
from bitmixer_jax.trained import Trained
from bitmixer_jax.training.checkpoints import digest


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

    def require_calibrated(self, policy: np.ndarray) -> None:
        """Checks that training visited all pairs of widths of a policy ``[L]``.

        Raises:
          UserError: it did not, so BN statistics are unknown.
        """
        missing = self.uncalibrated(policy)
        if missing:
            layer, predecessor, own = missing[0]
            raise UserError(
                f"policy {np.asarray(policy).tolist()}: {len(missing)} of its pairs of widths were "
                f"never visited in training, such as {predecessor or 'any'}->{own} bits at "
                f"{layer}: their BN statistics are unknown; take another policy, train for longer, "
                "or recalibrate (pairs.recalibrate)",
                "uncalibrated",
            )


def from_trained(trained: Trained) -> LoadedModel:
    """A trained network, simulated. Raises UserError for a full-precision baseline."""
    trained.require_widths("switch")
    info = trained.dataset_info
    return from_variables(
        trained.model,
        trained.variables,
        mean=info["mean"],
        std=info["std"],
        classes=info["classes"],
        reader=trained.reader,
        weights_digest=trained.weights_digest,
    )


def from_variables(
    model: Network,
    variables: Any,
    *,
    mean: Any,
    std: Any,
    classes: Sequence[str],
    reader: ImageReader | None = None,
    weights_digest: str | None = None,
) -> LoadedModel:
    """A network in memory, simulated: codes are whole numbers in floating point.

    Args:
      variables: "params" and "batch_stats".
      mean, std, classes: of the training data.
      reader: see `LoadedModel`; None: files are read as sets in memory are.
      weights_digest: see `LoadedModel`; None: it is computed.

    Raises:
      UserError: a full-precision baseline.
    """
    own = {name: variables[name] for name in ("params", "batch_stats")}
    space = model.space  # refuses a baseline
    counts = [np.asarray(own["batch_stats"][name]["conv_norm"]["count"]) for name in model.names]

    def forward(weights: Any, images: jax.Array, bits: Any) -> Any:
        # Real values (stem, head) as precisely as engines elsewhere compute them.
        with jax.default_matmul_precision("highest"):
            return model.apply(weights, images, bits=bits, train=False)

    return LoadedModel(
        forward=forward,
        weights=own,
        space=space,
        names=model.names,
        layers=model.layers,
        counts=counts,
        image_shape=model.image_shape,
        classes=tuple(classes),
        mean=np.asarray(mean, np.float32),
        std=np.asarray(std, np.float32),
        weights_digest=weights_digest or digest(own),
        reader=reader or ImageReader(model.image_shape),
    )


def check_images(images: Any, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Returns images as uint8 ``[N, H, W, C]``, N at least 1.

    Raises:
      UserError: they are of another type or shape.
    """
    wanted = f"give uint8 (N, {', '.join(map(str, image_shape))}), N at least 1"
    try:
        given = np.asarray(images)
    except (ValueError, RuntimeError, TypeError) as error:  # such as tensors on another device
        raise UserError(
            f"images: numpy cannot read them ({reason(error)}); {wanted}", "bad-shape"
        ) from None
    if given.dtype != np.uint8 or given.shape[1:] != tuple(image_shape) or not len(given):
        raise UserError(f"images: got {given.dtype} {given.shape}; {wanted}", "bad-shape")
    return given


class Predictor:
    """A network on the first device, compiled for one batch size.

    The policy is data: one program serves all of them. With ``static`` the compiler knows the
    widths, so look-ups in tables are gone, and no policy is given in a call.

    Attributes:
      loaded: the network.
      batch_size: images in one call of the program; larger inputs run in parts, the last padded.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batch_size: int = 64,
        *,
        static: tuple[int, ...] | None = None,
        weights: Any = None,
        on_trace: Callable[[], None] = lambda: None,
    ) -> None:
        """Places the weights and compiles.

        Args:
          static: ``[L]`` widths that the program is for.
          weights: those of the network, if they are on the device already.
          on_trace: called when JAX traces the program.
        """
        self.loaded, self.batch_size, self._static = loaded, batch_size, static
        if weights is None:
            weights = jax.device_put(loaded.weights, jax.local_devices()[0])
        self.weights = weights

        def forward(weights: Any, images: jax.Array, *policy: jax.Array) -> Any:
            on_trace()
            x = normalize(images, loaded.mean, loaded.std)
            return loaded.forward(weights, x, policy[0] if static is None else static)

        shapes = [jax.ShapeDtypeStruct((batch_size, *loaded.image_shape), np.uint8)]
        if static is None:
            shapes.append(jax.ShapeDtypeStruct((len(loaded.names),), np.int32))
        # Compiled before its first call, so it refuses what would make `jit` compile again.
        self._run = jax.jit(forward).lower(weights, *shapes).compile()

    def check(self, policy: Any) -> np.ndarray:
        """Returns a policy as int32 ``[L]``.

        Args:
          policy: ``[L]`` widths, or one width for all layers.

        Raises:
          UserError: it does not fit the network, or needs a pair of widths that training never
            visited.
        """
        policy = check_policy(policy, self.loaded.space, len(self.loaded.names))
        self.loaded.require_calibrated(policy)
        return policy

    def __call__(self, images: Any, policy: Any) -> np.ndarray:
        """Logits float32 ``[N, K]`` of images uint8 ``[N, H, W, C]`` at a policy as `check`.

        Raises:
          UserError: images or policy do not fit, or the logits are not finite.
        """
        return self.run(check_images(images, self.loaded.image_shape), self.check(policy))

    def run(self, images: np.ndarray, policy: np.ndarray) -> np.ndarray:
        """As a call, of images and an int32 policy that were checked."""
        size, widths = self.batch_size, () if self._static is not None else (policy,)
        logits = np.empty((len(images), len(self.loaded.classes)), np.float32)
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            count = len(batch)
            if count < size:
                padding = np.zeros((size - count, *batch.shape[1:]), np.uint8)
                batch = np.concatenate([batch, padding])
            logits[start : start + count] = np.asarray(self._run(self.weights, batch, *widths))[
                :count
            ]
        if not np.isfinite(logits).all():
            raise UserError(
                f"policy {policy.tolist()}: the logits are not finite; this network is broken",
                "not-finite",
            )
        return logits


__getattr__ = deprecated.module_getattr(__name__)
