"""``python -m bitmixer_jax.cli``."""

import sys

from bitmixer_jax.cli import main

sys.exit(main())
