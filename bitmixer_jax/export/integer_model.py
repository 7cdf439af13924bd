"""What leaves JAX: a trained network as integers, folded norms and a description of its wiring.

Every export and the integer engine are made from this one form. A kernel is stored once, as signed
integers of the widest width; for each pair of widths its batch norm, its step size and that of its
input are folded into one multiplier and one offset per channel, so that

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
from bitmixer_jax.policy import BitSpace
from bitmixer_jax.quantizers import activation_step, integer_range, weight_codes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """A convolution in integers.

    Attributes:
      info: shapes.
      codes: int8 ``[1, kh, kw, C_in / groups, C_out]``, of ``IntegerModel.code_bits``; an engine
        convolves those of `truncate_bits`. ``[n, ...]``, one set per width, if the quantiser is
        not nested.
      step: float32 ``[1]`` or ``[n]`` step sizes (already in ``multiplier``).
      multiplier, offset: float32 ``[P, n, C_out]``.
      count: int32 ``[P, n]`` training steps that visited each pair; 0: its norm means nothing.
    """

    info: KernelInfo
    codes: np.ndarray
    step: np.ndarray
    multiplier: np.ndarray
    offset: np.ndarray
    count: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A quantised layer: its input is quantised once, each kernel reads the codes.

    Attributes:
      info: of the layer table.
      step: float32 ``[n]`` step size of the input at each width.
      kernels: as in ``info``.
    """

    info: LayerInfo
    step: np.ndarray
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
      steps: None if real-valued; else (step of the input, step of the kernel), float32.
    """

    kernel: np.ndarray
    bias: np.ndarray
    steps: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class IntegerModel:
    """A network as integers.

    Attributes:
      space: the choices of width.
      weight_quantizer: one of ``quantizers.WEIGHT_QUANTIZERS``.
      code_bits: width of the nested codes that kernels hold: the widest choice, or what there is of
        it in a truncated file.
      graph: how layers are connected.
      layers: in the order of a policy.
      stem: a FloatStem, or a Layer of one width (8 bits).
      head: the last layer.
      image_shape: ``(H, W, C)``.
      mean, std: float32 ``[C]`` in units of 0..255: images are normalised as (x - mean) / std.
      classes: their names.
      weights_digest: of the variables it was made from.
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
    def half(self) -> float:
        """What is added to integer weight codes: floor quantisers re-centre by a half."""
        return 0.5 if self.weight_quantizer == "floor" else 0.0

    def check_calibrated(self, policy: np.ndarray) -> None:
        """Raises UserError where a policy ``[L]`` needs a pair that no training step visited."""
        index = np.searchsorted(self.space.choices, policy)
        for layer, own in zip(self.layers, index, strict=True):
            for kernel in layer.kernels:
                predecessor = index[layer.info.predecessor] if len(kernel.count) > 1 else 0
                if kernel.count[predecessor, own] == 0:
                    raise UserError(
                        f"policy: layer {layer.info.name} at {self.space.choices[own]} bits after "
                        f"{self.space.choices[predecessor]} was never visited in training; "
                        "its batch norm is unknown"
                    )


def truncate_bits(codes: Any, shift: Any, kind: str, code_bits: int) -> Any:
    """Integer codes of a narrower width: ``shift`` = ``code_bits`` - width planes are dropped.

    Nested quantisers only. Works on numpy and jax arrays; ``shift`` may be traced.
    """
    if kind == "floor":
        return codes >> shift
    wide = codes.astype("int32")  # the half that is added may leave int8
    top = (1 << (code_bits - 1 - shift)) - 1
    rounded = (wide + ((1 << shift) >> 1)) >> shift
    return (rounded - (rounded - top) * (rounded > top)).astype(codes.dtype)


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

    Args:
      model, variables: as after the last stage.
      mean, std, classes: of the training data.
      weights_digest: of the variables.
      about: JSON values to keep.

    Raises:
      UserError: a float twin, or a network whose weights are not quantised yet.
    """
    if model.quant.space is None or not model.quant.weights:
        raise UserError(
            "export: the weights of this network are not quantised (a float twin, or stage 1)"
        )
    params, stats = variables["params"], variables["batch_stats"]

    def layer(info: LayerInfo, quant: QuantConfig) -> Layer:
        own, norms = params[info.name], stats[info.name]
        assert quant.space is not None
        steps = [activation_step(own["input"]["step"], i) for i in range(quant.n)]
        kernels = []
        for kernel in info.kernels:
            tables = params[info.name][f"{kernel.name}_norm"] | norms[f"{kernel.name}_norm"]
            kernels.append(_kernel(kernel, own[kernel.name], tables, steps, quant))
        return Layer(info=info, step=_floats(jnp.stack(steps)), kernels=tuple(kernels))

    ends = model.first_last_quant()
    head = params["head"]
    stem: FloatStem | Layer
    if ends.space is None:
        tables = params["stem"]["conv_norm"] | stats["stem"]["conv_norm"]
        multiplier, offset = _fold(tables, 0, 0, jnp.float32(1), ends.epsilon)
        stem = FloatStem(
            info=model.stem_conv,
            kernel=_floats(params["stem"]["conv"]["kernel"]),
            multiplier=_floats(multiplier),
            offset=_floats(offset),
        )
        last = Head(kernel=_floats(head["kernel"]), bias=_floats(head["bias"]), steps=None)
    else:
        stem = layer(model.stem_info, ends)
        codes, step = weight_codes(
            head["kernel"], head["step"], 0, ends.space, ends.weight_quantizer
        )
        input_step = activation_step(params["head_input"]["step"], 0)
        last = Head(
            kernel=np.asarray(codes, np.int8),
            bias=_floats(head["bias"]),
            steps=(float(input_step), float(step)),
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
    input_steps: list[Any],
    quant: QuantConfig,
) -> Kernel:
    assert quant.space is not None
    kind, space = quant.weight_quantizer, quant.space
    codes, multipliers, offsets = [], [], []
    for own in range(space.n):
        found, step = weight_codes(params["kernel"], params["step"], own, space, kind)
        codes.append(np.asarray(jnp.floor(found), np.int8))
        folded = [
            _fold(tables, predecessor, own, input_steps[own] * step, quant.epsilon)
            for predecessor in range(len(tables["count"]))
        ]
        multipliers.append([m for m, _ in folded])
        offsets.append([o for _, o in folded])
    nested = kind != "independent"
    lowest, highest = integer_range(space.widest, True)
    assert all(lowest <= c.min() and c.max() <= highest for c in codes)
    return Kernel(
        info=info,
        codes=np.stack(codes[-1:] if nested else codes),
        step=_floats(params["step"]),
        multiplier=_floats(jnp.asarray(multipliers)).swapaxes(0, 1),
        offset=_floats(jnp.asarray(offsets)).swapaxes(0, 1),
        count=np.asarray(tables["count"], np.int32),
    )


def _fold(tables: Mapping[str, Any], predecessor: int, own: int, step: Any, epsilon: float) -> Any:
    pair = (predecessor, own)
    scale, bias, mean, var = (
        jnp.asarray(tables[k])[pair] for k in ("scale", "bias", "mean", "var")
    )
    # Compiled, as in the network: there XLA contracts bias - gain * mean into one rounding.
    return jax.jit(fold)(scale, bias, mean, var, step, epsilon)


def _floats(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


__getattr__ = deprecated.module_getattr(__name__)
