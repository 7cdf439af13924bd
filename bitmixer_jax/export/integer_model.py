"""The integer model: a trained network as integers, folded batch norms and its graph.

Every export and the integer engine read an IntegerModel. It holds the weights of a kernel once, as
signed integers of the widest width. For each pair of widths it folds the batch norm, the step size
of the kernel and that of its input into one multiplier and one offset for each channel:

    sums   = conv(codes of the input, codes of the weights)
    output = multiplier[predecessor, own] * sums + offset[predecessor, own]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax import deprecated
from bitmixer_jax.errors import UserError
from bitmixer_jax.layer_table import KernelInfo, LayerInfo
from bitmixer_jax.layers import QuantConfig, fold
from bitmixer_jax.models import Network
from bitmixer_jax.models.graph import Node
from bitmixer_jax.pairs import find_uncalibrated
from bitmixer_jax.policy import BitSpace
from bitmixer_jax.quantizers import (
    FIRST_LAST_QUANTIZER,
    WEIGHT_QUANTIZERS,
    WeightQuantizer,
    activation_step_size,
    integer_range,
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """A convolution in integers.

    Attributes:
      info: shapes.
      codes: integer codes int8 ``[S, kh, kw, C_in / groups, C_out]``, see `IntegerModel.codes_at`:
        S = 1, of ``IntegerModel.code_bits`` bits, if the weight quantiser is nested; else S = n.
      step_size: float32 ``[1]`` or ``[n]``, for information (``multiplier`` contains it).
      multiplier, offset: float32 ``[P, n, C_out]``.
      count: int32 ``[P, n]`` training steps that used each pair; a pair with 0 has no statistics.
    """

    info: KernelInfo
    codes: np.ndarray
    step_size: np.ndarray
    multiplier: np.ndarray
    offset: np.ndarray
    count: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A quantised layer: its input is quantised once, and each kernel reads the codes.

    Attributes:
      info: of the layer table.
      step_size: float32 ``[n]``, of the input at each width.
      kernels: as in ``info``.
    """

    info: LayerInfo
    step_size: np.ndarray
    kernels: tuple[Kernel, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FloatStem:
    """A real-valued first convolution.

    Attributes:
      info: shapes.
      kernel: float32 ``[kh, kw, C_in, C_out]``.
      multiplier, offset: float32 ``[C_out]``, its batch norm.
    """

    info: KernelInfo
    kernel: np.ndarray
    multiplier: np.ndarray
    offset: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """The last linear layer, real-valued or at 8 bits.

    Attributes:
      kernel: float32 ``[F, K]``, or int8 codes.
      bias: float32 ``[K]``.
      step_sizes: None if real-valued; else those of the input and of the kernel, float32.
    """

    kernel: np.ndarray
    bias: np.ndarray
    step_sizes: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class IntegerModel:
    """A network as integers.

    Attributes:
      space: the choices of width.
      weight_quantizer: a name in ``quantizers.WEIGHT_QUANTIZERS``.
      code_bits: bits of the nested codes that kernels hold: the widest choice, or fewer if the
        network was read from a truncated file.
      graph: how layers are connected.
      layers: in the order of a policy.
      stem: a FloatStem, or a Layer of one width (8 bits).
      head: the last layer.
      image_shape: ``(H, W, C)``.
      mean, std: float32 ``[C]`` in units of 0..255: images are normalised as (x - mean) / std.
      classes: their names.
      weights_digest: digest of the variables that it was made from.
      about: further JSON values (model, data set, configuration).
    """

    space: BitSpace
    weight_quantizer: str
    code_bits: int
    graph: tuple[Node, ...]
    layers: tuple[Layer, ...]
    stem: FloatStem | Layer
    head: Head
    image_shape: tuple[int, int, int]
    mean: np.ndarray
    std: np.ndarray
    classes: tuple[str, ...]
    weights_digest: str
    about: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """``[L]`` layer names."""
        return tuple(layer.info.name for layer in self.layers)

    @property
    def quantizer(self) -> WeightQuantizer:
        """The weight quantiser of its layers."""
        return WEIGHT_QUANTIZERS[self.weight_quantizer]

    def widths_of(self, layer: Layer) -> tuple[WeightQuantizer, BitSpace, int]:
        """Returns the weight quantiser, the widths and ``code_bits`` of a layer or of the stem."""
        if layer is self.stem:
            return WEIGHT_QUANTIZERS[FIRST_LAST_QUANTIZER], BitSpace((8,)), 8
        return self.quantizer, self.space, self.code_bits

    def codes_at(self, layer: Layer, kernel: Kernel, index: Any) -> Any:
        """Returns the integer codes of a kernel at a width, ``[kh, kw, C_in / groups, C_out]``.

        Args:
          index: int (gives a numpy array) or int32 scalar of jax (gives a jax array).
        """
        quantizer, space, code_bits = self.widths_of(layer)
        stored = kernel.codes if isinstance(index, int) else jnp.asarray(kernel.codes)
        return quantizer.codes_at(stored, index, space, code_bits)

    def pairs(self, policy: np.ndarray) -> dict[str, tuple[Layer, tuple[int, int]]]:
        """Returns each layer by name, and its pair under a policy ``[L]``.

        A pair is (row, column) of the tables ``[P, n, ...]`` of its kernels.
        """
        index = [self.space.index(int(width)) for width in policy]
        return {
            layer.info.name: (layer, (layer.info.norm_row(index, len(layer.kernels[0].count)), own))
            for layer, own in zip(self.layers, index, strict=True)
        }

    def check_calibrated(self, policy: np.ndarray) -> None:
        """Checks that training used each pair of a policy ``[L]``. Raises UserError."""
        infos = [layer.info for layer in self.layers]
        missing = find_uncalibrated(infos, self.counts, self.space.choices, policy[None])
        if missing:
            name, predecessor, own = missing[0]
            raise UserError(
                f"policy: layer {name} at {own} bits after {predecessor or 'any'} was never "
                "visited in training; its batch norm is unknown",
                "uncalibrated",
            )

    @property
    def counts(self) -> list[np.ndarray]:
        """Number of training steps that used each pair: int32 ``[P, n]`` for each layer."""
        # All kernels of a layer are used together; the least count also refuses a damaged file.
        return [np.min([kernel.count for kernel in layer.kernels], 0) for layer in self.layers]


def truncate_bits(codes: Any, shift: Any, kind: str, code_bits: int) -> Any:
    """Returns integer codes of a narrower width. See `WeightQuantizer.truncate`."""
    return WEIGHT_QUANTIZERS[kind].truncate(codes, shift, code_bits)


def to_integer_model(
    model: Network,
    variables: Mapping[str, Any],
    *,
    mean: Any,
    std: Any,
    classes: tuple[str, ...],
    weights_digest: str,
    about: Mapping[str, Any] | None = None,
) -> IntegerModel:
    """Turns a trained network into integers.

    The result computes what ``model.apply`` computes in evaluation: the codes and their sums are
    equal, and the multipliers and offsets are rounded as in the model.

    Args:
      model, variables: of the last stage of training.
      mean, std: float32 ``[C]`` of the training data, in units of 0..255.
      classes: names of the classes.
      weights_digest: digest of the variables.
      about: JSON values that files keep.

    Returns:
      an IntegerModel, which `run_integer` runs and the exports write.

    Raises:
      UserError: a full-precision baseline, or a network whose weights are not quantised yet.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import bitmixer_jax as bm
      >>> settings = dict(num_classes=2, image_shape=(4, 4, 1), width=1, stage_sizes=(1,))
      >>> model = bm.create_model("resnet8", **settings)
      >>> images, policy = jnp.ones((1, 4, 4, 1)), jnp.array([2, 4])
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), images, policy)
      >>> variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
      >>> about = dict(mean=[0], std=[1], classes=("a", "b"), weights_digest="")
      >>> network = to_integer_model(model, variables, **about)
      >>> network.layers[0].kernels[0].codes.dtype, network.code_bits
      (dtype('int8'), 4)
    """
    if model.quant.space is None or not model.quant.weights:
        raise UserError(
            "export: the weights of this network are not quantised (a full-precision baseline, or "
            "stage 1)",
            "no-widths",
        )
    params, stats = variables["params"], variables["batch_stats"]

    def layer(info: LayerInfo, quant: QuantConfig) -> Layer:
        own, norms = params[info.name], stats[info.name]
        assert quant.space is not None
        step_sizes = [activation_step_size(own["input"]["step"], i) for i in range(quant.n)]
        kernels = []
        for kernel in info.kernels:
            tables = params[info.name][f"{kernel.name}_norm"] | norms[f"{kernel.name}_norm"]
            kernels.append(_kernel(kernel, own[kernel.name], tables, step_sizes, quant))
        return Layer(info=info, step_size=_floats(jnp.stack(step_sizes)), kernels=tuple(kernels))

    first_last = model.first_last_quant()
    head = params["head"]
    stem: FloatStem | Layer
    if first_last.space is None:
        tables = params["stem"]["conv_norm"] | stats["stem"]["conv_norm"]
        multiplier, offset = _fold(tables, 0, 0, jnp.float32(1), first_last.epsilon)
        stem = FloatStem(
            info=model.stem_conv,
            kernel=_floats(params["stem"]["conv"]["kernel"]),
            multiplier=_floats(multiplier),
            offset=_floats(offset),
        )
        last = Head(kernel=_floats(head["kernel"]), bias=_floats(head["bias"]), step_sizes=None)
    else:
        stem = layer(model.stem_info, first_last)
        quantize = first_last.quantizer.quantize
        codes, step_size = quantize(head["kernel"], head["step"], 0, first_last.space)
        input_step_size = activation_step_size(params["head_input"]["step"], 0)
        last = Head(
            kernel=np.asarray(codes, np.int8),
            bias=_floats(head["bias"]),
            step_sizes=(float(input_step_size), float(step_size)),
        )
    return IntegerModel(
        space=model.space,
        weight_quantizer=model.quant.weight_quantizer,
        code_bits=model.space.widest,
        graph=model.graph,
        layers=tuple(layer(info, model.quant) for info in model.layers),
        stem=stem,
        head=last,
        image_shape=model.image_shape,
        mean=_floats(mean),
        std=_floats(std),
        classes=tuple(classes),
        weights_digest=weights_digest,
        about=dict(about or {}),
    )


def _kernel(
    info: KernelInfo,
    params: Mapping[str, Any],
    tables: Mapping[str, Any],
    input_step_sizes: list[Any],
    quant: QuantConfig,
) -> Kernel:
    assert quant.space is not None
    quantizer, space = quant.quantizer, quant.space
    codes, multipliers, offsets = [], [], []
    for own in range(space.n):
        found, step_size = quantizer.quantize(params["kernel"], params["step"], own, space)
        codes.append(np.asarray(jnp.floor(found), np.int8))
        folded = [
            _fold(tables, predecessor, own, input_step_sizes[own] * step_size, quant.epsilon)
            for predecessor in range(len(tables["count"]))
        ]
        multipliers.append([m for m, _ in folded])
        offsets.append([o for _, o in folded])
    lowest, highest = integer_range(space.widest, True)
    assert all(lowest <= c.min() and c.max() <= highest for c in codes)
    return Kernel(
        info=info,
        codes=np.stack(codes[-1:] if quantizer.nested else codes),
        step_size=_floats(params["step"]),
        multiplier=_floats(jnp.asarray(multipliers)).swapaxes(0, 1),
        offset=_floats(jnp.asarray(offsets)).swapaxes(0, 1),
        count=np.asarray(tables["count"], np.int32),
    )


def _fold(
    tables: Mapping[str, Any], predecessor: int, own: int, step_size: Any, epsilon: float
) -> Any:
    pair = (predecessor, own)
    scale, bias, mean, var = (
        jnp.asarray(tables[k])[pair] for k in ("scale", "bias", "mean", "var")
    )
    # Compiled, as in the network: there XLA contracts bias - gain * mean into one rounding.
    return jax.jit(fold)(scale, bias, mean, var, step_size, epsilon)


def _floats(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


__getattr__ = deprecated.module_getattr(__name__)
