"""Describes the connections of a network: a list of nodes.

The Flax model, the integer engine and the exports all run this one list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

OPS = ("stem", "layer", "relu", "relu6", "max_pool", "shortcut", "add", "head")
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation of a network.

    ==========  ==========================================================================
    stem        first convolution and its norm
    layer       a quantised layer of the table; with a projection shortcut it has two outputs
    relu        max(x, 0)
    relu6       min(max(x, 0), 6)
    max_pool    3x3 windows of stride 2, padded by 1
    shortcut    every ``stride``-th pixel, and zero channels added, ``channels`` in all
    add         sum of two tensors
    head        average over all pixels, and the last linear layer: the logits
    ==========  ==========================================================================

    Attributes:
      op: one of OPS.
      inputs: names of the tensors that it reads; "images" are the input of the network.
      outputs: names of the tensors that it computes.
      layer: name of the layer, for op "layer".
      stride, channels: for op "shortcut".
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: str = ""
    stride: int = 1
    channels: int = 0


class GraphBuilder:
    """Builds a list of nodes."""

    def __init__(self) -> None:
        """Starts with no nodes."""
        self.nodes: list[Node] = []

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node and returns the name of its output, or a tuple of names."""
        first = len(self.nodes)
        names = tuple(f"t{first}" if i == 0 else f"t{first}.{i}" for i in range(outputs))
        self.nodes.append(Node(op, inputs, names, **attributes))
        return names[0] if outputs == 1 else names


def run_graph(
    graph: Sequence[Node],
    images: Value,
    ops: Mapping[str, Callable[..., Any]],
) -> dict[str, Value]:
    """Runs a network.

    Args:
      graph: its nodes, in order.
      images: the value of the tensor "images".
      ops: by op, a function of (node, *inputs) that returns the output, or a tuple of outputs.

    Returns:
      every tensor by name; the output of the last node is the logits.
    """
    tensors: dict[str, Value] = {"images": images}
    for node in graph:
        made = ops[node.op](node, *(tensors[name] for name in node.inputs))
        made = made if isinstance(made, tuple) else (made,)
        tensors.update(zip(node.outputs, made, strict=True))
    return tensors
