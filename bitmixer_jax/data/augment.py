"""Augmentation and normalisation of image batches, made to run inside a compiled step."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


def normalize(images: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Returns `(images - mean) * (1 / std)` in float32.

    Args:
      images: `[B, H, W, C]` uint8.
      mean: `[C]` per-channel mean in units of 0..255 (`Dataset.mean`).
      std: `[C]` per-channel standard deviation in the same units (`Dataset.std`).

    Returns:
      `[B, H, W, C]` float32.
    """
    mean = jnp.asarray(mean, jnp.float32)
    std = jnp.asarray(std, jnp.float32)
    # Times the reciprocal, as in quantizers.py: every engine gets the same numbers.
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
    """Mirrors half of the images, and crops each at a random place after zero padding.

    The random numbers of an example come from the key and from its place in the global batch, here
    `offset .. offset + B - 1`. So every device gets the *same* key and its own offset, and what
    happens to an example does not depend on how many devices share the batch. The place of an
    example's crop does not depend on `flip`, nor its mirroring on `pad`.

    Example, inside `jax.pmap(..., axis_name="batch")` with `B` examples on each of `D` devices:

        augment(key, images, pad=4, flip=True, offset=jax.lax.axis_index("batch") * B, total=D * B)

    Args:
      key: random key, consumed here; the same on every device.
      images: `[B, H, W, C]`, any dtype, usually uint8.
      pad: zero pixels added on each of the four sides before cropping back to `[H, W]`; >= 0,
        and 0 means no crop.
      flip: whether to mirror left to right with probability one half.
      offset: index of the first of these examples in the global batch; may be traced.
      total: number of examples in the global batch, at least `offset + B`; checked where `offset`
        is a Python int, and of no influence on the result. `offset + B` when None.

    Returns:
      `[B, H, W, C]`, the dtype of `images`. With `pad=0` and `flip=False`, `images` itself: nothing
      is traced.

    Raises:
      ValueError: `pad` is negative, or the examples do not lie within the global batch.
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
    # A key for each example, by its place in the global batch. Numbers drawn for all `total` and
    # sliced at a traced offset would do as well, but XLA then draws them anew for every pixel.
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(
        offset + jnp.arange(batch)
    )
    if flip:
        mirrored = jax.vmap(jax.random.bernoulli)(keys[:, 0])
        images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    if pad:
        corner = jax.vmap(lambda k: jax.random.randint(k, (2,), 0, 2 * pad + 1))(keys[:, 1])
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        # Of nine formulations measured on a CPU (index gathers, one-hot products, selects, scans)
        # this one, which XLA turns into a single gather of whole windows, is the fastest.
        images = jax.vmap(
            lambda image, yx: lax.dynamic_slice(image, (yx[0], yx[1], 0), (height, width, channels))
        )(padded, corner)
    return images
