"""ONNX for speed: one policy whose convolutions an engine fuses into integer kernels.

Between quantise and dequantise, onnxruntime runs a convolution in int8, with an int32 bias. To be
fused, everything that flows between layers must be of 8 bits too: the real-valued sums of residual
branches as well, which the trained network does not quantise. So this form is another network by
that, and answers differ; `onnx_graph.policy_model` is the one that agrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmixer_jax.export.integer_model import FloatStem, IntegerModel, Kernel, Layer
from bitmixer_jax.export.onnx_builder import Builder, finish, head, oihw, real_ops
from bitmixer_jax.export.onnx_graph import own_codes, places, quantised
from bitmixer_jax.models.graph import Node
from bitmixer_jax.quantizers import integer_range

_OPSET = 19


def stream_ranges(
    network: IntegerModel, policy: np.ndarray, images: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each tensor of the network, on images.

    Args:
      policy: ``[L]``.
      images: uint8 ``[N, H, W, C]``; some hundred of the training data.
    """
    import jax

    from bitmixer_jax.data import normalize
    from bitmixer_jax.export.integer_engine import tensors

    @jax.jit
    def run(images: Any) -> dict[str, Any]:
        made = tensors(network, normalize(images, network.mean, network.std), tuple(policy))
        return {name: (x.min(), x.max()) for name, x in made.items()}

    policy = [int(width) for width in policy]  # type: ignore[assignment]
    found: dict[str, tuple[float, float]] = {}
    for start in range(0, len(images), 50):
        for name, (low, high) in run(images[start : start + 50]).items():
            before = found.get(name, (0.0, 0.0))
            found[name] = (min(before[0], float(low)), max(before[1], float(high)))
    return found


def int8_model(
    network: IntegerModel, policy: np.ndarray, ranges: Mapping[str, tuple[float, float]]
) -> Any:
    """A model of one policy ``[L]`` in 8 bits throughout, an onnx.ModelProto.

    Args:
      ranges: of the tensors between layers, from `stream_ranges`.

    Raises:
      UserError: a policy that does not fit, a pair that training never visited, or onnx is not
        installed.
    """
    policy = network.space.check(policy, len(network.layers))
    network.check_calibrated(policy)
    b, found = Builder(), places(network, policy)
    direct = _direct(network.graph)
    pooled = _read_by(network.graph, "max_pool")
    real = real_ops(b)

    def kept(node: Node, *made: str) -> tuple[str, ...]:
        """The outputs, in 8 bits unless they go straight to a quantiser."""
        return tuple(
            x if name in direct else _stream(b, x, *ranges[name])
            for name, x in zip(node.outputs, made, strict=True)
        )

    def stem(node: Node, x: str) -> Any:
        if isinstance(network.stem, FloatStem):
            return _float_stem(b, network.stem, x)  # in float32, up to the ReLU behind it
        return kept(node, *_layer(b, network, network.stem, x, 0, 0, 8))

    def layer(node: Node, x: str) -> tuple[str, ...]:
        of, before, own = found[node.layer]
        return kept(node, *_layer(b, network, of, x, before, own, network.space.choices[own]))

    def between(op: Any) -> Any:
        return lambda node, *inputs: kept(node, op(node, *inputs))

    def relu(node: Node, x: str) -> Any:
        # Pooling first is the same, and is done in float: engines pool bytes 30 times as slowly.
        return (x,) if node.outputs[0] in pooled else kept(node, real["relu"](node, x))

    def max_pool(node: Node, x: str) -> tuple[str, ...]:
        return kept(node, b.node("Relu", real["max_pool"](node, x)))

    ops: dict[str, Any] = {name: between(op) for name, op in real.items()}
    ops |= {"relu": relu, "max_pool": max_pool}
    # One Q after the ReLU serves the sum before it: engines drop the ReLU.
    ops["add"] = real["add"]
    ops |= {"stem": stem, "layer": layer, "head": lambda node, x: head(b, network, x)}
    return finish(b, network, ops, opset=_OPSET, policy=policy, form="policy, int8 throughout")


def _float_stem(b: Builder, stem: FloatStem, x: str) -> str:
    """The first convolution with its norm in kernel and bias."""
    kernel = b.constant(oihw(stem.kernel * stem.multiplier), name="stem.kernel")
    return b.conv(x, kernel, stem.info, b.constant(stem.offset, name="stem.bias"))


def _readers(graph: tuple[Node, ...]) -> dict[str, list[Node]]:
    readers: dict[str, list[Node]] = {}
    for node in graph:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    return readers


def _read_by(graph: tuple[Node, ...], op: str) -> set[str]:
    """Tensors that nodes of one kind alone read."""
    return {name for name, each in _readers(graph).items() if {node.op for node in each} == {op}}


def _direct(graph: tuple[Node, ...]) -> set[str]:
    """Tensors that layers alone read, at once or behind a ReLU: they are quantised there."""
    readers = _readers(graph)

    def goes_straight(name: str) -> bool:
        each = readers.get(name, [])
        return all(
            node.op == "layer" or (node.op in ("relu", "relu6") and goes_straight(node.outputs[0]))
            for node in each
        )

    return {name for node in graph for name in node.outputs if goes_straight(name)}


def _stream(b: Builder, x: str, low: float, high: float) -> str:
    """A tensor in 8 bits: quantised and dequantised, unsigned if it has one sign."""
    if low >= 0:
        scale, zero = b.constant(max(high, 1e-6) / 255), b.constant(0, np.uint8)
    else:
        scale = b.constant(max(-low, high, 1e-6) / 127)
        zero = b.constant(0, np.int8)
    return str(b.node("DequantizeLinear", b.node("QuantizeLinear", x, scale, zero), scale, zero))


def _layer(
    b: Builder,
    network: IntegerModel,
    layer: Layer,
    x: str,
    before: int,
    own: int,
    bits: int,
) -> tuple[str, ...]:
    """A quantised layer: its outputs, dequantised."""
    signed = layer.info.signed
    step = float(layer.step[own])
    zero = b.constant(0, np.int8 if signed else np.uint8)
    codes = b.node(
        "DequantizeLinear", quantised(b, x, layer.step[own], bits, signed), b.constant(step), zero
    )
    outputs = []
    for kernel in layer.kernels:
        name = f"{layer.info.name}.{kernel.info.name}"
        weights, scale, bias = _integers(network, layer, kernel, before, own, bits)
        if weights is None:
            outputs.append(_in_float(b, network, kernel, codes, step, before, own, name))
            continue
        w = b.node(
            "DequantizeLinear",
            b.constant(weights, np.int8, name=name),
            b.constant(scale / step, name=f"{name}.scale"),
            b.constant(np.zeros(len(scale)), np.int8),
            axis=0,
        )
        offset = b.node(
            "DequantizeLinear",
            b.constant(bias, np.int32, name=f"{name}.bias"),
            b.constant(scale, name=f"{name}.bias_scale"),
            b.constant(np.zeros(len(scale)), np.int32),
            axis=0,
        )
        outputs.append(b.conv(codes, w, kernel.info, offset, name=f"{name}.out"))
    return tuple(outputs)


def _integers(
    network: IntegerModel, layer: Layer, kernel: Kernel, before: int, own: int, bits: int
) -> tuple[Any, np.ndarray, np.ndarray]:
    """Weights int8 ``[O, I, kh, kw]``, scale ``[O]`` of their sums and bias int32 ``[O]``.

    Narrow codes leave room in int8: they are multiplied to fill it, so that the bias, a whole
    number of sums, is the finer. No weights where they do not fit.
    """
    is_stem = layer is network.stem
    # The stem's 8-bit codes start at -128, which has no positive counterpart; -127 is as good.
    codes = kernel.codes[0] if is_stem else own_codes(network, kernel, own)
    whole = oihw(np.asarray(codes, np.int32))
    whole = np.maximum(whole, -127) if is_stem else whole
    unit = 1.0
    if not is_stem and network.weight_quantizer == "floor":
        whole, unit = 2 * whole + 1, 0.5
    multiplier = kernel.multiplier[before, own].astype(np.float64)
    offset = kernel.offset[before, own].astype(np.float64)
    whole = np.where(multiplier < 0, -1, 1)[:, None, None, None] * whole
    # Engines without dot products of bytes add pairs of them in 16 bits.
    most = min(127, 16383 // max(abs(v) for v in integer_range(bits, layer.info.signed)))
    if np.abs(whole).max() > most:
        return None, multiplier, offset
    room = max(1, most // max(1, int(np.abs(whole).max())))
    scale = np.abs(multiplier) * unit / room
    smallest = np.maximum(np.abs(offset), 1e-30) / 2**30
    dead = scale < smallest  # a multiplier of nothing: the offset alone is left
    scale = np.where(dead, smallest, scale)
    whole = np.where(dead[:, None, None, None], 0, whole * room)
    return whole.astype(np.int8), scale.astype(np.float32), np.rint(offset / scale)


def _in_float(
    b: Builder,
    network: IntegerModel,
    kernel: Kernel,
    codes: str,
    step: float,
    before: int,
    own: int,
    name: str,
) -> str:
    """Weights that int8 cannot hold (8 bits that end in a half) are multiplied in float."""
    stored = b.constant(oihw(own_codes(network, kernel, own)), np.int8, name=name)
    weights = b.node("Cast", stored, to=b._onnx.TensorProto.FLOAT)
    weights = b.node("Add", weights, b.constant(network.half))
    sums = b.conv(codes, weights, kernel.info)
    scaled = b.node("Mul", sums, b.channels(kernel.multiplier[before, own] / step))
    return str(b.node("Add", scaled, b.channels(kernel.offset[before, own])))
