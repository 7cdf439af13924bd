"""ONNX for speed: one policy, whose convolutions an engine runs as fused integer kernels.

Between quantise and dequantise, onnxruntime runs a convolution in int8, with an int32 bias. It does
so only if everything that passes between layers has 8 bits, also the sums of residual branches,
which the trained network does not quantise. So answers differ from those of the trained network;
`onnx_graph.policy_model` gives the same answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmixer_jax.export.integer_model import FloatStem, IntegerModel, Kernel, Layer
from bitmixer_jax.export.onnx_builder import Builder, finish, head, oihw, real_ops
from bitmixer_jax.export.onnx_graph import quantised
from bitmixer_jax.models.graph import Node
from bitmixer_jax.quantizers import integer_range

_OPSET = 19


def stream_ranges(
    network: IntegerModel, policy: np.ndarray, images: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Finds the smallest and the largest value of each tensor of the network, on images.

    Args:
      network: the integers.
      policy: ``[L]`` widths.
      images: uint8 ``[N, H, W, C]``; some hundred of the training data.

    Returns:
      (smallest, largest) by name of the tensor; the range contains 0.
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
            so_far = found.get(name, (0.0, 0.0))
            found[name] = (min(so_far[0], float(low)), max(so_far[1], float(high)))
    return found


def int8_model(
    network: IntegerModel, policy: np.ndarray, ranges: Mapping[str, tuple[float, float]]
) -> Any:
    """Makes an ONNX model of one policy in 8 bits throughout.

    Args:
      network: the integers.
      policy: ``[L]`` widths.
      ranges: of the tensors between layers, from `stream_ranges`.

    Returns:
      an onnx.ModelProto.

    Raises:
      UserError: a policy that does not fit, a pair that training never used, or onnx is not
        installed.
    """
    policy = network.space.check(policy, len(network.layers))
    network.check_calibrated(policy)
    b, layers = Builder(), network.pairs(policy)
    direct = _direct(network.graph)
    pooled = _read_by(network.graph, "max_pool")
    real = real_ops(b)

    def kept(node: Node, *made: str) -> tuple[str, ...]:
        """Returns the outputs, quantised to 8 bits unless only quantisers read them."""
        return tuple(
            x if name in direct else _stream(b, x, *ranges[name])
            for name, x in zip(node.outputs, made, strict=True)
        )

    def stem(node: Node, x: str) -> Any:
        if isinstance(network.stem, FloatStem):
            return _float_stem(b, network.stem, x)  # in float32, up to the ReLU behind it
        return kept(node, *_layer(b, network, network.stem, x, (0, 0)))

    def layer(node: Node, x: str) -> tuple[str, ...]:
        of, pair = layers[node.layer]
        return kept(node, *_layer(b, network, of, x, pair))

    def between(op: Any) -> Any:
        return lambda node, *inputs: kept(node, op(node, *inputs))

    def relu(node: Node, x: str) -> Any:
        # Pooling before the ReLU gives the same, in float: engines pool bytes 30 times as slowly.
        return (x,) if node.outputs[0] in pooled else kept(node, real["relu"](node, x))

    def max_pool(node: Node, x: str) -> tuple[str, ...]:
        return kept(node, b.node("Relu", real["max_pool"](node, x)))

    ops: dict[str, Any] = {name: between(op) for name, op in real.items()}
    ops |= {"relu": relu, "max_pool": max_pool}
    # The quantisation after the ReLU also serves the sum in front of it: engines drop the ReLU.
    ops["add"] = real["add"]
    ops |= {"stem": stem, "layer": layer, "head": lambda node, x: head(b, network, x)}
    return finish(b, network, ops, opset=_OPSET, policy=policy, format="policy, int8 throughout")


def _float_stem(b: Builder, stem: FloatStem, x: str) -> str:
    """Adds the first convolution, with its batch norm folded into kernel and bias."""
    kernel = b.constant(oihw(stem.kernel * stem.multiplier), name="stem.kernel")
    return b.conv(x, kernel, stem.info, b.constant(stem.offset, name="stem.bias"))


def _readers(graph: tuple[Node, ...]) -> dict[str, list[Node]]:
    """Returns the nodes that read each tensor."""
    readers: dict[str, list[Node]] = {}
    for node in graph:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    return readers


def _read_by(graph: tuple[Node, ...], op: str) -> set[str]:
    """Returns the tensors that only nodes of one kind read."""
    return {name for name, each in _readers(graph).items() if {node.op for node in each} == {op}}


def _direct(graph: tuple[Node, ...]) -> set[str]:
    """Returns the tensors that only layers read, at once or behind a ReLU: layers quantise them."""
    readers = _readers(graph)

    def goes_straight(name: str) -> bool:
        each = readers.get(name, [])
        return all(
            node.op == "layer" or (node.op in ("relu", "relu6") and goes_straight(node.outputs[0]))
            for node in each
        )

    return {name for node in graph for name in node.outputs if goes_straight(name)}


def _stream(b: Builder, x: str, low: float, high: float) -> str:
    """Adds the quantisation of a tensor to 8 bits and back; unsigned if it is never negative."""
    if low >= 0:
        scale, zero = b.constant(max(high, 1e-6) / 255), b.constant(0, np.uint8)
    else:
        scale = b.constant(max(-low, high, 1e-6) / 127)
        zero = b.constant(0, np.int8)
    return str(b.node("DequantizeLinear", b.node("QuantizeLinear", x, scale, zero), scale, zero))


def _layer(
    b: Builder, network: IntegerModel, layer: Layer, x: str, pair: tuple[int, int]
) -> tuple[str, ...]:
    """Adds a quantised layer at a pair (row and column of its tables) and returns its outputs."""
    signed, own = layer.info.signed, pair[1]
    bits = network.widths_of(layer)[1].choices[own]
    step_size = float(layer.step_size[own])
    zero = b.constant(0, np.int8 if signed else np.uint8)
    codes = b.node(
        "DequantizeLinear",
        quantised(b, x, layer.step_size[own], bits, signed),
        b.constant(step_size),
        zero,
    )
    outputs = []
    for kernel in layer.kernels:
        name = f"{layer.info.name}.{kernel.info.name}"
        weights, scale, bias = _integers(network, layer, kernel, pair)
        if weights is None:
            outputs.append(_in_float(b, network, layer, kernel, codes, pair, name))
            continue
        w = b.node(
            "DequantizeLinear",
            b.constant(weights, np.int8, name=name),
            b.constant(scale / step_size, name=f"{name}.scale"),
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
    network: IntegerModel, layer: Layer, kernel: Kernel, pair: tuple[int, int]
) -> tuple[Any, np.ndarray, np.ndarray]:
    """Returns weights int8 ``[O, I, kh, kw]``, scale ``[O]`` of their sums, and bias int32 ``[O]``.

    Narrow codes are multiplied to fill int8. The bias is a whole number of sums, so it then has a
    finer grid. The weights are None if they do not fit into int8.
    """
    quantizer, space, _ = network.widths_of(layer)
    whole, unit = oihw(np.asarray(network.codes_at(layer, kernel, pair[1]), np.int32)), 1.0
    if layer is network.stem:
        # The stem's 8-bit codes start at -128, which has no positive counterpart; -127 is as good.
        whole = np.maximum(whole, -127)
    if quantizer.half:
        whole, unit = 2 * whole + 1, 0.5
    multiplier = kernel.multiplier[pair].astype(np.float64)
    offset = kernel.offset[pair].astype(np.float64)
    whole = np.where(multiplier < 0, -1, 1)[:, None, None, None] * whole
    # Engines without dot products of bytes add pairs of them in 16 bits.
    limits = integer_range(space.choices[pair[1]], layer.info.signed)
    most = min(127, 16383 // max(abs(v) for v in limits))
    if np.abs(whole).max() > most:
        return None, multiplier, offset
    room = max(1, most // max(1, int(np.abs(whole).max())))
    scale = np.abs(multiplier) * unit / room
    smallest = np.maximum(np.abs(offset), 1e-30) / 2**30
    dead = scale < smallest  # a multiplier of almost zero: only the offset counts
    scale = np.where(dead, smallest, scale)
    whole = np.where(dead[:, None, None, None], 0, whole * room)
    return whole.astype(np.int8), scale.astype(np.float32), np.rint(offset / scale)


def _in_float(
    b: Builder,
    network: IntegerModel,
    layer: Layer,
    kernel: Kernel,
    codes: str,
    pair: tuple[int, int],
    name: str,
) -> str:
    """Adds a convolution in float, for weights of 8 bits and a half: int8 cannot hold them."""
    own = pair[1]
    stored = b.constant(oihw(network.codes_at(layer, kernel, own)), np.int8, name=name)
    weights = b.node("Cast", stored, to=b._onnx.TensorProto.FLOAT)
    weights = b.node("Add", weights, b.constant(network.widths_of(layer)[0].half))
    sums = b.conv(codes, weights, kernel.info)
    step_size = float(layer.step_size[own])
    scaled = b.node("Mul", sums, b.channels(kernel.multiplier[pair] / step_size))
    return str(b.node("Add", scaled, b.channels(kernel.offset[pair])))
