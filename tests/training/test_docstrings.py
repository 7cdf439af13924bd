"""Examples in docstrings of training run and print what they say."""

import doctest
import importlib

import pytest

MODULES = (
    "distributed",
    "training.checkpoints",
    "training.config",
    "training.defaults",
    "training.losses",
    "training.metrics",
    "training.optimizer",
    "training.schedule",
    "training.stages",
    "training.workdir",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    result = doctest.testmod(importlib.import_module(f"bitmixer_jax.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
