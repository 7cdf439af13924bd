"""The layer table: what each quantised layer is, described once and read by everything else."""

from __future__ import annotations

import dataclasses

Padding = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelInfo:
    """One convolution of a layer.

    Attributes:
      name: its name in the variables, "conv" or "shortcut".
      shape: ``(kh, kw, C_in / groups, C_out)``.
      strides, padding, groups: of the convolution.
      output: ``(H', W', C_out)`` of one example.
    """

    name: str
    shape: tuple[int, int, int, int]
    strides: tuple[int, int]
    padding: Padding
    groups: int
    output: tuple[int, int, int]

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one example."""
        kh, kw, c_in, _ = self.shape
        return kh * kw * c_in * self.output[0] * self.output[1] * self.output[2]

    @property
    def params(self) -> int:
        """Number of weights."""
        kh, kw, c_in, c_out = self.shape
        return kh * kw * c_in * c_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One quantised layer: one width, one quantised input, and each kernel that reads it.

    A projection shortcut reads the same tensor as the first convolution of its block, so it is a
    second kernel of that layer.

    Attributes:
      name: such as "stage2.block1.conv1"; also its name in the variables.
      kind: "conv" or "depthwise".
      kernels: one KernelInfo, or two with a projection shortcut.
      predecessor: which layer's width precedes its own (index into ``model.layers``); -1: the stem.
      block: which block it belongs to, counted from 0.
      signed: whether its input takes both signs.
      input: ``(H, W, C)`` of one example.
    """

    name: str
    kind: str
    kernels: tuple[KernelInfo, ...]
    predecessor: int
    block: int
    signed: bool
    input: tuple[int, int, int]

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one example."""
        return sum(k.macs for k in self.kernels)

    @property
    def params(self) -> int:
        """Number of quantised weights."""
        return sum(k.params for k in self.kernels)


def conv_info(
    name: str,
    shape: tuple[int, int, int],
    features: int,
    kernel: int,
    strides: int,
    groups: int = 1,
) -> KernelInfo:
    """Describes a convolution of input ``shape`` (H, W, C), padded by (kernel - 1) / 2."""
    height, width, channels = shape
    pad = (kernel - 1) // 2

    def out(size: int) -> int:
        return (size + 2 * pad - kernel) // strides + 1

    padding: Padding = ((pad, pad), (pad, pad))
    return KernelInfo(
        name=name,
        shape=(kernel, kernel, channels // groups, features),
        strides=(strides, strides),
        padding=padding,
        groups=groups,
        output=(out(height), out(width), features),
    )
