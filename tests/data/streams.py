"""Streams of small pictures, for tests."""

import dataclasses

import numpy as np

from bitmixer_jax.data import Order, StreamingDataset, StreamSettings, open_split

SMALL = StreamSettings(size=16, resize=20)
SKIP = dataclasses.replace(SMALL, skip_unreadable=True)
CLASSES, TRAIN, VALIDATION = 3, 15, 5


def opened(form, split="train", settings=SMALL, workers=0) -> StreamingDataset:
    data = open_split(form[0], split, form[1], stream=settings, workers=workers)
    assert isinstance(data, StreamingDataset)
    return data


def training(data, start=0, stop=8, seed=1, batch=8, local=None):
    """Images and labels ``[steps, b, ...]`` of some steps of training."""
    order = Order(seed, len(data), batch)
    batches = list(data.training(order, start, stop, flip=True, local=local))
    return np.stack([b.images for b in batches]), np.stack([b.labels for b in batches])


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
