"""Builds the network of a packed file from its description and its tensors.

It checks all shapes, counts and values against the layer table: a file may be damaged or hostile.
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
from bitmixer_jax.quantizers import WeightQuantizer

NORM_DTYPES = ("float32", "float16")


class PackedReader:
    """Builds a network from a description and its arrays."""

    def __init__(
        self,
        read: Reader,
        description: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        whole: BitSpace,
        kept: tuple[int, ...],
        quantizer: WeightQuantizer,
        planes: int,
    ):
        """Keeps what was read.

        Args:
          read: checks values, and names the file in errors.
          description: of the network, as `description.describe` makes it.
          arrays: tensors by name.
          whole, kept: widths of the file, and those that its planes give.
          quantizer: of the weights.
          planes: how many to use.
        """
        self._read, self._description, self._arrays = read, description, arrays
        self._whole, self._quantizer, self._planes = whole, quantizer, planes
        self._kept = kept
        self._coarser = 2.0 ** (whole.widest - kept[-1]) if quantizer.nested else 1.0
        self._rows = [whole.choices.index(b) for b in kept]
        self._taken: dict[str, int] = {}

    def _take(self, name: str, dtype: Any, count: int) -> np.ndarray:
        """Returns the next ``count`` numbers of a tensor."""
        array = self._arrays.get(name)
        start = self._taken.get(name, 0)
        if array is None or array.dtype != dtype or array.ndim != 1 or start + count > len(array):
            self._read.fail(f"{name} is absent or too short")
        self._taken[name] = start + count
        return array[start : start + count]

    def _exactly(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a whole tensor."""
        array = self._arrays.get(name)
        if array is None or array.dtype != dtype or array.shape != shape:
            self._read.fail(f"{name} is absent or of another shape")
        self._taken[name] = len(array)
        return array

    def build(self) -> IntegerModel:
        """Returns the network. Raises UserError where something does not fit."""
        read, about = self._read, self._description
        image_shape = read.image_shape(about.get("image_shape"))
        stem_info = read.kernel(about.get("stem"), image_shape)
        rows = read.field(about, "layers", list)
        if not 1 <= len(rows) <= 100_000:
            read.fail("there are no layers")
        infos = tuple(read.layer(row, place) for place, row in enumerate(rows))
        features = read.whole(about.get("features"), 1, 2**20, "features")
        graph = read.graph(about.get("graph"), stem_info, infos, image_shape, features)
        norm, first_last = about.get("norm"), about.get("ends")
        if norm not in ("transitional", "per_width") or first_last not in ("float", "int8"):
            read.fail("norm or ends is unknown")
        if about.get("tables") not in NORM_DTYPES:
            read.fail("tables is unknown")
        classes = read.texts(about.get("classes"), "classes")
        layers = tuple(self._layer(info, norm) for info in infos)
        real = first_last == "float"
        stem, head = self._first_last(stem_info, image_shape, features, len(classes), real)
        for name, array in self._arrays.items():
            if not name.startswith("plane.") and array.shape[:1] != (self._taken.get(name),):
                read.fail(f"{name} is longer than its layers need")
        channels = image_shape[2]
        network = IntegerModel(
            space=BitSpace(self._kept),
            weight_quantizer=self._quantizer.name,
            code_bits=self._planes if self._quantizer.nested else self._whole.widest,
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

    def _layer(self, info: LayerInfo, norm: str) -> Layer:
        n = self._whole.n
        step_size = self._take("input_steps", np.float32, n)[self._rows]
        rows = info.norm_rows(n, norm)
        return Layer(
            info=info,
            step_size=self._positive(step_size, "input_steps"),
            kernels=tuple(self._kernel(kernel, rows) for kernel in info.kernels),
        )

    def _kernel(self, info: KernelInfo, rows: int) -> Kernel:
        """Reads a kernel whose tables have P = ``rows`` rows."""
        n, channels = self._whole.n, info.shape[-1]
        own = self._rows
        predecessor = own if rows > 1 else [0]
        count = self._take("counts", np.int32, rows * n).reshape(rows, n)
        norms = self._norms(2 * rows * n, channels).reshape(2, rows, n, channels)
        number = self._quantizer.step_size_count(self._whole)
        step_sizes = self._take("weight_steps", np.float32, number)
        multiplier, offset = norms[:, predecessor][:, :, own]
        return Kernel(
            info=info,
            codes=self._codes(info),
            step_size=self._positive(step_sizes, "weight_steps") * np.float32(self._coarser),
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
        """Returns the codes of a kernel, int8 ``[S, ...]``, from the planes that are used."""
        size = math.ceil(info.params / 8)

        def read_planes(names: list[str]) -> np.ndarray:
            codes = np.zeros(info.params, np.int8)
            for i, name in enumerate(names):
                packed = self._take(name, np.uint8, size)
                bits = np.unpackbits(packed, count=info.params)
                codes = (codes << 1) | bits.astype(np.int8) if i else -bits.astype(np.int8)
            return codes.reshape(info.shape)

        sets = self._quantizer.plane_names(self._whole)
        return np.stack([read_planes(names[: self._planes]) for names in sets])

    def _first_last(
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
            return stem, Head(kernel=weights, bias=bias, step_sizes=None)
        step_sizes = self._positive(self._exactly("end_steps", np.float32, (4,)), "end_steps")
        one = Kernel(
            info=info,
            codes=kernel[None],
            step_size=step_sizes[1:2],
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
        of_head = float(step_sizes[2]), float(step_sizes[3])
        head = Head(kernel=weights, bias=bias, step_sizes=of_head)
        return Layer(info=layer, step_size=step_sizes[:1], kernels=(one,)), head
