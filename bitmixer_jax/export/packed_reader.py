"""The network of a packed file, put together from its description and its tensors.

Nothing is taken on trust: shapes, counts and values are checked against the layer table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmixer_jax.export.description import Reader
from bitmixer_jax.export.integer_model import FloatStem, Head, IntegerModel, Kernel, Layer
from bitmixer_jax.layer_table import KernelInfo, LayerInfo
from bitmixer_jax.policy import BitSpace

NORM_DTYPES = ("float32", "float16")


class PackedReader:
    """Puts a network together from a description and its arrays."""

    def __init__(
        self,
        read: Reader,
        description: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        whole: BitSpace,
        kept: tuple[int, ...],
        kind: str,
        planes: int,
    ):
        """Takes what was read.

        Args:
          read: checks, and fails in the name of the file.
          description: of the network, as `description.describe` makes it.
          arrays: tensors by name.
          whole, kept: widths of the file, and those that its planes give.
          kind: of the weight quantiser.
          planes: how many there are to use.
        """
        self._read, self._description, self._arrays = read, description, arrays
        self._whole, self._kind, self._planes = whole, kind, planes
        self._kept = kept
        self._coarser = 2.0 ** (whole.widest - kept[-1]) if kind != "independent" else 1.0
        self._rows = [whole.choices.index(b) for b in kept]
        self._taken: dict[str, int] = {}

    def _take(self, name: str, dtype: Any, count: int) -> np.ndarray:
        """The next ``count`` numbers of a tensor."""
        array = self._arrays.get(name)
        start = self._taken.get(name, 0)
        if array is None or array.dtype != dtype or array.ndim != 1 or start + count > len(array):
            self._read.fail(f"{name} is absent or too short")
        self._taken[name] = start + count
        return array[start : start + count]

    def _exactly(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """A whole tensor."""
        array = self._arrays.get(name)
        if array is None or array.dtype != dtype or array.shape != shape:
            self._read.fail(f"{name} is absent or of another shape")
        self._taken[name] = len(array)
        return array

    def build(self) -> IntegerModel:
        """The network. Raises UserError where something does not fit."""
        read, about = self._read, self._description
        image_shape = read.image_shape(about.get("image_shape"))
        stem_info = read.kernel(about.get("stem"), image_shape)
        rows = read.field(about, "layers", list)
        if not 1 <= len(rows) <= 100_000:
            read.fail("there are no layers")
        infos = tuple(read.layer(row, place) for place, row in enumerate(rows))
        features = read.whole(about.get("features"), 1, 2**20, "features")
        graph = read.graph(about.get("graph"), stem_info, infos, image_shape, features)
        norm, ends = about.get("norm"), about.get("ends")
        if norm not in ("transitional", "per_width") or ends not in ("float", "int8"):
            read.fail("norm or ends is unknown")
        if about.get("tables") not in NORM_DTYPES:
            read.fail("tables is unknown")
        classes = read.texts(about.get("classes"), "classes")
        layers = tuple(self._layer(info, norm == "transitional") for info in infos)
        stem, head = self._ends(stem_info, image_shape, features, len(classes), ends == "float")
        for name, array in self._arrays.items():
            if not name.startswith("plane.") and array.shape[:1] != (self._taken.get(name),):
                read.fail(f"{name} is longer than its layers need")
        channels = image_shape[2]
        network = IntegerModel(
            space=BitSpace(self._kept),
            weight_quantizer=self._kind,
            code_bits=self._planes if self._kind != "independent" else self._whole.widest,
            graph=graph,
            layers=layers,
            stem=stem,
            head=head,
            image_shape=image_shape,
            mean=self._numbers("mean", channels),
            std=self._numbers("std", channels),
            classes=classes,
            weights_digest=read.text(about.get("network"), "network"),
            about=read.field(about, "about", dict),
        )
        if not (network.std > 0).all():
            read.fail("std is not positive")
        return network

    def _numbers(self, key: str, count: int) -> np.ndarray:
        values = self._description.get(key)
        return np.asarray(self._read.numbers(values, count, key), np.float32)

    def _layer(self, info: LayerInfo, transitional: bool) -> Layer:
        n = self._whole.n
        step = self._take("input_steps", np.float32, n)[self._rows]
        before = n if transitional and info.predecessor >= 0 else 1
        return Layer(
            info=info,
            step=self._positive(step, "input_steps"),
            kernels=tuple(self._kernel(kernel, before) for kernel in info.kernels),
        )

    def _kernel(self, info: KernelInfo, before: int) -> Kernel:
        n, channels = self._whole.n, info.shape[-1]
        own = self._rows
        predecessor = own if before > 1 else [0]
        count = self._take("counts", np.int32, before * n).reshape(before, n)
        norms = self._norms(2 * before * n, channels).reshape(2, before, n, channels)
        steps = self._take("weight_steps", np.float32, n if self._kind == "independent" else 1)
        multiplier, offset = norms[:, predecessor][:, :, own]
        return Kernel(
            info=info,
            codes=self._codes(info),
            step=self._positive(steps, "weight_steps") * np.float32(self._coarser),
            multiplier=np.ascontiguousarray(multiplier),
            offset=np.ascontiguousarray(offset),
            count=count[predecessor][:, own],
        )

    def _norms(self, rows: int, channels: int) -> np.ndarray:
        if self._description["tables"] == "float32":
            table = self._take("norms", np.float32, rows * channels).reshape(rows, channels)
        else:
            small = self._take("norms", np.float16, rows * channels).astype(np.float32)
            scale = self._take("norm_scales", np.float32, rows)
            table = small.reshape(rows, channels) * scale[:, None]
        if not np.isfinite(table).all():
            self._read.fail("norms are not finite")
        return table

    def _positive(self, values: np.ndarray, name: str) -> np.ndarray:
        if not (np.isfinite(values).all() and (values > 0).all()):
            self._read.fail(f"{name} are not positive")
        return values

    def _codes(self, info: KernelInfo) -> np.ndarray:
        """Codes int8 of a kernel from the planes that are used."""
        size = math.ceil(info.params / 8)

        def read_planes(names: list[str]) -> np.ndarray:
            codes = np.zeros(info.params, np.int8)
            for i, name in enumerate(names):
                packed = self._take(name, np.uint8, size)
                bits = np.unpackbits(packed, count=info.params)
                codes = (codes << 1) | bits.astype(np.int8) if i else -bits.astype(np.int8)
            return codes.reshape(info.shape)

        if self._kind != "independent":
            return read_planes([f"plane.{i}" for i in range(self._planes)])[None]
        sets = [[f"plane.{b}bits.{i}" for i in range(b)] for b in self._kept]
        return np.stack([read_planes(names) for names in sets])

    def _ends(
        self, info: KernelInfo, image_shape: Any, features: int, classes: int, real: bool
    ) -> tuple[FloatStem | Layer, Head]:
        channels = info.shape[-1]
        dtype = np.float32 if real else np.int8
        kernel = self._exactly("stem.kernel", dtype, info.shape)
        multiplier, offset = self._exactly("stem.norm", np.float32, (2, channels))
        weights = self._exactly("head.kernel", dtype, (features, classes))
        bias = self._exactly("head.bias", np.float32, (classes,))
        for values in (kernel, multiplier, offset, weights, bias):
            if not np.isfinite(values).all():
                self._read.fail("stem or head is not finite")
        if real:
            stem = FloatStem(info=info, kernel=kernel, multiplier=multiplier, offset=offset)
            return stem, Head(kernel=weights, bias=bias, steps=None)
        steps = self._positive(self._exactly("end_steps", np.float32, (4,)), "end_steps")
        one = Kernel(
            info=info,
            codes=kernel[None],
            step=steps[1:2],
            multiplier=multiplier[None, None],
            offset=offset[None, None],
            count=np.ones((1, 1), np.int32),
        )
        layer = LayerInfo(
            name="stem",
            kind="conv",
            kernels=(info,),
            predecessor=-1,
            block=-1,
            signed=True,
            input=image_shape,
        )
        head = Head(kernel=weights, bias=bias, steps=(float(steps[2]), float(steps[3])))
        return Layer(info=layer, step=steps[:1], kernels=(one,)), head
