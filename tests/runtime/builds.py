"""Runtimes of the tiny network and policies for them."""

import numpy as np

from bitmixer_jax.loaded_model import from_variables
from bitmixer_jax.runtime import Runtime

POLICY = np.asarray([4, 3, 2, 2, 3, 4], np.int32)
CLOSE = dict(rtol=1e-4, atol=1e-5)  # two programmes for the same numbers differ in rounding
BATCH = 8


def drawn(runtime, number, seed):
    """Random policies int32 ``[number, L]``."""
    rng = np.random.default_rng(seed)
    size = (number, len(runtime.names))
    return rng.choice(runtime.space.choices, size=size).astype(np.int32)


def build(network, digits, **settings):
    model, variables = network
    about = dict(mean=digits.mean, std=digits.std, classes=digits.classes)
    return Runtime(from_variables(model, variables, **about), **settings)
