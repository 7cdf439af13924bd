"""Makes local copies of data sets from the archives and files in which they are published."""

from bitmixer_jax.preparation.prepare import prepare

__all__ = ["prepare"]
