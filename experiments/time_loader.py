"""Times the streamed reading of training batches, with its workers, without a network.

    python experiments/make_jpegs.py --out data/typical --classes 10 --train 100 --longest 500
    python experiments/time_loader.py folder:typical --data_dir data --workers 0 1 2

The first batches are left out, because workers start and fill their buffers meanwhile. On a busy
machine, compare images per second of CPU time (of this process and its workers together).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time

import psutil

from bitmixer_jax.data import Order, StreamingDataset, StreamSettings, open_split


def cpu_seconds() -> float:
    """CPU time of this process and its children so far."""
    here = psutil.Process(os.getpid())
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def rate(data: StreamingDataset, batch_size: int, batches: int) -> tuple[float, float]:
    """Images per second, and per second of CPU time, once the workers are under way."""
    order = Order(0, len(data), batch_size)
    loader = data.training(order, 0, 10_000, flip=True)
    for _ in range(6):
        next(loader)
    start, used = time.perf_counter(), cpu_seconds()
    for _ in range(batches):
        next(loader)
    seconds, used = time.perf_counter() - start, cpu_seconds() - used
    loader.close()
    return batches * batch_size / seconds, batches * batch_size / used


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="data set, such as imagenet or folder:typical")
    parser.add_argument("--data_dir", help="where the data are")
    parser.add_argument("--split", default="train")
    parser.add_argument("--workers", type=int, nargs="+", default=[-1])
    parser.add_argument("--decoder", nargs="+", default=["pil"])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=12)
    given = parser.parse_args()
    for decoder in given.decoder:
        settings = StreamSettings(decoder=decoder)
        data = open_split(given.name, given.split, given.data_dir, stream=settings)
        assert isinstance(data, StreamingDataset)
        for workers in given.workers:
            with_workers = dataclasses.replace(data, workers=workers)
            found, of_cpu = rate(with_workers, given.batch_size, given.batches)
            print(
                f"{decoder}, {workers} workers: {found:.0f} images/s, {of_cpu:.0f} per CPU second",
                flush=True,
            )


if __name__ == "__main__":
    main()
