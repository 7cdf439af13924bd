"""Augmentation and normalisation of image batches, to run inside a compiled step."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


def normalize(images: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Returns `(images - mean) * (1 / std)` in float32.

    Args:
      images: `[B, H, W, C]` uint8.
      mean: `[C]`, the mean of each channel in units of 0..255 (`Dataset.mean`).
      std: `[C]`, the standard deviation of each channel in the same units (`Dataset.std`).

    Returns:
      `[B, H, W, C]` float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from bitmixer_jax.data import normalize
      >>> images = jnp.full((1, 1, 2, 1), 140, jnp.uint8)
      >>> normalize(images, mean=[120.0], std=[40.0]).tolist()
      [[[[0.5], [0.5]]]]
    """
    mean = jnp.asarray(mean, jnp.float32)
    std = jnp.asarray(std, jnp.float32)
    # All engines multiply by the reciprocal, as quantizers.py does, so all get the same numbers.
    return (images.astype(jnp.float32) - mean) * (1 / std)


def augment(
    key: jax.Array,
    images: jax.Array,
    *,
    pad: int,
    flip: bool,
    offset: int | jax.Array = 0,
    total: int | None = None,
) -> jax.Array:
    """Mirrors half of the images, and crops each at a random position after zero padding.

    With `i` the index of an example in the global batch, `offset .. offset + B - 1` here, its
    random numbers come from `fold_in(key, i)`. So every device gets the *same* key and its own
    offset, and the result does not depend on how many devices share the batch. The position of the
    crop does not depend on `flip`, nor the mirroring on `pad`.

    Args:
      key: random key, consumed here; the same on every device.
      images: `[B, H, W, C]`, any dtype, usually uint8.
      pad: number of zero pixels added on each of the four sides before the crop back to `[H, W]`;
        >= 0, and 0 means no crop.
      flip: whether to mirror left to right with probability one half.
      offset: index of the first of these examples in the global batch; may be traced.
      total: number of examples in the global batch, at least `offset + B`; None: `offset + B`. It
        does not change the result; a Python int as `offset` is checked against it.

    Returns:
      `[B, H, W, C]`, the dtype of `images`. With `pad=0` and `flip=False`, `images` itself: nothing
      is traced.

    Raises:
      ValueError: `pad` is negative, or the examples do not lie within the global batch.

    Example:
      >>> import functools, jax
      >>> from bitmixer_jax.data import augment
      >>> images = jax.numpy.ones((8, 4, 4, 1), jax.numpy.uint8)
      >>> crop = jax.jit(functools.partial(augment, pad=1, flip=False))
      >>> crop(jax.random.key(0), images).shape
      (8, 4, 4, 1)

      On each of `D` devices with `B` examples, under an axis "batch" of `jax.pmap`:

      >>> augment(key, images, pad=4, flip=True,
      ...         offset=jax.lax.axis_index("batch") * B, total=D * B)  # doctest: +SKIP
    """
    if pad < 0:
        raise ValueError(f"pad must be 0 or more, got {pad}")
    if not pad and not flip:
        return images
    batch, height, width, channels = images.shape
    if total is not None and total < batch:
        raise ValueError(f"total must be at least the batch's {batch} examples, got {total}")
    if isinstance(offset, int):
        last = offset if total is None else total - batch
        if not 0 <= offset <= last:
            allowed = "0 or more" if total is None else f"in 0..{last} (total - batch)"
            raise ValueError(f"offset must be {allowed}, got {offset}")
    # A key for each example, by its index in the global batch. Drawing numbers for all `total` and
    # slicing them at a traced offset would also do, but XLA then draws them anew for every pixel.
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(
        offset + jnp.arange(batch)
    )
    if flip:
        mirrored = jax.vmap(jax.random.bernoulli)(keys[:, 0])
        images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    if pad:
        corner = jax.vmap(lambda k: jax.random.randint(k, (2,), 0, 2 * pad + 1))(keys[:, 1])
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        # XLA turns this into one gather of whole windows. It is the fastest on a CPU of the nine
        # formulations that were measured (index gathers, one-hot products, selects, scans).
        images = jax.vmap(
            lambda image, yx: lax.dynamic_slice(image, (yx[0], yx[1], 0), (height, width, channels))
        )(padded, corner)
    return images
