"""A network ready to run, from memory, a workdir or a packed file, and its compiled program."""

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
    """A network that is ready to be compiled: a function, its weights, and what it was trained on.

    `from_trained` and `from_variables` make it of a network in floating point, and
    `integer_engine.from_integer_model` of a packed file.

    Attributes:
      forward: function of (weights, images, bits) that returns logits float32 ``[N, K]``. Its
        images are float32 ``[N, H, W, C]``, normalised. Its bits are a policy: a tuple of L
        ints, or an int32 ``[L]`` array, which may be traced.
      weights: pytree of arrays.
      space: the widths that each layer may take.
      names: ``[L]`` layer names.
      layers: the layer table, ``[L]``.
      counts: int32 ``[P, n]`` for each layer: how many training steps used each pair of widths.
      image_shape: ``(H, W, C)``.
      classes: ``[K]`` class names.
      mean: ``[C]`` mean of the training images, in units of 0..255.
      std: ``[C]`` standard deviation of the training images, in units of 0..255.
      weights_digest: SHA-256 of the trained weights, as in fronts and exports.
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
        """Finds the pairs of widths that a policy ``[L]`` uses and that are not calibrated.

        Returns:
          (layer name, width of the predecessor, own width) of each; see `pairs.uncalibrated_pairs`.
        """
        return find_uncalibrated(self.layers, self.counts, self.space.choices, policy[None])

    def require_calibrated(self, policy: np.ndarray) -> None:
        """Checks that training visited all pairs of widths that a policy ``[L]`` uses.

        Raises:
          UserError: it did not visit some, so their BN statistics are unknown.
        """
        missing = self.uncalibrated(policy)
        if missing:
            layer, predecessor, width = missing[0]
            raise UserError(
                f"policy {np.asarray(policy).tolist()}: {len(missing)} of its pairs of widths were "
                f"never visited in training, such as {predecessor or 'any'}->{width} bits at "
                f"{layer}: their BN statistics are unknown; take another policy, train for longer, "
                "or recalibrate them (evaluation.recalibrate_missing)",
                "uncalibrated",
            )


def from_trained(trained: Trained) -> LoadedModel:
    """Returns a trained network as a LoadedModel. Raises UserError for a full-precision baseline.

    The codes of weights and activations are whole numbers in floating point, as in training.
    """
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
    """Returns a network in memory as a LoadedModel.

    The codes of weights and activations are whole numbers in floating point, as in training.

    Args:
      model: a switchable network.
      variables: of the network: "params" and "batch_stats".
      mean: ``[C]`` mean of the training images, in units of 0..255.
      std: ``[C]`` standard deviation of the training images, in units of 0..255.
      classes: ``[K]`` class names.
      reader: reads image files; None: an `ImageReader` for the image shape of the network.
      weights_digest: SHA-256 of the variables; None: it is computed.

    Raises:
      UserError: the network is a full-precision baseline.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=2, image_shape=(8, 8, 1), width=4)
      >>> images, policy = jnp.zeros((1, 8, 8, 1)), np.full(6, 4)
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), images, policy)
      >>> zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
      >>> loaded = from_variables(model, zeros, mean=[128], std=[64], classes=("cat", "dog"))
      >>> loaded.uncalibrated(policy)[:2]  # no training step used a pair of widths
      [('stage1.block1.conv1', 0, 4), ('stage1.block1.conv2', 4, 4)]
    """
    weights = {name: variables[name] for name in ("params", "batch_stats")}
    space = model.space  # raises UserError for a full-precision baseline
    stats = weights["batch_stats"]
    counts = [np.asarray(stats[name]["conv_norm"]["count"]) for name in model.names]

    def forward(weights: Any, images: jax.Array, bits: Any) -> Any:
        # Accelerators would compute products of real values (stem, head) with fewer bits than
        # the engines that run exports.
        with jax.default_matmul_precision("highest"):
            return model.apply(weights, images, bits=bits, train=False)

    return LoadedModel(
        forward=forward,
        weights=weights,
        space=space,
        names=model.names,
        layers=model.layers,
        counts=counts,
        image_shape=model.image_shape,
        classes=tuple(classes),
        mean=np.asarray(mean, np.float32),
        std=np.asarray(std, np.float32),
        weights_digest=weights_digest or digest(weights),
        reader=reader or ImageReader(model.image_shape),
    )


def check_images(images: Any, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Returns images as an array uint8 ``[N, H, W, C]``, with N at least 1.

    Args:
      images: an array of numpy, JAX or PyTorch, or nested lists.
      image_shape: ``(H, W, C)`` that the network takes.

    Raises:
      UserError: the images have another type or shape.
    """
    wanted = f"give uint8 (N, {', '.join(map(str, image_shape))}), N at least 1"
    try:
        array = np.asarray(images)
    except (ValueError, RuntimeError, TypeError) as error:  # such as tensors on another device
        raise UserError(
            f"images: numpy cannot read them ({reason(error)}); {wanted}", "bad-shape"
        ) from None
    if array.dtype != np.uint8 or array.shape[1:] != tuple(image_shape) or not len(array):
        raise UserError(f"images: got {array.dtype} {array.shape}; {wanted}", "bad-shape")
    return array


class Predictor:
    """A network on the first device, compiled once for one batch size.

    The policy is an input of the program, so one program serves all policies. With ``static`` the
    compiler knows the widths and drops the look-ups in tables; the program then serves one policy.

    Attributes:
      loaded: the network.
      batch_size: images in one call of the program. More images run in parts; the last is padded.
      weights: of the network, on the device.

    Examples:
      >>> predictor = Predictor(from_trained(bm.load("runs/digits")))  # doctest: +SKIP
      >>> images = np.zeros((20, 8, 8, 1), np.uint8)  # doctest: +SKIP
      >>> predictor(images, [4, 3, 2, 2, 3, 4]).shape  # doctest: +SKIP
      (20, 10)
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
        """Places the weights on the device and compiles the program.

        Args:
          loaded: the network.
          batch_size: images in one call of the program.
          static: ``[L]`` widths of the one policy that the program is for; None: all policies.
          weights: of the network, if they are on the device already.
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
        # Compiled here, before the first call. A call of `jit` would compile again for another
        # shape or type; this program raises an error instead.
        self._run = jax.jit(forward).lower(weights, *shapes).compile()

    def check(self, policy: Any) -> np.ndarray:
        """Returns a policy as int32 ``[L]``.

        Args:
          policy: ``[L]`` widths, or one width for all layers.

        Raises:
          UserError: the policy does not fit the network, or uses a pair of widths that training
            never visited.
        """
        policy = check_policy(policy, self.loaded.space, len(self.loaded.names))
        self.loaded.require_calibrated(policy)
        return policy

    def __call__(self, images: Any, policy: Any) -> np.ndarray:
        """Returns the logits of images at a policy.

        Args:
          images: uint8 ``[N, H, W, C]``.
          policy: ``[L]`` widths, or one width for all layers.

        Returns:
          float32 ``[N, K]``.

        Raises:
          UserError: the images or the policy do not fit, or the logits are not finite.
        """
        return self.run(check_images(images, self.loaded.image_shape), self.check(policy))

    def run(self, images: np.ndarray, policy: np.ndarray) -> np.ndarray:
        """Returns the logits of images uint8 at a policy int32 ``[L]``, both checked before."""
        size, bits = self.batch_size, () if self._static is not None else (policy,)
        logits = np.empty((len(images), len(self.loaded.classes)), np.float32)
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            count = len(batch)
            if count < size:
                padding = np.zeros((size - count, *batch.shape[1:]), np.uint8)
                batch = np.concatenate([batch, padding])
            batch_logits = np.asarray(self._run(self.weights, batch, *bits))
            logits[start : start + count] = batch_logits[:count]
        if not np.isfinite(logits).all():
            raise UserError(
                f"policy {policy.tolist()}: the logits are not finite; this network is broken",
                "not-finite",
            )
        return logits


__getattr__ = deprecated.module_getattr(__name__)
