"""Processes that decode images ahead of the training, and that end with it."""

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

_BUFFER = 2  # items that each worker may be ahead
_MAX_WORKERS = 32
_GUARD = 'if __name__ == "__main__"'


def number_of(workers: int) -> int:
    """Returns the number of workers: as many as asked for, or one for each core if negative."""
    return workers if workers >= 0 else min(_cores(), _MAX_WORKERS)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS does not say which of its cores this process may use
        return os.cpu_count() or 1


def check_main(workers: int) -> None:
    """Checks that decoding processes, which import the main script, can start.

    Raises:
      UserError: the script comes from standard input, has no main guard, or is being imported by
        such a process.
    """
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if not number_of(workers):
        return
    # Set while a child process imports the main script. The name is private and may go away.
    importing = getattr(multiprocessing.current_process(), "_inheriting", False)
    if path is None or getattr(main, "__spec__", None) is not None:  # interactive; python -m
        missing = importing
    elif not os.path.isfile(path):
        raise UserError(
            f"processes that decode images import the main script, and {path} is no file: save it "
            f"as one that starts under {_GUARD}, or set config.workers=0",
            "processes",
        )
    else:
        missing = importing or not _has_guard(path)
    if missing:
        raise UserError(
            f"{path or 'the main script'} has no guard {_GUARD}, and processes that decode images "
            "import it: put the code that starts training under this guard, or set "
            "config.workers=0",
            "processes",
        )


def _has_guard(path: str) -> bool:
    """Returns whether a script may have a main guard; true if its text cannot be read."""
    try:
        text = read_bytes(path, 2**24)
    except OSError:
        return True
    return b"__name__" in text or b"parent_process" in text


def why_died(error: RuntimeError, workers: int) -> UserError | None:
    """Returns the error that says why a worker died, or None if none did."""
    if "terminated unexpectedly" not in str(error):
        return None
    what = str(error).partition(".")[0]
    if re.search(r"exit code 1\b", str(error)):  # an exception, as it started
        advice = f"its message is above; a script must start the work under {_GUARD}"
    else:
        advice = f"if memory ran out, lower config.workers (now {number_of(workers)})"
    return UserError(f"a process that decodes images died ({what}): {advice}", "processes")


def open_iterator(items: Any, workers: int, size: int) -> Any:
    """Returns an iterator over items, in order, that workers make ahead.

    Args:
      items: a sequence that makes ``items[i]``, a dict of arrays, when it is asked for. Every
        worker gets a copy of it.
      workers: see `StreamingDataset`.
      size: approximate bytes of an item.

    Returns:
      An iterator. Its ``close()`` ends the workers.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain refuses to run before flags are parsed
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
        needed = 2 * number * (_BUFFER + 2) * size
        options = grain.experimental.DatasetOptions(min_shm_size=min_shared_bytes(needed))
        data = grain.experimental.WithOptionsIterDataset(data, options)
    return iter(data)


def min_shared_bytes(needed: int) -> int:
    """Returns the least size of an array that travels through shared memory.

    It is beyond any size if there are fewer bytes of shared memory than ``needed``.
    """
    try:
        enough = shutil.disk_usage("/dev/shm").free > needed
    except OSError:  # macOS: no such folder, and no such limit
        enough = True
    # Containers often have 64 MB, and a worker that runs out of it dies of a bus error. Then arrays
    # travel through pipes: 3,000 images/s on 2 cores instead of 4,000, more than these decode.
    return 2**16 if enough else 2**62


def _start_worker(number: int, count: int) -> None:
    """Makes a worker ignore signals, and end when its parent ends, however that ends."""
    for each in (signal.SIGINT, signal.SIGTERM):  # launchers send them to all of a job
        signal.signal(each, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
