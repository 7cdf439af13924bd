"""The layer table: a description of each quantised layer, read by models, costs and exports."""

from __future__ import annotations

import dataclasses
from typing import Any

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
    """One layer: it has one width and one quantised input, which one kernel or two read.

    A projection shortcut reads the same tensor as the first convolution of its block. So it is the
    second kernel of that layer.

    Attributes:
      name: such as "stage2.block1.conv1"; also its name in the variables.
      kind: "conv" or "depthwise".
      kernels: one KernelInfo, or two with a projection shortcut.
      predecessor: the layer that produces its input, as an index into ``model.layers``; -1: the
        stem. With a residual branch, the last layer of the block in front.
      block: which block it belongs to, counted from 0.
      signed: whether its input has both signs.
      input: ``(H, W, C)`` of one example.
    """

    name: str
    kind: str
    kernels: tuple[KernelInfo, ...]
    predecessor: int
    block: int
    signed: bool
    input: tuple[int, int, int]

    def norm_rows(self, n: int, norm: str) -> int:
        """Returns P, the number of rows of the tables ``[P, n, C]`` of its batch norms.

        There is a row for each width of the predecessor if ``norm`` is "transitional" and there is
        a predecessor, else one row.
        """
        return n if norm == "transitional" and self.predecessor >= 0 else 1

    def norm_row(self, indices: Any, rows: int) -> Any:
        """Returns the row of its batch norms under a policy: that of its predecessor's width.

        Args:
          indices: ``[L]`` index of each layer's width (ints or arrays).
          rows: P; the only row of 1 is 0.
        """
        return indices[self.predecessor] if rows > 1 else 0

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
    """Describes a convolution of an input of ``shape`` (H, W, C), padded by (kernel - 1) / 2."""
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
