"""Speed of a training step, as ratios to the float twin within one run."""

from __future__ import annotations

import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.models import Network, create_model
from bitmixer_jax.training.optimizer import OptimizerSettings, make_optimizer
from bitmixer_jax.training.plan import init
from bitmixer_jax.training.stages import Stage
from bitmixer_jax.training.step import Spread, StepSettings, TrainState, make_train_step, replicate

KINDS = {
    "float": Stage(name="float", epochs=1, quantize="nothing"),
    "activations": Stage(name="activations", epochs=1, quantize="activations"),
    "network-wide": Stage(name="network", epochs=1),
    "layer-wise": Stage(name="layer", epochs=1, widths="layer", rho_start=1.0),
}


def benchmark(
    name: str, *, batch_size: int = 128, steps: int = 20, compute_dtype: str = "float32"
) -> dict[str, Any]:
    """Times a training step of the float twin and of each stage.

    "activations" has real-valued weights, "network-wide" and "layer-wise" quantise both. They take
    turns, one step each, so that a busy machine slows all of them alike; each
    figure is the median.

    Args:
      name: of the network (`create_model`), at its own image size.
      batch_size: over all devices.
      steps: how many steps of each kind are timed.
      compute_dtype: "float32" or "bfloat16".

    Returns:
      a JSON tree: per kind "images_per_second", "milliseconds", "compile_seconds",
      "ratio_to_float"; device, versions, settings.

    Raises:
      UserError: unknown network, or a batch that does not fit the devices.
    """
    devices = jax.devices()
    if batch_size < 1 or batch_size % len(devices):
        raise UserError(f"batch_size = {batch_size}: give a multiple of the {len(devices)} devices")
    if steps < 1:
        raise UserError(f"steps = {steps}: give 1 or more")
    model = create_model(name, num_classes=10, compute_dtype=compute_dtype)
    rng = np.random.default_rng(0)
    data = {
        "image": rng.integers(0, 256, (batch_size, *model.image_shape), np.uint8),
        "label": rng.integers(0, 10, batch_size, np.int32),
    }
    data = replicate(data, devices)
    rows = np.arange(batch_size, dtype=np.int32)[None]
    running: dict[str, tuple[Spread, TrainState]] = {}
    result: dict[str, Any] = {
        "model": name,
        "batch_size": batch_size,
        "compute_dtype": compute_dtype,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "steps": {},
    }
    for kind, stage in KINDS.items():
        step, state = prepare_step(model, stage, batch_size, devices)
        begun = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, data, rows))
        result["steps"][kind] = {"compile_seconds": time.perf_counter() - begun}
        running[kind] = (step, state)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(steps):
        for kind, (step, state) in running.items():
            begun = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, data, rows))
            times[kind].append(time.perf_counter() - begun)
            running[kind] = (step, state)
    base = float(np.median(times["float"]))
    for kind, seconds in times.items():
        middle = float(np.median(seconds))
        result["steps"][kind] |= {
            "milliseconds": 1e3 * middle,
            "images_per_second": batch_size / middle,
            "ratio_to_float": middle / base,
        }
    return result


def prepare_step(
    model: Network, stage: Stage, batch_size: int, devices: list[Any]
) -> tuple[Spread, TrainState]:
    """The step of a stage, and a fresh state on the devices; the float twin's if that is asked."""
    network = model.float_twin() if stage.quantize == "nothing" else model
    tx = make_optimizer(OptimizerSettings(), stage, 1000)
    channels = network.image_shape[-1]
    settings = StepSettings(
        seed=0,
        start=0,
        steps=1000,
        batch_size=batch_size,
        mean=(128.0,) * channels,
        std=(64.0,) * channels,
        pad=4,
        flip=True,
    )
    images = jax.random.normal(jax.random.key(0), (8, *network.image_shape))
    variables = jax.jit(lambda key, x: init(network, key, x))(jax.random.key(0), images)
    params = variables["params"]
    state = TrainState(jnp.int32(0), params, variables["batch_stats"], tx.init(params))
    step = make_train_step(network, stage, tx, settings)
    return Spread(step, devices), replicate(state, devices)


def describe(result: dict[str, Any]) -> str:
    """A table of `benchmark`'s result, for people."""
    lines = [
        f"{result['model']}, batch {result['batch_size']}, {result['compute_dtype']}, "
        f"{result['device']}, jax {result['jax']}",
        f"{'step':14}{'ms':>10}{'images/s':>12}{'compile s':>12}{'ratio':>8}",
    ]
    for kind, row in result["steps"].items():
        lines.append(
            f"{kind:14}{row['milliseconds']:10.1f}{row['images_per_second']:12.0f}"
            f"{row['compile_seconds']:12.1f}{row['ratio_to_float']:8.2f}"
        )
    return "\n".join(lines)
