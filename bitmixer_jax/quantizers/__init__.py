"""Quantisers with learned step sizes: integer codes, a step size, and gradients of both.

A quantiser returns ``(codes, step_size)``; the quantised values are ``codes * step_size``. Codes
are whole numbers (or halves between them) in floating point. So a convolution of codes is exact,
and the step sizes multiply its result afterwards.

`lsq` holds what all quantisers share and the quantiser of activations; `weights` holds one class
for each quantiser of weights, in `WEIGHT_QUANTIZERS`.
"""

from bitmixer_jax import deprecated
from bitmixer_jax.quantizers.lsq import activation_codes as activation_codes
from bitmixer_jax.quantizers.lsq import activation_step_size as activation_step_size
from bitmixer_jax.quantizers.lsq import code_histogram as code_histogram
from bitmixer_jax.quantizers.lsq import gradient_scale as gradient_scale
from bitmixer_jax.quantizers.lsq import init_step_size as init_step_size
from bitmixer_jax.quantizers.lsq import integer_range as integer_range
from bitmixer_jax.quantizers.weights import FIRST_LAST_QUANTIZER as FIRST_LAST_QUANTIZER
from bitmixer_jax.quantizers.weights import WEIGHT_QUANTIZERS as WEIGHT_QUANTIZERS
from bitmixer_jax.quantizers.weights import WeightQuantizer as WeightQuantizer
from bitmixer_jax.quantizers.weights import step_size_count as step_size_count
from bitmixer_jax.quantizers.weights import weight_codes as weight_codes

__getattr__ = deprecated.module_getattr(__name__)
