"""Shared parts of ONNX graphs: a builder of nodes, first and last layers, real operations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.export.description import describe
from bitmixer_jax.export.integer_model import FloatStem, IntegerModel
from bitmixer_jax.export.onnx_seal import FORMAT, VERSION
from bitmixer_jax.layer_table import KernelInfo
from bitmixer_jax.models.graph import Node, run_graph


def need_onnx() -> Any:
    """Imports the onnx package and returns it.

    Raises:
      UserError: it is not installed.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.shape_inference
    except ImportError:
        raise UserError(
            "ONNX is not installed: pip install 'bitmixer_jax[onnx]'", "not-installed"
        ) from None
    return onnx


class Builder:
    """Collects the nodes and constants of a graph.

    A tensor is given by its name; between layers tensors are float32 ``[N, C, H, W]``.
    """

    def __init__(self, within: Builder | None = None, prefix: str = "") -> None:
        """Starts an empty graph, or a branch of the graph ``within``, whose constants it shares."""
        self._onnx = need_onnx()
        self._prefix = prefix
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = within.constants if within else {}

    def node(
        self, op: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any
    ) -> Any:
        """Adds a node and returns the name of its output, or a tuple of names."""
        made = name or f"{self._prefix}{op.lower()}_{len(self.nodes)}"
        names = [made] if outputs == 1 else [f"{made}_{i}" for i in range(outputs)]
        self.nodes.append(
            self._onnx.helper.make_node(op, list(inputs), names, name=f"n_{made}", **attributes)
        )
        return names[0] if outputs == 1 else tuple(names)

    def constant(self, value: Any, dtype: Any = np.float32, name: str = "") -> str:
        """Adds a constant and returns its name; equal constants without a name are added once."""
        array = np.asarray(value, dtype)
        if not name:
            name = f"c_{array.dtype}_{array.shape}_{array.tobytes().hex()}"
            if len(name) > 60:
                name = f"c_{len(self.constants)}"
        if name not in self.constants:
            self.constants[name] = self._onnx.numpy_helper.from_array(array, name)
        return name

    def small_integers(self, value: np.ndarray, bits: int, name: str) -> str:
        """Adds a constant of signed integers of 2 or 4 bits, several in a byte."""
        kind = {4: self._onnx.TensorProto.INT4, 2: self._onnx.TensorProto.INT2}[bits]
        tensor = self._onnx.helper.make_tensor(name, kind, value.shape, value.ravel().tolist())
        self.constants[name] = tensor
        return name

    def conv(self, x: str, weights: str, info: KernelInfo, *bias: str, name: str = "") -> str:
        """Adds a convolution with the strides, padding and groups of ``info``."""
        (top, bottom), (left, right) = info.padding
        return str(
            self.node(
                "Conv",
                x,
                weights,
                *bias,
                name=name,
                strides=list(info.strides),
                pads=[top, left, bottom, right],
                group=info.groups,
            )
        )

    def choose(self, index: str, branches: Sequence[Callable[[Builder], str]], name: str) -> str:
        """Adds branches, of which number ``index`` (int64) gives the float32 result.

        Each function gets the builder of its branch. An engine computes what depends on constants
        alone in a branch once, when it loads the model.
        """
        if len(branches) == 1:
            return branches[0](self)
        first = Builder(self, f"{name}.{len(branches)}.")
        rest = Builder(self, f"{name}.{len(branches)}.else.")
        found = branches[0](first)
        after = self.node("Sub", index, self.constant(1, np.int64))
        other = rest.choose(after, branches[1:], name)
        return str(
            self.node(
                "If",
                self.node("Equal", index, self.constant(0, np.int64)),
                name=f"{name}.{len(branches)}",
                then_branch=first._branch(found),
                else_branch=rest._branch(other),
            )
        )

    def _branch(self, result: str) -> Any:
        values = self._onnx.helper.make_tensor_value_info
        made = values(result, self._onnx.TensorProto.FLOAT, None)
        return self._onnx.helper.make_graph(self.nodes, f"{self._prefix}branch", [], [made])

    def channels(self, values: np.ndarray) -> str:
        """Adds a constant ``[C, 1, 1]`` of values ``[C]``."""
        return self.constant(np.asarray(values, np.float32).reshape(-1, 1, 1))


def oihw(kernel: np.ndarray) -> np.ndarray:
    """Returns a kernel ``[kh, kw, I, O]`` as ONNX stores it, ``[O, I, kh, kw]``."""
    return np.ascontiguousarray(np.moveaxis(kernel, (0, 1, 2, 3), (2, 3, 1, 0)))


def real_ops(b: Builder) -> dict[str, Callable[..., str]]:
    """Returns functions that add the operations between layers, by op (`models.graph.Node`)."""

    def shortcut(node: Node, x: str) -> str:
        stops = b.constant([np.iinfo(np.int64).max] * 2, np.int64)
        starts, axes = b.constant([0, 0], np.int64), b.constant([2, 3], np.int64)
        steps = b.constant([node.stride] * 2, np.int64)
        some = b.node("Slice", x, starts, stops, axes, steps)
        # The number of zero channels depends on the number of channels that x has.
        have = b.node("Gather", b.node("Shape", some), b.constant(1, np.int64), axis=0)
        more = b.node("Sub", b.constant(node.channels, np.int64), have)
        unsqueezed = b.node("Unsqueeze", more, b.constant([0], np.int64))
        zeros = b.constant([0] * 5, np.int64)
        pads = b.node("Concat", zeros, unsqueezed, b.constant([0, 0], np.int64), axis=0)
        return str(b.node("Pad", some, pads, b.constant(0.0)))

    return {
        "relu": lambda node, x: b.node("Relu", x),
        "relu6": lambda node, x: b.node("Clip", x, b.constant(0.0), b.constant(6.0)),
        "max_pool": lambda node, x: b.node(
            "MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4
        ),
        "shortcut": shortcut,
        "add": lambda node, x, y: b.node("Add", x, y),
    }


def normalised(b: Builder, network: IntegerModel) -> str:
    """Adds the normalisation of the input ``images`` uint8 ``[N, H, W, C]``, as in training."""
    x = b.node("Cast", "images", to=b._onnx.TensorProto.FLOAT)
    # Before the arithmetic: engines are slow if the innermost axis has three elements.
    x = b.node("Transpose", x, perm=[0, 3, 1, 2])
    x = b.node("Sub", x, b.channels(network.mean))
    return str(b.node("Mul", x, b.channels(np.float32(1) / network.std)))


def float_stem(b: Builder, stem: FloatStem, x: str) -> str:
    """Adds the real-valued first convolution and its batch norm."""
    sums = b.conv(x, b.constant(oihw(stem.kernel), name="stem.kernel"), stem.info)
    scaled = b.node("Mul", sums, b.channels(stem.multiplier))
    return str(b.node("Add", scaled, b.channels(stem.offset)))


def head(b: Builder, network: IntegerModel, x: str) -> str:
    """Adds the average over pixels and the last linear layer, and returns the logits."""
    last = network.head
    pooled = b.node("Flatten", b.node("GlobalAveragePool", x))
    if last.step_sizes is None:
        sums = b.node("MatMul", pooled, b.constant(last.kernel, name="head.kernel"))
    else:
        input_step_size, kernel_step_size = (np.float32(size) for size in last.step_sizes)
        codes = b.node("Round", b.node("Mul", pooled, b.constant(1 / input_step_size)))
        codes = b.node("Clip", codes, b.constant(0.0), b.constant(255.0))
        stored = b.constant(last.kernel, np.int8, name="head.kernel")
        kernel = b.node("Cast", stored, to=b._onnx.TensorProto.FLOAT)
        sums = b.node("MatMul", codes, kernel)
        sums = b.node("Mul", sums, b.constant(input_step_size * kernel_step_size))
    return str(b.node("Add", sums, b.constant(last.bias, name="head.bias")))


def finish(
    b: Builder,
    network: IntegerModel,
    ops: Mapping[str, Callable[..., Any]],
    *,
    opset: int,
    policy: np.ndarray | None,
    format: str,
) -> Any:
    """Adds all nodes of the network and makes the model, with its metadata.

    Args:
      b: an empty builder, or one that holds the nodes of the policy input.
      network: the integers.
      ops: by op, a function that adds a node of the network's graph.
      opset: version of the standard operators.
      policy: ``[L]`` widths; None if the policy is an input.
      format: what the metadata call the model.

    Returns:
      an onnx.ModelProto.
    """
    onnx = b._onnx
    run_graph(network.graph, normalised(b, network), ops)
    logits = b.node("Identity", b.nodes[-1].output[0], name="logits")
    dims = ["batch", *network.image_shape]
    values = onnx.helper.make_tensor_value_info
    inputs = [values("images", onnx.TensorProto.UINT8, dims)]
    if policy is None:
        inputs.append(values("policy", onnx.TensorProto.INT64, [len(network.layers)]))
    outputs = [values(logits, onnx.TensorProto.FLOAT, ["batch", len(network.classes)])]
    graph = onnx.helper.make_graph(
        b.nodes, "bitmixer", inputs, outputs, initializer=list(b.constants.values())
    )
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        producer_name="bitmixer_jax",
        ir_version=onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]),
    )
    about = describe(network)
    onnx.helper.set_model_props(
        model,
        {
            "format": FORMAT,
            "version": str(VERSION),
            "form": format,  # the key of files, which must stay readable
            "choices": json.dumps(list(network.space.choices)),
            "layers": json.dumps(list(network.names)),
            "policy": json.dumps(None if policy is None else [int(w) for w in policy]),
            "classes": json.dumps(list(network.classes)),
            "image_shape": json.dumps(list(network.image_shape)),
            "images": json.dumps(about["about"].get("images", {})),
            "normalisation": "in the graph: images are uint8 [batch, H, W, C], 0..255",
            "mean": json.dumps(about["mean"]),
            "std": json.dumps(about["std"]),
            "network": network.weights_digest,
        },
    )
    return model
