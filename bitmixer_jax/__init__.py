"""Networks whose layers change bit-width at runtime: Bit-Mixer (ICCV 2021) in JAX and Flax.

    import bitmixer_jax as bm

The names below load on first use, so that a command such as ``bitmixer --help`` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from bitmixer_jax.version import __version__

if TYPE_CHECKING:
    from bitmixer_jax.bits import (
        BitSpace,
        load_policy,
        sample_average,
        sample_mixed,
        sample_random,
        sample_uniform,
        save_policy,
    )
    from bitmixer_jax.errors import UserError
    from bitmixer_jax.models import create_model

_HOME = {
    "BitSpace": "bits",
    "load_policy": "bits",
    "sample_average": "bits",
    "sample_mixed": "bits",
    "sample_random": "bits",
    "sample_uniform": "bits",
    "save_policy": "bits",
    "UserError": "errors",
    "create_model": "models",
}
__all__ = [
    "BitSpace",
    "UserError",
    "__version__",
    "create_model",
    "load_policy",
    "sample_average",
    "sample_mixed",
    "sample_random",
    "sample_uniform",
    "save_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
