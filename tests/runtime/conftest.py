"""A compiled runtime of the trained network, and the same logits by a plain forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitmixer_jax import data
from bitmixer_jax.runtime import Runtime
from bitmixer_jax.trained import load
from tests.runtime.builds import BATCH


@pytest.fixture(scope="module")
def runtime(trained):
    return Runtime.load(trained, batch_size=BATCH)


@pytest.fixture
def fresh(runtime):
    """The compiled runtime with its widest policy in force, whatever other tests did."""
    runtime.set_policy(4)
    return runtime


@pytest.fixture(scope="module")
def network(trained):
    """Network and variables at the end of training."""
    loaded = load(trained)
    return loaded.model, loaded.variables


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "test[:17]")


@pytest.fixture(scope="module")
def plain(network, digits):
    """``plain(policy)``: logits ``[17, 10]`` of all test images by model.apply."""
    model, variables = network

    @jax.jit
    def run(images, policy):
        x = data.normalize(images, digits.mean, digits.std)
        return model.apply(variables, x, bits=policy)

    def logits(policy):
        policy = jnp.asarray(policy, jnp.int32)
        parts = [run(digits.images[i : i + BATCH], policy) for i in (0, 8, 9)]
        return np.concatenate([parts[0], parts[1], parts[2][-1:]])

    return logits


@pytest.fixture
def compilations():
    """Names of what jax compiles, in the whole process."""
    found = []

    def listen(event, duration, **_):
        if "compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def young(trained):
    """Before any layer drew its own width: pairs of different widths were never visited."""
    return Runtime.load(f"{trained}@weights", batch_size=1)
