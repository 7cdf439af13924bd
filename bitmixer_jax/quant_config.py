"""The settings of quantisation of a network."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bitmixer_jax import quantizers
from bitmixer_jax.errors import UserError
from bitmixer_jax.policy import BitSpace

Norm = Literal["transitional", "per_width"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Says what is quantised in a network, and how.

        activations  weights   used by
        False        False     the full-precision baseline
        True         False     stage 1 (our reading of the paper)
        True         True      stages 2 and 3, inference

    The variables are the same in the last two cases, so a stage takes over the variables of the
    stage before as they are.

    Attributes:
      space: widths that a layer may take; None makes the full-precision baseline, which has one
        plain BN for each kernel.
      activations: whether the input of each layer is quantised.
      weights: whether its kernels are quantised.
      weight_quantizer: a name in ``quantizers.WEIGHT_QUANTIZERS``.
      norm: "transitional" (a BN for each pair of widths) or "per_width" (a BN for each own width).
      momentum: of the running statistics, 0..1.
      epsilon: what is added to the variance.
      axis_name: device axis over which batch statistics are averaged; None: they are not.
      compute_dtype: "float32" or "bfloat16", of the operands of a convolution of codes ("bfloat16"
        is exact up to 8 bits, and sums are float32); in a baseline, of all convolutions.

    Raises:
      UserError: a value that is not allowed, or weights without activations.

    Examples:
      >>> from bitmixer_jax.layers import QuantConfig
      >>> quant = QuantConfig(weight_quantizer="double")
      >>> quant.space.choices, quant.n, quant.baseline().weights
      ((2, 3, 4), 3, False)
    """

    space: BitSpace | None = dataclasses.field(default_factory=BitSpace)
    activations: bool = True
    weights: bool = True
    weight_quantizer: str = "floor"
    norm: Norm = "transitional"
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        for value, allowed, what in (
            (self.weight_quantizer, tuple(quantizers.WEIGHT_QUANTIZERS), "weight quantiser"),
            (self.norm, ("transitional", "per_width"), "norm"),
            (self.compute_dtype, ("float32", "bfloat16"), "compute_dtype"),
        ):
            if value not in allowed:
                raise UserError(f"{what}: got {value!r}; choose from {', '.join(allowed)}")
        if self.space is None:
            object.__setattr__(self, "activations", False)
            object.__setattr__(self, "weights", False)
        if self.weights and not self.activations:
            raise UserError(
                "quantisation: weights without activations is not a stage; quantise both",
                "conflict",
            )

    @property
    def n(self) -> int:
        """Number of widths; 1 for the baseline."""
        return 1 if self.space is None else self.space.n

    @property
    def quantizer(self) -> quantizers.WeightQuantizer:
        """The weight quantiser, which answers all that depends on the choice of it."""
        return quantizers.WEIGHT_QUANTIZERS[self.weight_quantizer]

    def baseline(self) -> QuantConfig:
        """Returns the same settings for the full-precision baseline: nothing is quantised."""
        return dataclasses.replace(self, space=None)
