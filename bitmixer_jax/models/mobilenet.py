"""MobileNetV2 (Sandler et al., CVPR 2018): inverted residuals with linear bottlenecks."""

from __future__ import annotations

import functools
import itertools

from bitmixer_jax.layer_table import KernelInfo, LayerInfo, conv_info
from bitmixer_jax.models.graph import GraphBuilder, Node
from bitmixer_jax.models.network import Network

# (expansion, channels, blocks, strides) of each stage: table 2 of the paper.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(Network):
    """MobileNetV2. The input of an expansion is a linear bottleneck with both signs: a signed grid.

    Attributes:
      multiplier: of the channels; each count is rounded to a multiple of 8.
      stem_strides: of the first convolution (2 for ImageNet).
    """

    multiplier: float = 1.0
    stem_strides: int = 2

    @property
    def stem_conv(self) -> KernelInfo:
        """See Network.stem_conv."""
        features = _channels(32, self.multiplier)
        return conv_info("conv", self.image_shape, features, 3, self.stem_strides)

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """See Network.layers."""
        return _layers(self.stem_conv.output, self.multiplier)

    @property
    def graph(self) -> tuple[Node, ...]:
        """See Network.graph."""
        graph = GraphBuilder()
        x = graph.add("relu6", graph.add("stem", "images"))
        for _, block in itertools.groupby(self.layers, key=lambda layer: layer.block):
            y = x
            for layer in (members := tuple(block)):
                y = graph.add("layer", y, layer=layer.name)
                if not layer.name.endswith("project"):
                    y = graph.add("relu6", y)
            inside = members[-1].name.endswith("project")
            same = members[0].input == members[-1].kernels[0].output
            x = graph.add("add", x, y) if inside and same else y
        graph.add("head", x)
        return tuple(graph.nodes)


def _channels(channels: int, multiplier: float) -> int:
    """``channels * multiplier`` rounded to a multiple of 8, never more than 10% down."""
    rounded = max(8, int(channels * multiplier + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * multiplier else rounded


@functools.cache
def _layers(shape: tuple[int, int, int], multiplier: float) -> tuple[LayerInfo, ...]:
    """Returns the layer table of a network whose stem has the output ``shape``."""
    layers: list[LayerInfo] = []

    def add(name: str, block: int, features: int, kernel: int, strides: int, signed: bool) -> None:
        nonlocal shape
        depthwise = name.endswith("depthwise")
        conv = conv_info("conv", shape, features, kernel, strides, shape[-1] if depthwise else 1)
        layers.append(
            LayerInfo(
                name=name,
                kind="depthwise" if depthwise else "conv",
                kernels=(conv,),
                predecessor=len(layers) - 1,
                block=block,
                signed=signed,
                input=shape,
            )
        )
        shape = conv.output

    block = 0
    for stage, (expansion, channels, size, stage_strides) in enumerate(_STAGES, start=1):
        for number in range(1, size + 1):
            name = f"stage{stage}.block{number}"
            strides = stage_strides if number == 1 else 1
            inner = shape[-1] * expansion
            if expansion > 1:  # its input is the bottleneck of the block in front
                add(f"{name}.expand", block, inner, 1, 1, signed=True)
            add(f"{name}.depthwise", block, inner, 3, strides, signed=False)
            add(f"{name}.project", block, _channels(channels, multiplier), 1, 1, signed=False)
            block += 1
    add("last", block, max(1280, _channels(1280, multiplier)), 1, 1, signed=True)
    return tuple(layers)
