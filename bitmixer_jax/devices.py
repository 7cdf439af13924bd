"""Where arrays lie: on which devices, and which part of a batch belongs to this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"  # the axis over devices


def local_devices(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Those of ``devices`` that belong to this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def local_batch_indices(devices: Sequence[jax.Device], batch_size: int) -> np.ndarray:
    """Places in a batch over all ``devices`` that those of this process take: int ``[b]``, rising.

    Args:
      batch_size: images in the whole batch, a multiple of the number of devices.
    """
    here = [device.process_index == jax.process_index() for device in devices]
    return np.arange(batch_size).reshape(len(devices), -1)[here].ravel()


def shard(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Arrays ``[B, ...]`` of this process as ``[devices, B / devices, ...]``, a part on each.

    With several processes, B is of the devices of this one alone.
    """
    here = local_devices(devices)
    sharding = NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec(AXIS))

    def place(array: np.ndarray) -> jax.Array:
        parts = array.reshape(len(here), -1, *array.shape[1:])
        shape = (len(devices), *parts.shape[1:])
        placed = [jax.device_put(part[None], d) for part, d in zip(parts, here, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, placed)

    return jax.tree.map(place, tree)


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Places a pytree on all devices, whole on each: as a step returns it, so it traces once.

    With several processes, each places it on its own.
    """
    mesh = Mesh(np.asarray(local_devices(devices)), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
