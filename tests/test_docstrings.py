"""The examples in docstrings run and give what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "quantizers.lsq",
        "quantizers.weights",
        "layers",
        "pairs",
        "models",
        "models.network",
        "export.integer_model",
        "export.integer_engine",
        "export.packed",
    ],
)
def test_the_examples_of_a_module_run(name):
    found = doctest.testmod(importlib.import_module(f"bitmixer_jax.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
