"""Processes that work ahead of the training, and end with it."""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from typing import Any

from bitmixer_jax.errors import UserError
from bitmixer_jax.files import read_bytes

_BUFFER = 2  # items each worker may be ahead
_MOST = 32
_GUARD = 'if __name__ == "__main__"'


def number_of(workers: int) -> int:
    """How many workers there are: those asked for, or one for each core."""
    return workers if workers >= 0 else min(_cores(), _MOST)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS does not say which of its cores this process may use
        return os.cpu_count() or 1


def check_main(workers: int) -> None:
    """Says before the work that decoding processes, which import the main script, cannot start.

    Raises:
      UserError: the script comes from standard input, has no main guard, or is being imported by
        such a process.
    """
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if not number_of(workers):
        return
    # Only of a process that is importing its main script; a private name, absent elsewhere.
    importing = getattr(multiprocessing.current_process(), "_inheriting", False)
    if path is None or getattr(main, "__spec__", None) is not None:  # interactive; python -m
        missing = importing
    elif not os.path.isfile(path):
        raise UserError(
            f"processes that decode images import the main script, and {path} is no file: save it "
            f"as one that starts under {_GUARD}, or set config.workers=0"
        )
    else:
        missing = importing or not _has_guard(path)
    if missing:
        raise UserError(
            f"{path or 'the main script'} has no guard {_GUARD}, and processes that decode images "
            "import it: put the code that starts training under this guard, or set config.workers=0"
        )


def _has_guard(path: str) -> bool:
    """Whether a script may have a main guard; true where its text cannot be read."""
    try:
        text = read_bytes(path, 2**24)
    except OSError:
        return True
    return b"__name__" in text or b"parent_process" in text


def why_died(error: RuntimeError, workers: int) -> UserError | None:
    """The error that says why a worker died; None where none did."""
    if "terminated unexpectedly" not in str(error):
        return None
    what = str(error).partition(".")[0]
    if re.search(r"exit code 1\b", str(error)):  # an exception, as it started
        advice = f"its message is above; a script must start the work under {_GUARD}"
    else:
        advice = f"if memory ran out, lower config.workers (now {number_of(workers)})"
    return UserError(f"a process that decodes images died ({what}): {advice}")


def open_iterator(items: Any, workers: int, size: int) -> Any:
    """An iterator over items, in order, that are made ahead; its ``close()`` ends the workers.

    Args:
      items: has ``len(items)``, and makes ``items[i]``, a dict of arrays, as it is asked for; every
        worker gets a copy.
      workers: see `Streamed`.
      size: bytes of an item, about.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads its own flags, and refuses where nobody parsed
        flags.FLAGS.mark_as_parsed()
    number = number_of(workers)
    threads = 2 if number else _cores()  # two: one reads while the other decodes
    source: Any = grain.MapDataset.source(items)
    data = source.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )
    if number:
        data = data.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=number, per_worker_buffer_size=_BUFFER),
            worker_init_fn=_start_worker,
        )
        most = number * (_BUFFER + 2) * size
        options = grain.experimental.DatasetOptions(min_shm_size=_least_shared(2 * most))
        data = grain.experimental.WithOptionsIterDataset(data, options)
    return iter(data)


def _least_shared(needed: int) -> int:
    """Bytes from which an array travels through shared memory, if there is as much as needed."""
    try:
        enough = shutil.disk_usage("/dev/shm").free > needed
    except OSError:  # macOS: no such folder, and no such limit
        enough = True
    # Without (containers often have 64 MB), a worker would die of a bus error. Pipes then: their
    # 3,000 images/s between 2 cores, against 4,000, are still beyond what those cores decode.
    return 2**16 if enough else 2**62


def _start_worker(number: int, count: int) -> None:
    """Makes a worker end with its parent, however that ends, and leave signals to it."""
    for each in (signal.SIGINT, signal.SIGTERM):  # launchers send them to all of a job
        signal.signal(each, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
