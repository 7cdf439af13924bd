"""Measures time and memory of training and evaluation against the full-precision baseline."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax.data import Dataset, augment, normalize
from bitmixer_jax.distributed import replicate
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Evaluator, random_policies
from bitmixer_jax.models import Network, create_model
from bitmixer_jax.training.optimizer import OptimizerSettings, make_optimizer
from bitmixer_jax.training.schedule import init
from bitmixer_jax.training.stages import Stage
from bitmixer_jax.training.step import ParallelStep, StepSettings, TrainState, make_train_step

KINDS = {
    "float": Stage(name="float", epochs=1, quantize="nothing"),
    "activations": Stage(name="activations", epochs=1, quantize="activations"),
    "network-wide": Stage(name="network", epochs=1),
    "layer-wise": Stage(name="layer", epochs=1, widths="layer", rho_start=1.0),
}


def benchmark(
    name: str, *, batch_size: int = 128, steps: int = 20, compute_dtype: str = "float32"
) -> dict[str, Any]:
    """Measures training steps, evaluation and augmentation on synthetic images.

    There are four kinds of training step: "float" is the full-precision baseline, "activations"
    quantises activations alone, and "network-wide" and "layer-wise" quantise weights too. The kinds
    take turns, one call each, so that other work on the machine slows all of them alike. Times are
    medians.

    Args:
      name: of the network; see `create_model`. It runs at its own image size.
      batch_size: images in a batch, over all devices.
      steps: number of timed calls of each kind.
      compute_dtype: "float32" or "bfloat16".

    Returns:
      a JSON tree.

      - "steps": for each kind "milliseconds", "images_per_second", "compile_seconds" (time of the
        first call), "memory_bytes" (arguments and temporary arrays on one device, as XLA plans
        them), and "ratio_to_float" and "memory_to_float" (time and memory by those of "float").
      - "evaluation": the same times for a forward pass of "float" and of "policies", which is the
        switchable network at one policy.
      - "data": the same times for cropping, mirroring and normalising a batch on one device.
      - "model", "batch_size", "compute_dtype", "device", "jax", "python": what was measured.

    Raises:
      UserError: the network is unknown, or a number is not allowed.

    Examples:
      >>> result = benchmark("resnet20", batch_size=128)  # doctest: +SKIP
      >>> result["steps"]["layer-wise"]["ratio_to_float"]  # doctest: +SKIP
      1.7
    """
    devices = jax.devices()
    if batch_size < 1 or batch_size % len(devices):
        raise UserError(f"batch_size = {batch_size}: give a multiple of the {len(devices)} devices")
    if steps < 1:
        raise UserError(f"steps = {steps}: give 1 or more")
    model = create_model(name, num_classes=10, compute_dtype=compute_dtype)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, *model.image_shape), np.uint8)
    labels = rng.integers(0, 10, batch_size, np.int32)
    data = replicate({"image": images, "label": labels}, devices)
    indices = np.arange(batch_size, dtype=np.int32)[None]  # of the images of each step: one step
    result: dict[str, Any] = {
        "model": name,
        "batch_size": batch_size,
        "compute_dtype": compute_dtype,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "steps": {},
        "evaluation": {},
        "data": {},
    }
    calls: list[tuple[dict[str, Any], Callable[[], Any]]] = []

    def add(figures: dict[str, Any], call: Callable[[], Any]) -> None:
        """Adds a call to time, and makes it once to compile it."""
        begun = time.perf_counter()
        call()
        figures["compile_seconds"] = time.perf_counter() - begun
        calls.append((figures, call))

    for kind, stage in KINDS.items():
        training = _Training(*prepare_step(model, stage, batch_size, devices), data, indices)
        figures: dict[str, Any] = {}
        result["steps"][kind] = figures
        add(figures, training)
        figures["memory_bytes"] = training.step.memory(training.state, data, indices)
    examples = Dataset(
        name, "benchmark", images, labels, tuple("0123456789"), *_moments(model.image_shape[-1])
    )
    for kind, network in (("float", model.baseline()), ("policies", model)):
        add(result["evaluation"].setdefault(kind, {}), _evaluation(network, examples, devices))
    add(result["data"], _augmentation(images))

    times: list[list[float]] = [[] for _ in calls]
    for _ in range(steps):
        for seconds, (_, call) in zip(times, calls, strict=True):
            begun = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begun)
    for seconds, (figures, _) in zip(times, calls, strict=True):
        median = float(np.median(seconds))
        figures["milliseconds"] = 1e3 * median
        figures["images_per_second"] = batch_size / median
    for part in ("steps", "evaluation"):
        base = result[part]["float"]
        for figures in result[part].values():
            figures["ratio_to_float"] = figures["milliseconds"] / base["milliseconds"]
            if part == "steps":
                figures["memory_to_float"] = figures["memory_bytes"] / base["memory_bytes"]
    return result


class _Training:
    """Does the next training step with each call."""

    def __init__(self, step: ParallelStep, state: TrainState, data: Any, indices: np.ndarray):
        self.step, self.state, self._arguments = step, state, (data, indices)

    def __call__(self) -> None:
        self.state, _ = jax.block_until_ready(self.step(self.state, *self._arguments))


def _evaluation(model: Network, examples: Dataset, devices: list[Any]) -> Callable[[], Any]:
    """Returns a function that evaluates one batch at one policy, with all checks."""
    variables = jax.jit(lambda key, x: init(model, key, x))(
        jax.random.key(0), jnp.zeros((1, *model.image_shape))
    )
    # The Evaluator refuses pairs of widths without statistics. For a timing any statistics will do.
    stats = jax.tree.map(lambda s: jnp.maximum(s, 1), variables["batch_stats"])
    variables = replicate({"params": variables["params"], "batch_stats": stats}, devices)
    size = -(-len(examples) // len(devices))
    evaluator = Evaluator(model, examples, examples.mean, examples.std, devices, size, policies=1)
    policy = random_policies(model, 1, 0) if model.quant.space else np.zeros((1, 0), np.int32)
    return lambda: evaluator.top1(variables, policy)


def _augmentation(images: np.ndarray) -> Callable[[], Any]:
    """Returns a function that crops, mirrors and normalises a batch, as a training step does."""
    mean, std = _moments(images.shape[-1])

    @jax.jit
    def run(key: jax.Array, images: jax.Array) -> jax.Array:
        # The training step also gathers its images by their indices.
        batch = images[jnp.arange(len(images))]
        return normalize(augment(key, batch, pad=4, flip=True), mean, std)

    placed = jax.device_put(images)
    return lambda: jax.block_until_ready(run(jax.random.key(0), placed))


def _moments(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the synthetic images, in units of 0..255."""
    return np.full(channels, 128.0, np.float32), np.full(channels, 64.0, np.float32)


def prepare_step(
    model: Network, stage: Stage, batch_size: int, devices: list[Any]
) -> tuple[ParallelStep, TrainState]:
    """Returns the training step of a stage, and a new state on the devices.

    Args:
      model: a switchable network.
      stage: with ``quantize = "nothing"`` the step trains the full-precision baseline of ``model``.
      batch_size: images in a batch, over all devices.
      devices: to train on.
    """
    network = model.baseline() if stage.quantize == "nothing" else model
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
    return ParallelStep(step, devices), replicate(state, devices)


def describe(result: dict[str, Any]) -> str:
    """Returns the result of `benchmark` as a table for people."""
    lines = [
        f"{result['model']}, batch {result['batch_size']}, {result['compute_dtype']}, "
        f"{result['device']}, jax {result['jax']}",
        f"{'':14}{'ms':>10}{'images/s':>12}{'compile s':>12}{'ratio':>8}{'MiB':>10}{'ratio':>8}",
    ]

    def line(name: str, row: dict[str, Any]) -> str:
        text = (
            f"{name:14}{row['milliseconds']:10.1f}{row['images_per_second']:12.0f}"
            f"{row['compile_seconds']:12.1f}"
        )
        if "ratio_to_float" in row:
            text += f"{row['ratio_to_float']:8.2f}"
        if "memory_bytes" in row:
            text += f"{row['memory_bytes'] / 2**20:10.0f}{row['memory_to_float']:8.2f}"
        return text

    lines += ["training step", *(line(f"  {k}", row) for k, row in result["steps"].items())]
    lines += ["evaluation", *(line(f"  {k}", row) for k, row in result["evaluation"].items())]
    return "\n".join([*lines, line("augmentation", result["data"])])
