"""ONNX with standard operators: one policy, or all of them with the policy as an input.

Both models take ``images`` uint8 ``[batch, H, W, C]`` as an image file holds them and give
``logits`` float32 ``[batch, K]``; docs/onnx.md has the rest. Weights are integers in the file. An
engine convolves codes as whole numbers in float32, which is exact, so any engine gives the answers
of the trained network. `onnx_int8.int8_model` is faster.
"""

from __future__ import annotations

import pathlib
from functools import partial
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.export.integer_model import FloatStem, IntegerModel, Kernel, Layer
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


def policy_model(network: IntegerModel, policy: np.ndarray, storage_dtype: str = "int8") -> Any:
    """Makes an ONNX model of one policy.

    Inputs of layers pass QuantizeLinear and DequantizeLinear, and weights are integers. The batch
    norm of the pair in use is one multiplier and one offset for each channel.

    Args:
      network: the integers.
      policy: ``[L]`` widths.
      storage_dtype: type that holds the weights of a layer: "int8"; "int4" (opset 21) for layers
        of up to 4 bits; "int2" (opset 25) for layers of 2 bits, and "int4" for those of 3 and 4.
        Wider layers stay in int8.

    Returns:
      an onnx.ModelProto.

    Raises:
      UserError: an unknown storage_dtype or policy, a pair that training never used, or onnx is
        not installed.
    """
    if storage_dtype not in STORAGE_DTYPES:
        raise UserError(f"storage_dtype {storage_dtype!r}: choose from {', '.join(STORAGE_DTYPES)}")
    policy = network.space.check(policy, len(network.layers))
    network.check_calibrated(policy)
    b, layers = Builder(), network.pairs(policy)
    least, opset = STORAGE_DTYPES[storage_dtype]

    def layer(node: Node, x: str) -> tuple[str, ...]:
        of, pair = layers[node.layer]
        return _layer(b, network, of, x, pair, least)

    ops = {**real_ops(b), "stem": _stem(b, network), "layer": layer}
    ops["head"] = lambda node, x: head(b, network, x)
    return finish(b, network, ops, opset=opset, policy=policy, format=f"policy, {storage_dtype}")


def _stem(b: Builder, network: IntegerModel) -> Any:
    stem = network.stem
    if isinstance(stem, FloatStem):
        return lambda node, x: float_stem(b, stem, x)
    return lambda node, x: _layer(b, network, stem, x, (0, 0), 8)


def _layer(
    b: Builder, network: IntegerModel, layer: Layer, x: str, pair: tuple[int, int], least: int
) -> tuple[str, ...]:
    """Adds a quantised layer and returns its outputs, float32.

    Args:
      pair: row and column of its tables; the column is the index of its width.
      least: bits of the smallest type that may hold weights.
    """
    own = pair[1]
    quantizer, space, _ = network.widths_of(layer)
    bits = space.choices[own]
    codes = quantised(b, x, layer.step_size[own], bits, layer.info.signed)
    codes = b.node("DequantizeLinear", codes, b.constant(1.0))
    outputs = []
    for kernel in layer.kernels:
        integers = oihw(network.codes_at(layer, kernel, own))
        name = f"{layer.info.name}.{kernel.info.name}"
        storage_dtype = 8 if bits > 4 else max(least, 2 if bits == 2 else 4)
        if storage_dtype == 8:
            stored = b.constant(integers, np.int8, name=name)
        else:
            stored = b.small_integers(integers, storage_dtype, name)
        # onnxruntime computes a Cast when it loads the model, a DequantizeLinear in each call.
        weights = b.node("Cast", stored, to=b._onnx.TensorProto.FLOAT)
        if quantizer.half:
            weights = b.node("Add", weights, b.constant(quantizer.half))
        sums = b.conv(codes, weights, kernel.info, name=f"{name}.sums")
        # Not a constant to onnxruntime, which would multiply it into the weights: sums stay exact.
        ones = b.constant(np.ones((kernel.info.shape[-1], 1, 1)), np.int8)
        scale = b.constant(kernel.multiplier[pair])
        scaled = b.node("Mul", sums, b.node("DequantizeLinear", ones, scale, axis=0))
        outputs.append(b.node("Add", scaled, b.channels(kernel.offset[pair])))
    return tuple(outputs)


def quantised(b: Builder, x: str, step_size: Any, bits: int, signed: bool) -> str:
    """Adds the quantisation of ``x`` and returns its codes, in int8 if signed, else uint8."""
    dtype = np.int8 if signed else np.uint8
    zero = b.constant(0, dtype)
    codes = b.node("QuantizeLinear", x, b.constant(step_size), zero)
    if bits == 8:  # the type clips codes of 8 bits; narrower ones are clipped here
        return str(codes)
    low, high = integer_range(bits, signed)
    return str(b.node("Clip", codes, b.constant(low, dtype), b.constant(high, dtype)))


def switchable_model(network: IntegerModel) -> Any:
    """Makes an ONNX model of all policies: its second input is ``policy`` int64 ``[L]``, widths.

    It holds the integer codes of a kernel once (once for each width if the quantiser is not
    nested). The graph truncates them: it has a branch for each width, whose weights an engine may
    compute when it loads the model. A width that is not a choice gives NaN for all logits.

    Returns:
      an onnx.ModelProto.

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
        limits = [integer_range(bits, of.info.signed) for bits in space.choices]
        codes = b.node("Mul", x, table(1 / of.step_size, own))
        low, high = (table(limit, own) for limit in zip(*limits, strict=True))
        codes = b.node("Clip", b.node("Round", codes), low, high)
        outputs = []
        for kernel in of.kernels:
            name = f"{of.info.name}.{kernel.info.name}"
            branches = [partial(sums_at, codes, kernel, name, i) for i in range(n)]
            sums = b.choose(own, branches, f"{name}.sums")
            rows, row = len(kernel.count), own  # of the tables as [P n, C]
            if rows > 1:
                predecessor = of.info.norm_row(index, rows)
                row = b.node("Add", b.node("Mul", predecessor, b.constant(n, np.int64)), own)
            shape = (-1, kernel.info.shape[-1], 1, 1)
            multiplier = table(kernel.multiplier.reshape(shape), row, f"{name}.multiplier")
            offset = table(kernel.offset.reshape(shape), row, f"{name}.offset")
            outputs.append(b.node("Add", b.node("Mul", sums, multiplier), offset))
        return tuple(outputs)

    def sums_at(codes: str, kernel: Kernel, name: str, i: int, branch: Builder) -> str:
        """Adds the convolution at choice ``i``; its weights depend on constants alone."""
        return branch.conv(codes, weights_at(branch, kernel, i, name), kernel.info)

    def weights_at(branch: Builder, kernel: Kernel, i: int, name: str) -> str:
        """Adds the weights at choice ``i``, float32 ``[O, I, kh, kw]``: codes, in whole or half."""
        node, constant = branch.node, branch.constant
        quantizer, to = network.quantizer, branch._onnx.TensorProto.FLOAT
        name = name if quantizer.nested else f"{name}.{space.choices[i]}bits"
        integers = oihw(kernel.codes[0 if quantizer.nested else i])
        codes = node("Cast", constant(integers, np.int8, name=name), to=to)
        if quantizer.nested:  # truncated by arithmetic: ONNX shifts unsigned integers alone
            shift = network.code_bits - space.choices[i]
            codes = node("Mul", codes, constant(2.0**-shift))
            if not quantizer.truncation_rounds:
                codes = node("Floor", codes)
            elif shift:
                top = constant(integer_range(space.choices[i], True)[1])
                codes = node("Min", node("Floor", node("Add", codes, constant(0.5))), top)
        return str(node("Add", codes, constant(quantizer.half)) if quantizer.half else codes)

    def last(node: Node, x: str) -> str:
        valid = b.node("Cast", known, to=b._onnx.TensorProto.BOOL)
        zero, nan = b.constant(0.0), b.constant(np.nan)
        return str(b.node("Add", head(b, network, x), b.node("Where", valid, zero, nan)))

    ops = {**real_ops(b), "stem": _stem(b, network), "layer": layer, "head": last}
    return finish(b, network, ops, opset=19, policy=None, format="switchable")


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
