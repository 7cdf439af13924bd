"""What a policy costs: BitOPs, bytes, average bits, or a latency measured elsewhere.

Every cost but the peak of activation memory is a sum over layers of a number that depends on the
layer's own width, so a cost is a table ``[L, n]``, and the cost of many policies is one lookup.
The tables follow from ``model.layers`` alone. Stem and head have no width to choose; budgets and
searches leave them out, and `Cost.first_last_layers` says what they add.
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
    """A cost of policies: ``cost(policies)``.

    Attributes:
      name: a key of `costs`.
      unit: of the values.
      choices: widths that the columns of the table stand for.
      table: float64 ``[L, n]``, what a layer costs at each width; a policy costs the sum,
      divisor: over this (whole numbers in the table keep averages exact).
      first_last_layers: what stem and head add, which the call leaves out.
    """

    name: str
    unit: str
    choices: tuple[int, ...]
    table: np.ndarray
    divisor: float = 1.0
    first_last_layers: float = 0.0

    def __call__(self, policies: Any) -> np.ndarray:
        """Cost of each policy, stem and head left out: float64 ``[M]`` for ``[M, L]`` widths.

        One policy ``[L]`` gives a scalar array.
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
        """The least and the most that a policy can cost."""
        low, high = self.table.min(1).sum(), self.table.max(1).sum()
        return float(low / self.divisor), float(high / self.divisor)

    @property
    def widest(self) -> float:
        """What the policy of the widest width everywhere costs: 100% in budgets."""
        return float(self.table[:, -1].sum() / self.divisor)


def costs(model: Network, latency: str | pathlib.Path | None = None) -> dict[str, Cost]:
    """The costs of a network's policies by name.

    ================  =========  ===================================================================
    avg_bits          bits       mean width of the layers
    avg_weight_bits   bits       mean width of the weights: layers count by their parameters
    bitops            BitOPs     sum of MACs x weight bits x activation bits, for one image
    bytes             bytes      weights packed as bit-planes, each plane of a kernel a whole number
                                 of bytes ("double" weights read one plane more than their width)
    activation_bytes  bytes      inputs of all layers, packed at their widths, for one image
    latency_ms        ms         from a table measured elsewhere
    ================  =========  ===================================================================

    Convention: `Cost.table` covers the layers that have a width. `Cost.first_last_layers` is what
    stem and head add: BitOPs at 32 x 32 bits and 4 bytes a weight if they are real-valued,
    8 x 8 bits and 1 byte if they are int8 (biases: 4 bytes). Batch-norm tables, step sizes and
    the additions of residual branches are not counted.

    Args:
      model: a switchable network.
      latency: a latency file (`load_latency`).

    Raises:
      UserError: a float twin, or a latency file that does not fit.
    """
    bits = np.asarray(model.space.choices, np.float64)
    layers = model.layers
    one = np.ones((len(layers), 1))
    macs = np.asarray([layer.macs for layer in layers], np.float64)[:, None]
    params = np.asarray([layer.params for layer in layers], np.float64)[:, None]
    planes = np.asarray(
        [sum(math.ceil(kernel.params / 8) for kernel in layer.kernels) for layer in layers]
    )[:, None]
    read = np.asarray([model.quant.quantizer.planes(b, model.space) for b in model.space.choices])
    inputs = np.asarray([math.prod(layer.input) for layer in layers], np.float64)[:, None]
    end_bits = 8 if model.first_last_layers == "int8" else 32
    end_weights = model.stem_conv.params + model.features * model.num_classes
    end_macs = model.stem_conv.macs + model.features * model.num_classes
    end_inputs = math.prod(model.image_shape) + model.features
    end_bytes = end_weights * end_bits / 8 + 4 * model.num_classes
    end_codes = math.ceil(end_inputs * end_bits / 8)
    rows = {
        "avg_bits": ("bits", one * bits, len(layers), 0.0),
        "avg_weight_bits": ("bits", params * bits, params.sum(), 0.0),
        "bitops": ("BitOPs", macs * bits**2, 1.0, end_macs * end_bits**2),
        "bytes": ("bytes", planes * read.astype(float), 1.0, end_bytes),
        "activation_bytes": ("bytes", np.ceil(inputs * bits / 8), 1.0, end_codes),
    }
    found = {
        name: Cost(
            name=name,
            unit=unit,
            choices=model.space.choices,
            table=table,
            divisor=float(divisor),
            first_last_layers=float(fixed),
        )
        for name, (unit, table, divisor, fixed) in rows.items()
    }
    if latency is not None:
        found["latency_ms"] = load_latency(latency, model)
    return found


def activation_peak(model: Network, policies: Any) -> np.ndarray:
    """Most bytes of activations held at once while one image runs: float64 ``[M]``.

    Convention: while a layer runs there are its input, packed at its own width, and its output,
    packed at the width of the layer that reads it (the head: 32 bits, or 8 if int8). Accumulators
    and the real-valued tensor that a residual branch carries past its block are not counted.

    Args:
      policies: ``[M, L]`` widths, or one policy ``[L]``.
    """
    bits = np.asarray(policies, np.float64)
    end = np.full((*bits.shape[:-1], 1), 8.0 if model.first_last_layers == "int8" else 32.0)
    after = np.concatenate([bits[..., 1:], end], axis=-1)
    inputs = np.asarray([math.prod(layer.input) for layer in model.layers])
    outputs = np.asarray([math.prod(layer.kernels[0].output) for layer in model.layers])
    return np.max(np.ceil(inputs * bits / 8) + np.ceil(outputs * after / 8), axis=-1)


def load_latency(path: str | pathlib.Path, model: Network) -> Cost:
    """Reads a latency file: the cost "latency_ms".

    The file is ``{"format": "bitmixer-latency", "version": 1, "layers": {NAME: {"2": SECONDS,
    "3": ..., ...}, ...}, "first_last_layers": SECONDS}``: seconds that a layer takes at
    each width, and what stem and head take (optional). Further keys (device, threads, date)
    are yours.

    Raises:
      UserError: no such file, not a latency file, or layers, widths or numbers that do not fit.
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
    fixed = content.get("first_last_layers", 0.0)
    fixed = _seconds(path, "first_last_layers", fixed)
    return Cost(
        name="latency_ms",
        unit="ms",
        choices=model.space.choices,
        table=1e3 * np.asarray(rows, np.float64),
        first_last_layers=1e3 * fixed,
    )


def _seconds(path: pathlib.Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise UserError(f"{path}: {name}: {shown(value)} is not a number of seconds", "damaged")
    return float(value)


def describe(model: Network, policy: Any, of: Mapping[str, Cost]) -> list[str]:
    """A Markdown table of what one policy ``[L]`` costs, beside the widest."""
    widths = model.space.check(policy, model.num_layers)
    rows = ["| cost | this policy | of the widest | with stem and head |", "|---|---|---|---|"]
    for cost in of.values():
        value = float(cost(widths))
        both = (
            f"{value + cost.first_last_layers:,.6g} {cost.unit}" if cost.first_last_layers else ""
        )
        share = f"{100 * value / cost.widest:.1f}%" if cost.widest else ""
        rows.append(f"| {cost.name} | {value:,.6g} {cost.unit} | {share} | {both} |")
    peak, most = (
        float(activation_peak(model, p))
        for p in (widths, model.space.uniform(model.space.widest, model.num_layers))
    )
    rows.append(f"| activation peak | {peak:,.6g} bytes | {100 * peak / most:.1f}% | |")
    return rows
