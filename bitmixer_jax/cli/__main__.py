"""``python -m bitmixer_jax.cli``."""

from bitmixer_jax.cli import command_line

command_line()
