"""Quantisers with learned step sizes: integer codes, a step size, and gradients of both.

A quantiser returns ``(codes, step_size)``; the quantised values are ``codes * step_size``. Codes
are whole numbers (or halves between them) in floating point. So a convolution of codes is exact,
and the step sizes multiply its result afterwards.

`lsq` holds what all quantisers share and the quantiser of activations; `weights` holds one class
for each quantiser of weights, in `WEIGHT_QUANTIZERS`.
"""

from bitmixer_jax import deprecated
from bitmixer_jax.quantizers.lsq import (
    activation_codes,
    activation_step_size,
    code_histogram,
    gradient_scale,
    init_step_size,
    integer_range,
)
from bitmixer_jax.quantizers.weights import (
    FIRST_LAST_QUANTIZER,
    WEIGHT_QUANTIZERS,
    WeightQuantizer,
    step_size_count,
    weight_codes,
)

__all__ = [
    "FIRST_LAST_QUANTIZER",
    "WEIGHT_QUANTIZERS",
    "WeightQuantizer",
    "activation_codes",
    "activation_step_size",
    "code_histogram",
    "gradient_scale",
    "init_step_size",
    "integer_range",
    "step_size_count",
    "weight_codes",
]

__getattr__ = deprecated.module_getattr(__name__)
