"""Many processes that train one network: how they find each other, agree, and share the writing.

Every process runs the same program. Each computes on its own devices; gradients and batch norm
statistics are averaged over all of them inside the step. The first process alone writes logs and
reports; checkpoints are written by all, as orbax wants it. With one process all of this is nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bitmixer_jax.errors import UserError

LOST = 75  # exit status: another process was lost; start all of them again
_TEXT = 2000  # bytes of an error that is passed on


class ProcessAborted(Exception):
    """This process must end without waiting for the others (`os._exit`): one of them has failed.

    Attributes:
      status: exit status; LOST if it was another one that failed.
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
    """Joins the other processes, before anything else touches a device.

    With no arguments: what the environment tells (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; else a TPU pod, SLURM, Open MPI, as JAX finds them), else this process is alone.

    Args:
      coordinator: "host:port" of the first process, which all can reach.
      processes: how many there are; 1: this one is alone, whatever the environment says.
      process: which one this is, from 0.
      heartbeat_seconds: how long a process may be silent before the others end.

    Raises:
      UserError: arguments that do not go together, or the others cannot be reached.
    """
    if coordinator is processes is process is None:
        coordinator, processes, process = _environment()
    given = (coordinator, processes, process)
    if processes == 1 and coordinator is None and process in (None, 0):
        return
    if any(value is not None for value in given) and None in given:
        raise UserError(
            "--coordinator, --processes and --process (or JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID): give all three, or none and let TPU, SLURM or "
            "Open MPI tell"
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"--process {process}: give 0 to {processes - 1}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=heartbeat_seconds
        )
    except ValueError as error:
        if coordinator is None and "coordinator_address should be defined" in str(error):
            return  # nothing in the environment: alone
        what = str(error).rstrip(".")
        raise UserError(
            f"many processes: {what}; give --coordinator, --processes and --process"
        ) from None
    except RuntimeError as error:
        if coordinator is None and "before any JAX" in str(error):
            return  # a program that uses jax already, such as a notebook: it is alone, or has met
        line = str(error).partition("\n")[0]
        raise UserError(
            f"many processes: cannot join {coordinator or 'the others'} ({line}); all of them must "
            "be started, each with its own --process"
        ) from None


def _environment() -> tuple[str | None, int | None, int | None]:
    """What JAX_... variables say; an address alone is left to JAX, as SLURM may tell the rest."""

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
    """Whether this process writes logs and reports."""
    return jax.process_index() == 0


def all_reduce_max(*values: float) -> tuple[float, ...]:
    """The largest of each value over all processes, which all call this at the same point."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.asarray(values, np.float64).astype(np.float32))
    return tuple(float(value) for value in np.max(gathered, axis=0))


def on_primary(action: Callable[[], Any], check: Callable[[], Any]) -> None:
    """The first process acts, then the others check; an error of the first is that of all.

    So no process waits for one that has given up.

    Raises:
      UserError: as ``action`` in the first process, or ``check`` in this one.
    """
    if jax.process_count() == 1:
        action()
        return
    from jax.experimental import multihost_utils

    said = b""
    if is_primary():
        try:
            action()
        except UserError as error:
            said = str(error).encode()[:_TEXT]
    text = np.zeros(_TEXT, np.uint8)
    text[: len(said)] = np.frombuffer(said, np.uint8)
    heard = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text)).astype(np.uint8))
    message = heard.rstrip(b"\0").decode(errors="replace")
    if message:
        raise UserError(message)
    if not is_primary():
        check()


def as_aborted(error: BaseException) -> ProcessAborted | None:
    """What an error in training means where there are other processes; None if there are none."""
    if jax.process_count() == 1:
        return None
    name = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, UserError):
        return ProcessAborted(str(error), 2)
    line = next((line for line in str(error).splitlines() if line.strip()), "")[:160]
    signs = (
        "Gloo",
        "NCCL",
        "onnection",
        "peer",
        "oordination",
        "arrier",
        "UNAVAILABLE",
        "DEADLINE",
    )
    if any(sign in str(error) for sign in signs):
        return ProcessAborted(
            f"{name}: another one was lost ({line}). Start all of them again: training goes on "
            "from the newest checkpoint",
            LOST,
        )
    return ProcessAborted(f"{name} failed ({type(error).__name__}: {line})", 1)
