"""ONNX with standard operators: one policy, or all of them with the policy as an input.

Both take ``images`` uint8 ``[batch, H, W, C]`` as an image file holds them and give ``logits``
float32 ``[batch, K]``; docs/onnx.md has the rest. Integer weights stay integers in the file; codes
are convolved as whole numbers in float32, which is exact, so any engine gives the trained
network's answers. For speed there is `onnx_int8.int8_model`.
"""

from __future__ import annotations

import pathlib
from functools import partial
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.export.integer_model import FloatStem, IntegerModel, Kernel, Layer, truncate_bits
from bitmixer_jax.export.onnx_builder import (
    Builder,
    finish,
    float_stem,
    head,
    need_onnx,
    oihw,
    real_ops,
)
from bitmixer_jax.export.onnx_seal import add_seal, seal
from bitmixer_jax.files import write_new
from bitmixer_jax.models.graph import Node
from bitmixer_jax.quantizers import integer_range

STORAGE_DTYPES = {"int8": (8, 19), "int4": (4, 21), "int2": (2, 25)}  # bits, opset


def own_codes(network: IntegerModel, kernel: Kernel, own: int) -> np.ndarray:
    """Integer weight codes int8 ``[kh, kw, I, O]`` at choice ``own``."""
    if network.weight_quantizer == "independent":
        return kernel.codes[own]
    shift = network.code_bits - network.space.choices[own]
    return np.asarray(
        truncate_bits(kernel.codes[0], shift, network.weight_quantizer, network.code_bits)
    )


def places(network: IntegerModel, policy: np.ndarray) -> dict[str, tuple[Layer, int, int]]:
    """By name: a layer, the index of the width before it (0: it has no say), and of its own."""
    index = np.searchsorted(network.space.choices, policy)
    found = {}
    for layer, own in zip(network.layers, index, strict=True):
        before = layer.info.predecessor
        transitional = before >= 0 and len(layer.kernels[0].count) > 1
        found[layer.info.name] = (layer, int(index[before]) if transitional else 0, int(own))
    return found


def policy_model(network: IntegerModel, policy: np.ndarray, storage_dtype: str = "int8") -> Any:
    """A model of one policy ``[L]``, an onnx.ModelProto.

    Inputs pass QuantizeLinear and DequantizeLinear, weights are integers; the batch norm of the
    pair in use is one multiplier and one offset per channel.

    Args:
      storage_dtype: type that holds a layer's weights: "int8", "int4" (opset 21; takes layers
        of up to 4 bits), or "int2" (opset 25; for layers of 2 bits, the others as with "int4").
        Wider layers
        stay in int8.

    Raises:
      UserError: an unknown storage_dtype or policy, a pair that training never visited, or
        onnx is not installed.
    """
    if storage_dtype not in STORAGE_DTYPES:
        raise UserError(f"storage_dtype {storage_dtype!r}: choose from {', '.join(STORAGE_DTYPES)}")
    policy = network.space.check(policy, len(network.layers))
    network.check_calibrated(policy)
    b, found = Builder(), places(network, policy)
    least, opset = STORAGE_DTYPES[storage_dtype]

    def layer(node: Node, x: str) -> tuple[str, ...]:
        of, before, own = found[node.layer]
        return _layer(b, network, of, x, before, own, network.space.choices[own], least)

    ops = {**real_ops(b), "stem": _stem(b, network), "layer": layer}
    ops["head"] = lambda node, x: head(b, network, x)
    return finish(b, network, ops, opset=opset, policy=policy, form=f"policy, {storage_dtype}")


def _stem(b: Builder, network: IntegerModel) -> Any:
    stem = network.stem
    if isinstance(stem, FloatStem):
        return lambda node, x: float_stem(b, stem, x)
    return lambda node, x: _layer(b, network, stem, x, 0, 0, 8, 8, "independent")


def _layer(
    b: Builder,
    network: IntegerModel,
    layer: Layer,
    x: str,
    before: int,
    own: int,
    bits: int,
    least: int,
    kind: str = "",
) -> tuple[str, ...]:
    """A quantised layer at one width: its outputs, float32."""
    kind = kind or network.weight_quantizer
    codes = quantised(b, x, layer.step[own], bits, layer.info.signed)
    codes = b.node("DequantizeLinear", codes, b.constant(1.0))
    outputs = []
    for kernel in layer.kernels:
        of = kernel.codes[0] if layer is network.stem else own_codes(network, kernel, own)
        name = f"{layer.info.name}.{kernel.info.name}"
        storage_dtype = 8 if bits > 4 else max(least, 2 if bits == 2 else 4)
        if storage_dtype == 8:
            stored = b.constant(oihw(of), np.int8, name=name)
        else:
            stored = b.small_integers(oihw(of), storage_dtype, name)
        # onnxruntime computes a Cast when it loads the model, a DequantizeLinear in each call.
        weights = b.node("Cast", stored, to=b._onnx.TensorProto.FLOAT)
        if kind == "floor":
            weights = b.node("Add", weights, b.constant(0.5))
        sums = b.conv(codes, weights, kernel.info, name=f"{name}.sums")
        # Not a constant to onnxruntime, which would multiply it into the weights: sums stay exact.
        ones = b.constant(np.ones((kernel.info.shape[-1], 1, 1)), np.int8)
        scale = b.constant(kernel.multiplier[before, own])
        scaled = b.node("Mul", sums, b.node("DequantizeLinear", ones, scale, axis=0))
        outputs.append(b.node("Add", scaled, b.channels(kernel.offset[before, own])))
    return tuple(outputs)


def quantised(b: Builder, x: str, step: Any, bits: int, signed: bool) -> str:
    """Codes of ``x`` in (u)int8; those of fewer than 8 bits are clipped, as the type does not."""
    dtype = np.int8 if signed else np.uint8
    zero = b.constant(0, dtype)
    codes = b.node("QuantizeLinear", x, b.constant(step), zero)
    if bits == 8:
        return str(codes)
    low, high = integer_range(bits, signed)
    return str(b.node("Clip", codes, b.constant(low, dtype), b.constant(high, dtype)))


def switchable_model(network: IntegerModel) -> Any:
    """A model of all policies: its second input is ``policy`` int64 ``[L]``, widths.

    One set of int8 weights for all widths (one per width if the quantiser is not nested), cut down
    in the graph: a branch for each width, whose weights an engine may compute when it loads the
    model. A width that is not a choice gives NaN for all logits.

    Raises:
      UserError: onnx is not installed.
    """
    b, space = Builder(), network.space
    n = space.n
    choices = b.constant([space.choices], np.int64)
    asked = b.node("Unsqueeze", "policy", b.constant([1], np.int64))
    equal = b.node("Cast", b.node("Equal", asked, choices), to=b._onnx.TensorProto.INT32)
    indices = b.node("ArgMax", equal, axis=1, keepdims=0)
    known = b.node("ReduceMin", b.node("ReduceMax", equal, b.constant([1], np.int64)), keepdims=0)
    number = {layer.info.name: place for place, layer in enumerate(network.layers)}
    index = [
        b.node("Gather", indices, b.constant(place, np.int64), axis=0)
        for place in range(len(network.layers))
    ]

    def table(values: Any, row: str, name: str = "") -> str:
        return str(b.node("Gather", b.constant(values, name=name), row, axis=0))

    def layer(node: Node, x: str) -> tuple[str, ...]:
        of = network.layers[number[node.layer]]
        own = index[number[node.layer]]
        edges = [integer_range(bits, of.info.signed) for bits in space.choices]
        codes = b.node("Mul", x, table(1 / of.step, own))
        low, high = (table(edge, own) for edge in zip(*edges, strict=True))
        codes = b.node("Clip", b.node("Round", codes), low, high)
        outputs = []
        for kernel in of.kernels:
            name = f"{of.info.name}.{kernel.info.name}"
            ways = [partial(sums_at, codes, kernel, name, i) for i in range(n)]
            sums = b.choose(own, ways, f"{name}.sums")
            row = own
            if len(kernel.count) > 1:
                before = index[of.info.predecessor]
                row = b.node("Add", b.node("Mul", before, b.constant(n, np.int64)), own)
            shape = (-1, kernel.info.shape[-1], 1, 1)
            multiplier = table(kernel.multiplier.reshape(shape), row, f"{name}.multiplier")
            offset = table(kernel.offset.reshape(shape), row, f"{name}.offset")
            outputs.append(b.node("Add", b.node("Mul", sums, multiplier), offset))
        return tuple(outputs)

    def sums_at(codes: str, kernel: Kernel, name: str, i: int, branch: Builder) -> str:
        """The convolution at choice ``i``: its weights are of constants alone."""
        return branch.conv(codes, narrow(branch, kernel, i, name), kernel.info)

    def narrow(branch: Builder, kernel: Kernel, i: int, name: str) -> str:
        """Weights float32 ``[O, I, kh, kw]`` at choice ``i``: whole numbers, or halves between."""
        node, constant = branch.node, branch.constant
        kind, to = network.weight_quantizer, branch._onnx.TensorProto.FLOAT
        if kind == "independent":
            name = f"{name}.{space.choices[i]}bits"
            return str(node("Cast", constant(oihw(kernel.codes[i]), np.int8, name=name), to=to))
        stored = constant(oihw(kernel.codes[0]), np.int8, name=name)
        shift = network.code_bits - space.choices[i]
        parts = node("Mul", node("Cast", stored, to=to), constant(2.0**-shift))
        if kind == "floor":
            return str(node("Add", node("Floor", parts), constant(0.5)))
        if not shift:
            return str(parts)
        top = constant(integer_range(space.choices[i], True)[1])
        return str(node("Min", node("Floor", node("Add", parts, constant(0.5))), top))

    def last(node: Node, x: str) -> str:
        valid = b.node("Cast", known, to=b._onnx.TensorProto.BOOL)
        zero, nan = b.constant(0.0), b.constant(np.nan)
        return str(b.node("Add", head(b, network, x), b.node("Where", valid, zero, nan)))

    ops = {**real_ops(b), "stem": _stem(b, network), "layer": layer, "head": last}
    return finish(b, network, ops, opset=19, policy=None, form="switchable")


def save_onnx(path: str | pathlib.Path, model: Any, *, overwrite: bool = False) -> None:
    """Checks a model and writes it, with the checksum of the file in its metadata.

    Raises:
      UserError: the file is there already, or cannot be written.
    """
    onnx = need_onnx()
    onnx.checker.check_model(model, full_check=True)
    sealed = onnx.ModelProto()
    sealed.CopyFrom(model)
    add_seal(sealed)
    write_new(path, seal(sealed.SerializeToString(deterministic=True)), overwrite=overwrite)
