"""Costs of policies: average bits, BitOPs, bytes, or latencies from a file.

Each cost is a sum over layers, and what a layer adds depends only on the width of this layer. So a
cost is a table ``[L, n]``, and the costs of many policies are one lookup. Only the peak of the
activation memory is not such a sum. All tables except latencies follow from ``model.layers``.

The first and last layers (stem and head) have no width to choose. Costs, budgets and searches leave
them out; `Cost.first_last_layers` is what they add.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmixer_jax.deprecated import new_keys
from bitmixer_jax.errors import UserError, shown
from bitmixer_jax.files import read_document
from bitmixer_jax.models import Network
from bitmixer_jax.policy import closest

LATENCY_FORMAT = "bitmixer-latency"
LATENCY_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """A cost of policies. Calling it returns the costs of one policy or of several.

      cost(policy) = sum over layers l of table[l, index of policy[l]] / divisor

    Attributes:
      name: a key of `costs`, such as "bitops".
      unit: of the cost, such as "BitOPs".
      choices: ``n`` widths in bits, one for each column of the table.
      table: float64 ``[L, n]``, what each layer adds at each width, times ``divisor``.
      divisor: the number of layers or of weights for an average, else 1. Sums of whole numbers are
        exact, so an average of exactly 3 bits is exactly 3.0.
      first_last_layers: what the first and last layers add. The call leaves it out.

    Examples:
      >>> average = Cost(
      ...     name="avg_bits", unit="bits", choices=(2, 3, 4),
      ...     table=np.asarray([[2, 3, 4], [2, 3, 4]]), divisor=2,
      ... )
      >>> average([[2, 3], [4, 4]])
      array([2.5, 4. ])
      >>> average.range
      (2.0, 4.0)
    """

    name: str
    unit: str
    choices: tuple[int, ...]
    table: np.ndarray
    divisor: float = 1.0
    first_last_layers: float = 0.0

    def __call__(self, policies: Any) -> np.ndarray:
        """Returns the cost of each policy, without the first and last layers.

        Args:
          policies: ``[M, L]`` widths in bits, or one policy ``[L]``.

        Returns:
          float64 ``[M]``, or a scalar for one policy.

        Raises:
          UserError: ``policies`` have another shape, or a width that is not one of the choices.
        """
        widths = np.asarray(policies)
        columns = np.searchsorted(self.choices, widths).clip(max=len(self.choices) - 1)
        if (
            widths.shape[-1:] != self.table.shape[:1]
            or (np.asarray(self.choices)[columns] != widths).any()
        ):
            raise UserError(
                f"cost: give {len(self.table)} widths from {self.choices}, got {widths.tolist()}",
                "policy-form",
            )
        return self.table[np.arange(len(self.table)), columns].sum(-1) / self.divisor

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest cost of all policies."""
        low, high = self.table.min(1).sum(), self.table.max(1).sum()
        return float(low / self.divisor), float(high / self.divisor)

    @property
    def widest(self) -> float:
        """Cost of the policy with the widest width in all layers; it is 100% in budgets."""
        return float(self.table[:, -1].sum() / self.divisor)


def costs(model: Network, latency: str | pathlib.Path | None = None) -> dict[str, Cost]:
    """Returns the costs of a network's policies by name.

    With b[l] the width of layer l, and MACs, weights and inputs those of one image:

    ================  ======  ======================================================================
    avg_bits          bits    sum of b[l] / L
    avg_weight_bits   bits    sum of weights[l] b[l] / sum of weights[l]
    bitops            BitOPs  sum of MACs[l] b[l]^2, as weights and activations both have b[l] bits
    bytes             bytes   weights packed as bit-planes: each plane of a kernel takes a whole
                              number of bytes (below the widest width, the quantiser "double"
                              needs one plane more than b[l])
    activation_bytes  bytes   sum of ceil(inputs[l] b[l] / 8)
    latency_ms        ms      sum of the times in a latency file
    ================  ======  ======================================================================

    Conventions of this library: `Cost.table` covers the layers that have a width.
    `Cost.first_last_layers` counts 32 x 32 BitOPs for each MAC and 4 bytes for each weight of the
    first and last layers if they are real-valued; if they are int8, 8 x 8 BitOPs and 1 byte.
    Biases have 4 bytes. Batch norms, step sizes and the additions of residual branches are not
    counted.

    Args:
      model: a network whose layers have widths.
      latency: a latency file (see `load_latency`); None leaves out "latency_ms".

    Returns:
      a `Cost` for each name in the table.

    Raises:
      UserError: the network is a full-precision baseline, or the latency file does not fit it.

    Examples:
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10, width=3, image_shape=(8, 8, 1))
      >>> bitops = costs(model)["bitops"]
      >>> bitops([[4, 4, 4, 4, 4, 4], [2, 2, 2, 2, 2, 2]])
      array([414720., 103680.])
    """
    bits = np.asarray(model.space.choices, np.float64)
    layers = model.layers
    macs = np.asarray([layer.macs for layer in layers], np.float64)[:, None]
    weights = np.asarray([layer.params for layer in layers], np.float64)[:, None]
    plane_bytes = np.asarray(
        [sum(math.ceil(kernel.params / 8) for kernel in layer.kernels) for layer in layers],
        np.float64,
    )[:, None]
    planes = np.asarray([model.quant.quantizer.planes(b, model.space) for b in model.space.choices])
    inputs = np.asarray([math.prod(layer.input) for layer in layers], np.float64)[:, None]
    first_last_bits = 8 if model.first_last_layers == "int8" else 32
    first_last_weights = model.stem_conv.params + model.features * model.num_classes
    first_last_macs = model.stem_conv.macs + model.features * model.num_classes
    first_last_inputs = math.prod(model.image_shape) + model.features
    first_last_bytes = first_last_weights * first_last_bits / 8 + 4 * model.num_classes
    first_last_input_bytes = math.ceil(first_last_inputs * first_last_bits / 8)
    # name: unit, table, divisor, what the first and last layers add
    tables = {
        "avg_bits": ("bits", np.tile(bits, (len(layers), 1)), len(layers), 0.0),
        "avg_weight_bits": ("bits", weights * bits, weights.sum(), 0.0),
        "bitops": ("BitOPs", macs * bits**2, 1.0, first_last_macs * first_last_bits**2),
        "bytes": ("bytes", plane_bytes * planes, 1.0, first_last_bytes),
        "activation_bytes": ("bytes", np.ceil(inputs * bits / 8), 1.0, first_last_input_bytes),
    }
    by_name = {
        name: Cost(
            name=name,
            unit=unit,
            choices=model.space.choices,
            table=table,
            divisor=float(divisor),
            first_last_layers=float(first_last_layers),
        )
        for name, (unit, table, divisor, first_last_layers) in tables.items()
    }
    if latency is not None:
        by_name["latency_ms"] = load_latency(latency, model)
    return by_name


def activation_peak(model: Network, policies: Any) -> np.ndarray:
    """Returns the most bytes of activations that are held at once while one image runs.

      max over layers l of  ceil(inputs[l] b[l] / 8) + ceil(outputs[l] b[l + 1] / 8)

    where b[l] is the width of layer l. After the last layer, b[l + 1] is the width of the head: 32
    bits, or 8 if it is int8.

    Convention of this library: accumulators are not counted, nor is the real-valued tensor of a
    residual branch.

    Args:
      model: a network whose layers have widths.
      policies: ``[M, L]`` widths in bits, or one policy ``[L]``.

    Returns:
      float64 ``[M]``, or a scalar for one policy; in bytes.

    Examples:
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10, width=3, image_shape=(8, 8, 1))
      >>> activation_peak(model, [[4, 4, 4, 4, 4, 4], [2, 2, 2, 2, 2, 2]])
      array([216., 204.])
    """
    bits = np.asarray(policies, np.float64)
    head_bits = 8.0 if model.first_last_layers == "int8" else 32.0
    head = np.full((*bits.shape[:-1], 1), head_bits)
    next_bits = np.concatenate([bits[..., 1:], head], axis=-1)
    inputs = np.asarray([math.prod(layer.input) for layer in model.layers])
    outputs = np.asarray([math.prod(layer.kernels[0].output) for layer in model.layers])
    return np.max(np.ceil(inputs * bits / 8) + np.ceil(outputs * next_bits / 8), axis=-1)


def load_latency(path: str | pathlib.Path, model: Network) -> Cost:
    """Reads a latency file: the time that each layer takes at each width.

    The file is JSON. Times are in seconds; those of the first and last layers are optional:

        {"format": "bitmixer-latency", "version": 1,
         "layers": {NAME: {"2": SECONDS, "3": SECONDS, ...}, ...},
         "first_last_layers": SECONDS}

    Other keys, such as the device and the date, are not read.

    Args:
      path: the file.
      model: the network whose layers the file names.

    Returns:
      the cost "latency_ms", in ms.

    Raises:
      UserError: the file is missing or not a latency file, or its layers, widths or times do not
        fit the network.

    Examples:
      >>> import json, tempfile
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10, width=3, image_shape=(8, 8, 1))
      >>> times = {name: {"2": 0.001, "3": 0.0015, "4": 0.002} for name in model.names}
      >>> content = {"format": "bitmixer-latency", "version": 1, "layers": times}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "latency.json"
      ...     _ = path.write_text(json.dumps(content))
      ...     latency = load_latency(path, model)
      >>> float(latency([2, 2, 2, 4, 4, 4]))
      9.0
    """
    path, content = read_document(path, "latency", LATENCY_FORMAT, LATENCY_VERSION)
    layers = content.get("layers")
    if not isinstance(layers, Mapping):
        raise UserError(
            f'{path}: "layers" must map each layer name to its seconds by width', "damaged"
        )
    for name in layers:
        if name not in model.names:
            raise UserError(
                f"{path}: unknown layer {shown(name)}{closest(name, model.names)}", "unknown-name"
            )
    rows = []
    for name in model.names:
        times = layers.get(name)
        if not isinstance(times, Mapping):
            raise UserError(f"{path}: no seconds for layer {name!r}", "other-network")
        missing = [b for b in model.space.choices if str(b) not in times]
        if missing:
            raise UserError(
                f"{path}: layer {name!r} has no seconds at {missing[0]} bits", "other-network"
            )
        rows.append([_seconds(path, name, times[str(b)]) for b in model.space.choices])
    content = new_keys(content, {"ends": "first_last_layers"})
    seconds = content.get("first_last_layers", 0.0)
    return Cost(
        name="latency_ms",
        unit="ms",
        choices=model.space.choices,
        table=1e3 * np.asarray(rows, np.float64),
        first_last_layers=1e3 * _seconds(path, "first_last_layers", seconds),
    )


def _seconds(path: pathlib.Path, name: str, value: Any) -> float:
    """Checks that a value in a latency file is a time."""
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise UserError(f"{path}: {name}: {shown(value)} is not a number of seconds", "damaged")
    return float(value)


def describe(model: Network, policy: Any, of: Mapping[str, Cost]) -> list[str]:
    """Returns a Markdown table of the costs of one policy, beside those of the widest policy.

    Args:
      model: a network whose layers have widths.
      policy: ``[L]`` widths in bits.
      of: the costs to show, from `costs`.

    Returns:
      the lines of the table.

    Raises:
      UserError: the policy does not fit the network.

    Examples:
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet8", num_classes=10, width=3, image_shape=(8, 8, 1))
      >>> print(describe(model, [2, 2, 2, 4, 4, 4], costs(model))[2])
      | avg_bits | 3 bits | 75.0% |  |
    """
    widths = model.space.check(policy, model.num_layers)
    widest = model.space.uniform(model.space.widest, model.num_layers)
    rows = ["| cost | this policy | of the widest | with stem and head |", "|---|---|---|---|"]
    for cost in of.values():
        value = float(cost(widths))
        both = value + cost.first_last_layers
        total = f"{both:,.6g} {cost.unit}" if cost.first_last_layers else ""
        share = f"{100 * value / cost.widest:.1f}%" if cost.widest else ""
        rows.append(f"| {cost.name} | {value:,.6g} {cost.unit} | {share} | {total} |")
    peak, most = (float(activation_peak(model, p)) for p in (widths, widest))
    rows.append(f"| activation peak | {peak:,.6g} bytes | {100 * peak / most:.1f}% | |")
    return rows
