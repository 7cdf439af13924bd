"""Decodes every image of a streamed set once, and names those that cannot be read.

    python experiments/check_images.py imagenet --data_dir data --split train

Ends with status 1 if any image cannot be read. At some 500 images a second on a core, ImageNet's
training images take 45 core minutes. Without this check, training stops at the same images.
"""

from __future__ import annotations

import argparse
import logging
import sys

from rich.progress import track

from bitmixer_jax.data import StreamingDataset, StreamSettings, open_split
from bitmixer_jax.errors import UserError


def main() -> int:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="data set, such as imagenet or folder:NAME")
    parser.add_argument("--data_dir", help="where the data are")
    parser.add_argument("--split", default="train")
    parser.add_argument("--workers", type=int, default=-1)
    given = parser.parse_args()
    logging.getLogger("bitmixer_jax").setLevel(logging.ERROR)  # all are listed at the end
    settings = StreamSettings(skip_unreadable=True)
    data = open_split(
        given.name, given.split, given.data_dir, stream=settings, workers=given.workers
    )
    if not isinstance(data, StreamingDataset):
        print(f"{given.name} fits in memory and was read whole: {len(data)} images are good")
        return 0
    size = 256
    loader = data.evaluation(size)
    hidden = not sys.stderr.isatty()
    good = sum(
        int((batch.labels >= 0).sum())
        for batch in track(loader, "checking", total=-(-len(data) // size), disable=hidden)
    )
    for name, reason in sorted(loader.unreadable.items()):
        print(f"{name}: {reason}")
    print(f"{good} images of {len(data)} are good, {len(loader.unreadable)} cannot be read")
    return 1 if loader.unreadable else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"check_images: {error}")
