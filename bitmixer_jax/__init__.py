"""Networks whose layers change bit-width at runtime: Bit-Mixer (ICCV 2021) in JAX and Flax.

    import bitmixer_jax as bm

The names below load on first use, so that a command such as ``bitmixer --help`` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from bitmixer_jax import deprecated
from bitmixer_jax.version import __version__

if TYPE_CHECKING:
    from bitmixer_jax.controller import Controller
    from bitmixer_jax.cost import costs
    from bitmixer_jax.errors import UserError
    from bitmixer_jax.front import load_front
    from bitmixer_jax.models import create_model
    from bitmixer_jax.policy import (
        BitSpace,
        load_policy,
        sample_average,
        sample_mixed,
        sample_random,
        sample_uniform,
        save_policy,
        with_widths,
    )
    from bitmixer_jax.runtime import Runtime

deprecated.install()

_HOME = {
    "BitSpace": "policy",
    "load_policy": "policy",
    "sample_average": "policy",
    "sample_mixed": "policy",
    "sample_random": "policy",
    "sample_uniform": "policy",
    "save_policy": "policy",
    "with_widths": "policy",
    "Controller": "controller",
    "costs": "cost",
    "UserError": "errors",
    "load_front": "front",
    "create_model": "models",
    "Runtime": "runtime",
}
__all__ = [
    "BitSpace",
    "Controller",
    "Runtime",
    "UserError",
    "__version__",
    "costs",
    "create_model",
    "load_front",
    "load_policy",
    "sample_average",
    "sample_mixed",
    "sample_random",
    "sample_uniform",
    "save_policy",
    "with_widths",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
