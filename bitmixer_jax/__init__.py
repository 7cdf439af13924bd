"""Networks whose layers change bit-width at runtime: Bit-Mixer (ICCV 2021) in JAX and Flax.

    import bitmixer_jax as bm

    trained = bm.train(config, "runs/digits")          # or bm.load("runs/digits")
    bm.evaluate(trained, random=100)                   # test accuracies, by three protocols
    found = bm.search_policy(trained, "bitops=60%")    # the best policy within a budget
    bm.export_network(trained, "digits.onnx", format="onnx")
    runtime = bm.Runtime.load("runs/digits")           # switches widths between calls

The names are listed in ``__init__.pyi``. They load on first use, so that a command such as
``bitmixer --help`` answers at once.
"""

import lazy_loader

from bitmixer_jax import deprecated
from bitmixer_jax.version import __version__ as __version__

deprecated.install()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
