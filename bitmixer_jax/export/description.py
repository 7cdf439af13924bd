"""The description of a network as JSON: its layers, its graph and how images are normalised.

Files hold it in front of their numbers. `Reader` checks everything that sizes or the graph depend
on, so that a damaged or hostile file gives an error of one line and not a wrong network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from bitmixer_jax.errors import UserError
from bitmixer_jax.export.integer_model import FloatStem, IntegerModel
from bitmixer_jax.layer_table import KernelInfo, LayerInfo
from bitmixer_jax.models.graph import OPS, Node
from bitmixer_jax.policy import BitSpace
from bitmixer_jax.quantizers import WEIGHT_QUANTIZERS, WeightQuantizer

_MOST_VALUES = 2**28  # of one activation tensor for one image; ImageNet networks need 2^20
_MOST_PIXELS = 2**26  # numbers in one image; ImageNet networks need 2^18
_LARGEST = 3e38  # of a float32
Shape = tuple[int, int, int]


def graph_to_json(graph: tuple[Node, ...]) -> list[list[Any]]:
    """Returns ``[op, [inputs], [outputs]]`` of nodes, then a layer's name or [stride, channels]."""
    found = []
    for node in graph:
        row: list[Any] = [node.op, list(node.inputs), list(node.outputs)]
        if node.layer:
            row.append(node.layer)
        elif node.op == "shortcut":
            row.append([node.stride, node.channels])
        found.append(row)
    return found


def layer_to_json(layer: LayerInfo) -> dict[str, Any]:
    """Returns a layer of the table; "input" is ``[H, W, C]``, and kernels are `kernel_to_json`."""
    return {
        "name": layer.name,
        "kind": layer.kind,
        "previous": layer.predecessor,
        "block": layer.block,
        "signed": layer.signed,
        "input": list(layer.input),
        "kernels": [kernel_to_json(kernel) for kernel in layer.kernels],
    }


def kernel_to_json(kernel: KernelInfo) -> list[Any]:
    """Returns name, [kh, kw, C_in, C_out], [strides], [[top, bottom], [left, right]], groups."""
    return [
        kernel.name,
        list(kernel.shape),
        list(kernel.strides),
        [list(pad) for pad in kernel.padding],
        kernel.groups,
    ]


def describe(network: IntegerModel) -> dict[str, Any]:
    """Returns the description of a network, a JSON tree (docs/packed-format.md).

    Its keys are those of files, which must stay readable: "previous" is the predecessor, "ends" are
    the first and last layers.
    """
    transitional = any(len(k.count) > 1 for layer in network.layers for k in layer.kernels)
    stem = network.stem
    return {
        "choices": list(network.space.choices),
        "weight_kind": network.weight_quantizer,
        "norm": "transitional" if transitional else "per_width",
        "ends": "float" if isinstance(stem, FloatStem) else "int8",
        "image_shape": list(network.image_shape),
        "mean": [float(x) for x in network.mean],
        "std": [float(x) for x in network.std],
        "classes": list(network.classes),
        "network": network.weights_digest,
        "stem": kernel_to_json(stem.info if isinstance(stem, FloatStem) else stem.info.kernels[0]),
        "features": int(network.head.kernel.shape[0]),
        "layers": [layer_to_json(layer.info) for layer in network.layers],
        "graph": graph_to_json(network.graph),
        "about": dict(network.about),
    }


class Reader:
    """Reads the JSON of a file and checks it. Errors are UserError and name the file."""

    def __init__(self, where: str):
        """Takes the name of the file, for errors."""
        self.where = where

    def fail(self, what: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{self.where}: damaged file ({what})", "damaged")

    def field(self, tree: Any, key: str, kind: type) -> Any:
        """Returns ``tree[key]``, which must have the type ``kind``."""
        value = tree.get(key) if isinstance(tree, Mapping) else None
        if type(value) is not kind:
            self.fail(f"{key} is not a {kind.__name__}")
        return value

    def whole(self, value: Any, low: int, high: int, what: str) -> int:
        """Returns a whole number in ``low..high``."""
        if type(value) is not int or not low <= value <= high:
            self.fail(f"{what} is not a whole number from {low} to {high}")
        return value

    def wholes(self, value: Any, count: int, low: int, high: int, what: str) -> tuple[int, ...]:
        """Returns a list of ``count`` whole numbers in ``low..high``."""
        if type(value) is not list or len(value) != count:
            self.fail(f"{what} is not a list of {count} numbers")
        return tuple(self.whole(v, low, high, what) for v in value)

    def numbers(self, value: Any, count: int, what: str) -> tuple[float, ...]:
        """Returns a list of ``count`` numbers that float32 can hold."""
        if type(value) is not list or len(value) != count:
            self.fail(f"{what} is not a list of {count} numbers")
        if not all(type(v) in (int, float) and abs(v) < _LARGEST for v in value):
            self.fail(f"{what} is not finite")
        return tuple(float(v) for v in value)

    def text(self, value: Any, what: str) -> str:
        """Returns a short text that can be printed."""
        if type(value) is not str or len(value) > 1000 or not _encodes(value):
            self.fail(f"{what} is not a text")
        return value

    def text_of(self, tree: Any, key: str) -> str:
        """Returns a text of any length under a key."""
        value: str = self.field(tree, key, str)
        return value

    def texts(self, value: Any, what: str, most: int = 100_000) -> tuple[str, ...]:
        """Returns a list of texts."""
        if type(value) is not list or len(value) > most:
            self.fail(f"{what} is not a list of texts")
        return tuple(self.text(v, what) for v in value)

    def space(self, value: Any) -> BitSpace:
        """Returns the choices of width."""
        if type(value) is not list or not 1 <= len(value) <= 8:
            self.fail("choices is not a list of widths")
        choices = self.wholes(value, len(value), 2, 8, "choices")
        if list(choices) != sorted(set(choices)):
            self.fail("choices are not ascending")
        return BitSpace(choices)

    def quantizer(self, value: Any) -> WeightQuantizer:
        """Returns the weight quantiser of that name."""
        if type(value) is not str or value not in WEIGHT_QUANTIZERS:
            self.fail(f"weight_kind is none of {tuple(WEIGHT_QUANTIZERS)}")
        return WEIGHT_QUANTIZERS[value]

    def shape(self, value: Any, what: str) -> Shape:
        """Returns a shape ``(H, W, C)`` of not too many values."""
        height, width, channels = self.wholes(value, 3, 1, 2**20, what)
        if height * width * channels > _MOST_VALUES:
            self.fail(f"{what} is too large")
        return height, width, channels

    def image_shape(self, value: Any) -> Shape:
        """Returns the shape ``(H, W, C)`` of the images that a network takes."""
        found = self.shape(value, "image_shape")
        if math.prod(found) > _MOST_PIXELS:
            self.fail("image_shape is too large")
        return found

    def kernel(self, value: Any, entry: Shape) -> KernelInfo:
        """Returns a kernel that reads a tensor of shape ``entry``."""
        if type(value) is not list or len(value) != 5:
            self.fail("a kernel is not a list of 5")
        name, shape, strides, padding, groups = value
        kh, kw, c_in, c_out = self.wholes(shape, 4, 1, 2**20, "kernel shape")
        groups = self.whole(groups, 1, 2**20, "groups")
        if c_in * groups != entry[2] or c_out % groups:
            self.fail("a kernel does not fit its input")
        stride = self.wholes(strides, 2, 1, 64, "strides")
        if type(padding) is not list or len(padding) != 2:
            self.fail("padding is not a list of 2")
        pads = [self.wholes(pad, 2, 0, 64, "padding") for pad in padding]
        output = tuple(
            (size + sum(pad) - k) // s + 1
            for size, pad, k, s in zip(entry, pads, (kh, kw), stride, strict=False)
        )
        if kh * kw * c_in * c_out > _MOST_VALUES:
            self.fail("a kernel is too large")
        return KernelInfo(
            name=self.text(name, "kernel name"),
            shape=(kh, kw, c_in, c_out),
            strides=(stride[0], stride[1]),
            padding=((pads[0][0], pads[0][1]), (pads[1][0], pads[1][1])),
            groups=groups,
            output=self.shape([*output, c_out], "kernel output"),
        )

    def layer(self, value: Any, place: int) -> LayerInfo:
        """Returns layer number ``place`` of the table."""
        entry = self.shape(self.field(value, "input", list), "input")
        kernels = self.field(value, "kernels", list)
        if not 1 <= len(kernels) <= 2:
            self.fail("a layer has one kernel or two")
        return LayerInfo(
            name=self.text(value.get("name"), "layer name"),
            kind=self.text(value.get("kind"), "layer kind"),
            kernels=tuple(self.kernel(kernel, entry) for kernel in kernels),
            predecessor=self.whole(value.get("previous"), -1, place - 1, "previous"),
            block=self.whole(value.get("block"), -1, 2**20, "block"),
            signed=bool(self.field(value, "signed", bool)),
            input=entry,
        )

    def graph(
        self,
        value: Any,
        stem: KernelInfo,
        layers: tuple[LayerInfo, ...],
        image_shape: Shape,
        features: int,
    ) -> tuple[Node, ...]:
        """Returns the graph; checks the shape of every tensor against the nodes that read it."""
        if type(value) is not list or not 2 <= len(value) <= 100_000:
            self.fail("graph is not a list of nodes")
        table = {layer.name: layer for layer in layers}
        if len(table) != len(layers):
            self.fail("two layers have one name")
        shapes: dict[str, Shape] = {"images": image_shape}
        nodes, used = [], []
        for row in value:
            if type(row) is not list or not 3 <= len(row) <= 4 or row[0] not in OPS:
                self.fail("a node of the graph is unknown")
            inputs, outputs = self.texts(row[1], "inputs"), self.texts(row[2], "outputs")
            extra = row[3] if len(row) == 4 else None
            if any(name not in shapes for name in inputs) or any(n in shapes for n in outputs):
                self.fail("the graph reads what is not there yet")
            node = Node(row[0], inputs, outputs)
            if row[0] == "layer":
                node = Node(row[0], inputs, outputs, layer=self.text(extra, "layer of a node"))
                used.append(node.layer)
            if row[0] == "shortcut":
                stride, channels = self.wholes(extra, 2, 1, 2**20, "shortcut")
                node = Node(row[0], inputs, outputs, stride=stride, channels=channels)
            made = self._made(node, [shapes[name] for name in inputs], stem, table, features)
            if len(made) != len(outputs):
                self.fail(f"a node {node.op} has the wrong number of outputs")
            shapes.update(zip(outputs, made, strict=True))
            nodes.append(node)
        if used != [layer.name for layer in layers]:
            self.fail("the graph does not run each layer once, in order")
        ops = [node.op for node in nodes]
        if ops.count("stem") != 1 or ops.count("head") != 1 or ops[-1] != "head":
            self.fail("the graph needs one stem, and one head at its end")
        return tuple(nodes)

    def _made(
        self,
        node: Node,
        entries: list[Shape],
        stem: KernelInfo,
        table: Mapping[str, LayerInfo],
        features: int,
    ) -> list[Shape]:
        """Returns the shapes of a node's outputs."""
        if len(entries) != (2 if node.op == "add" else 1):
            self.fail(f"a node {node.op} has the wrong number of inputs")
        entry = entries[0]
        if node.op == "stem":
            if node.inputs != ("images",):
                self.fail("the stem does not read the images")
            return [stem.output]
        if node.op == "layer":
            if node.layer not in table or table[node.layer].input != entry:
                self.fail("a layer does not fit its input")
            return [kernel.output for kernel in table[node.layer].kernels]
        if node.op == "max_pool":
            height, width = ((size - 1) // 2 + 1 for size in entry[:2])
            return [(height, width, entry[2])]
        if node.op == "shortcut":
            if node.channels < entry[2]:
                self.fail("a shortcut drops channels")
            height, width = (-(-size // node.stride) for size in entry[:2])
            return [self.shape([height, width, node.channels], "shortcut")]
        if node.op == "add" and entries[0] != entries[1]:
            self.fail("an addition of unlike shapes")
        if node.op == "head" and entry[2] != features:
            self.fail("the head does not fit its input")
        return [entry]


def _encodes(text: str) -> bool:
    """Returns whether a text can be encoded: JSON may hold lone surrogates, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
