"""Devices and processes: where arrays lie, and how many processes train one network.

Every process runs the same program on its own devices. `ParallelStep` averages gradients and batch
norm statistics over all devices inside the step, so all processes hold the same state. The first
process, the primary one, writes logs and reports; orbax lets all of them take part in checkpoints.
With one process the functions below return at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bitmixer_jax import deprecated
from bitmixer_jax.errors import Code, UserError, reason

AXIS = "batch"  # name of the axis over devices, for lax.pmean and axis_index
LOST = 75  # exit status: another process was lost; start all of them again
_MESSAGE_BYTES = 2000  # of an error that the primary process sends to the others
# What the collectives of CPU (Gloo) and GPU (NCCL) and JAX's coordinator write when a process dies.
_LOST_SIGNS = (
    *("Gloo", "NCCL", "onnection", "peer"),
    *("oordination", "arrier", "UNAVAILABLE", "DEADLINE"),
)


def local_devices(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Returns those of ``devices`` that belong to this process, in their order.

    >>> local_devices(jax.devices()) == jax.local_devices()
    True
    """
    return [device for device in devices if device.process_index == jax.process_index()]


def local_batch_indices(devices: Sequence[jax.Device], batch_size: int) -> np.ndarray:
    """Returns which images of a batch the devices of this process take: int ``[b]``, ascending.

    Device d of D takes the images ``d B / D`` to ``(d + 1) B / D - 1``.

    Args:
      devices: all D devices, of all processes.
      batch_size: B, images in the whole batch; a multiple of D.

        >>> local_batch_indices(jax.devices()[:1], 4)
        array([0, 1, 2, 3])
    """
    is_local = [device.process_index == jax.process_index() for device in devices]
    return np.arange(batch_size).reshape(len(devices), -1)[is_local].ravel()


def shard(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Spreads a batch over devices: each device gets its own part.

    Args:
      tree: arrays ``[b, ...]`` that hold the images of this process, in the order of
        `local_batch_indices`. With one process, b is the whole batch.
      devices: all D devices, of all processes.

    Returns:
      global arrays ``[D, B / D, ...]``, as `jax.pmap` takes them.

        >>> shard({"label": np.arange(4)}, jax.devices()[:1])["label"].shape
        (1, 4)
    """
    local = local_devices(devices)
    sharding = NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec(AXIS))

    def place(array: np.ndarray) -> jax.Array:
        parts = array.reshape(len(local), -1, *array.shape[1:])
        shape = (len(devices), *parts.shape[1:])
        placed = [jax.device_put(part[None], d) for part, d in zip(parts, local, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, placed)

    return jax.tree.map(place, tree)


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Copies a pytree to all local ones of ``devices``.

    A step returns its state placed like this. A state that is placed otherwise makes `jax.pmap`
    trace and compile the step a second time.

        >>> replicate({"w": np.ones(3)}, jax.devices())["w"].is_fully_replicated
        True
    """
    mesh = Mesh(np.asarray(local_devices(devices)), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


class ProcessAborted(Exception):
    """This process must end with `os._exit`, because one of the processes has failed.

    An orderly exit would wait for the others, and they may never answer.

    Attributes:
      status: exit status; LOST if another process failed.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    heartbeat_seconds: int = 60,
) -> None:
    """Joins the other processes of a run. Call it before anything else touches a device.

    Without arguments the environment decides: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; else a TPU pod, SLURM or Open MPI, as JAX finds them; else this process is
    alone.

    Args:
      coordinator: "host:port" of the first process; all processes can reach it.
      processes: how many there are; 1 means that this process is alone, whatever the environment
        says.
      process: number of this process, from 0.
      heartbeat_seconds: the others end when a process is silent for so long.

    Raises:
      UserError: arguments that do not go together, or the others cannot be reached.

        >>> connect(processes=1)
    """
    if coordinator is processes is process is None:
        coordinator, processes, process = _from_environment()
    given = (coordinator, processes, process)
    if processes == 1 and coordinator is None and process in (None, 0):
        return
    if any(value is not None for value in given) and None in given:
        raise UserError(
            "--coordinator, --processes and --process (or JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID): give all three, or none and let TPU, SLURM or "
            "Open MPI tell",
            "missing-value",
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"--process {process}: give 0 to {processes - 1}", "bad-value")
    # CPUs need Gloo to talk to other processes. GPUs and TPUs do not look at this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=heartbeat_seconds
        )
    except ValueError as error:
        if coordinator is None and "coordinator_address should be defined" in str(error):
            return  # JAX found nothing in the environment: this process is alone
        raise UserError(
            f"many processes: {reason(error).rstrip('.')}; give --coordinator, --processes and "
            "--process",
            "processes",
        ) from None
    except RuntimeError as error:
        # A program that uses JAX already, such as a notebook, is alone or has joined the others.
        if coordinator is None and "before any JAX" in str(error):
            return
        raise UserError(
            f"many processes: cannot join {coordinator or 'the others'} ({reason(error)}); all of "
            "them must be started, each with its own --process",
            "processes",
        ) from None


def _from_environment() -> tuple[str | None, int | None, int | None]:
    """Returns coordinator, processes and process from the JAX_... variables.

    An address alone is left to JAX, because SLURM may tell the rest.
    """

    def number(name: str) -> int | None:
        text = os.environ.get(name)
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            raise UserError(f"{name}={text}: give a whole number") from None

    processes, process = number("JAX_NUM_PROCESSES"), number("JAX_PROCESS_ID")
    if processes is process is None:
        return None, None, None
    return os.environ.get("JAX_COORDINATOR_ADDRESS"), processes, process


def is_primary() -> bool:
    """Returns whether this process writes logs and reports: the first one does."""
    return jax.process_index() == 0


def all_reduce_max(*values: float) -> tuple[float, ...]:
    """Returns the largest of each value over all processes.

    This waits for the other processes: all must call it at the same point, with as many values.

        >>> all_reduce_max(3.0, 0.0)
        (3.0, 0.0)
    """
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    # As float32: JAX has no float64 unless it is enabled.
    gathered = multihost_utils.process_allgather(np.asarray(values, np.float64).astype(np.float32))
    return tuple(float(value) for value in np.max(gathered, axis=0))


def on_primary(action: Callable[[], Any], check: Callable[[], Any]) -> None:
    """Runs ``action`` in the first process, then ``check`` in the others.

    A `UserError` of the action is raised in all processes, so none waits for one that gave up.

    Args:
      action: what one process alone may do, such as to create a file.
      check: verifies in another process what the action has done.

    Raises:
      UserError: from ``action`` in the first process, or from ``check`` in this one.
    """
    if jax.process_count() == 1:
        action()
        return
    from jax.experimental import multihost_utils

    sent = b""
    if is_primary():
        try:
            action()
        except UserError as error:
            sent = f"{error.code} {error}".encode()[:_MESSAGE_BYTES]
    # Only arrays of one shape can be broadcast, so the message is padded with zeros.
    buffer = np.zeros(_MESSAGE_BYTES, np.uint8)
    buffer[: len(sent)] = np.frombuffer(sent, np.uint8)
    received = bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8))
    code, _, message = received.rstrip(b"\0").decode(errors="replace").partition(" ")
    if message:
        raise UserError(message, cast(Code, code))
    if not is_primary():
        check()


def as_aborted(error: BaseException) -> ProcessAborted | None:
    """Returns what an error in training means for this process; None if it is alone.

    The exit status is 2 for a `UserError`, `LOST` if another process died, else 1.

        >>> as_aborted(RuntimeError("Gloo all-reduce failed")) is None  # with one process
        True
    """
    if isinstance(error, ProcessAborted):
        return error
    if jax.process_count() == 1:
        return None
    name = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, UserError):
        return ProcessAborted(str(error), 2)
    line = reason(error)[:160]
    if any(sign in str(error) for sign in _LOST_SIGNS):
        return ProcessAborted(
            f"{name}: another one was lost ({line}). Start all of them again: training goes on "
            "from the newest checkpoint",
            LOST,
        )
    return ProcessAborted(f"{name} failed ({type(error).__name__}: {line})", 1)


__getattr__ = deprecated.module_getattr(__name__)
