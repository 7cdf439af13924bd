"""Residual networks (He et al., CVPR 2016): the CIFAR family and the ImageNet family."""

from __future__ import annotations

import functools
import itertools

from bitmixer_jax.layer_table import KernelInfo, LayerInfo, conv_info
from bitmixer_jax.models.graph import GraphBuilder, Node
from bitmixer_jax.models.network import Network


class ResNet(Network):
    """Residual network of basic or bottleneck blocks.

    Attributes:
      stage_sizes: blocks per stage; each stage but the first halves the image and doubles channels.
      width: channels of the first stage.
      bottleneck: 1x1, 3x3, 1x1 convolutions (channels times four) instead of two 3x3.
      stem_kernel, stem_strides: of the first convolution.
      stem_pool: a 3x3 max pooling of stride 2 after the stem (ImageNet).
      projection: shortcuts that change shape are 1x1 convolutions (ImageNet); else they subsample
        and pad with zero channels, which needs no weights (CIFAR, option A of the paper).
    """

    stage_sizes: tuple[int, ...] = (3, 3, 3)
    width: int = 16
    bottleneck: bool = False
    stem_kernel: int = 3
    stem_strides: int = 1
    stem_pool: bool = False
    projection: bool = False

    @property
    def stem_conv(self) -> KernelInfo:
        """See Network.stem_conv."""
        return conv_info("conv", self.image_shape, self.width, self.stem_kernel, self.stem_strides)

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """See Network.layers."""
        return _layers(
            self.stem_conv.output,
            self.stage_sizes,
            self.width,
            self.bottleneck,
            self.stem_pool,
            self.projection,
        )

    @property
    def graph(self) -> tuple[Node, ...]:
        """See Network.graph."""
        graph = GraphBuilder()
        x = graph.add("relu", graph.add("stem", "images"))
        if self.stem_pool:
            x = graph.add("max_pool", x)
        for _, block in itertools.groupby(self.layers, key=lambda layer: layer.block):
            first, *rest = block
            kernels = len(first.kernels)
            y = graph.add("layer", x, layer=first.name, outputs=kernels)
            y, projected = y if kernels == 2 else (y, None)
            for layer in rest:
                y = graph.add("layer", graph.add("relu", y), layer=layer.name)
            if projected is None:
                projected = x
                stride = -(-first.input[0] // rest[-1].kernels[0].output[0])
                channels = rest[-1].kernels[0].output[-1]
                if stride > 1 or channels != first.input[-1]:
                    projected = graph.add("shortcut", x, stride=stride, channels=channels)
            x = graph.add("relu", graph.add("add", y, projected))
        graph.add("head", x)
        return tuple(graph.nodes)


@functools.cache
def _layers(
    shape: tuple[int, int, int],
    stage_sizes: tuple[int, ...],
    width: int,
    bottleneck: bool,
    stem_pool: bool,
    projection: bool,
) -> tuple[LayerInfo, ...]:
    """Returns the layer table of a network whose stem has the output ``shape``."""
    if stem_pool:
        shape = conv_info("conv", shape, width, 3, 2).output
    layers: list[LayerInfo] = []
    blocks = itertools.count()
    for stage, size in enumerate(stage_sizes, start=1):
        inner = width * 2 ** (stage - 1)
        outer = inner * 4 if bottleneck else inner
        # (features, kernel size) of each convolution of a block; the first 3x3 has the stride.
        convs = [(inner, 1), (inner, 3), (outer, 1)] if bottleneck else [(inner, 3), (outer, 3)]
        for number, block in zip(range(1, size + 1), blocks, strict=False):
            strides = 2 if stage > 1 and number == 1 else 1
            changes = strides > 1 or shape[-1] != outer
            strided = 1 if bottleneck else 0
            entry = shape
            for i, (features, kernel) in enumerate(convs):
                kernels = [
                    conv_info("conv", shape, features, kernel, strides if i == strided else 1)
                ]
                if i == 0 and changes and projection:
                    kernels.append(conv_info("shortcut", entry, outer, 1, strides))
                layers.append(
                    LayerInfo(
                        name=f"stage{stage}.block{number}.conv{i + 1}",
                        kind="conv",
                        kernels=tuple(kernels),
                        predecessor=len(layers) - 1,
                        block=block,
                        signed=False,
                        input=shape,
                    )
                )
                shape = kernels[0].output
    return tuple(layers)
