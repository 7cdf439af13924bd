"""The packages data and preparation: what imports what, and old names."""

import pkgutil
import subprocess
import sys

import pytest

from bitmixer_jax import data, preparation


def test_the_core_does_not_import_preparation():
    script = (
        "import pkgutil, importlib, sys, bitmixer_jax.data as data\n"
        "for module in pkgutil.iter_modules(data.__path__, 'bitmixer_jax.data.'):\n"
        "    importlib.import_module(module.name)\n"
        "print([name for name in sys.modules if 'preparation' in name])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["[]"], done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [("prepare", preparation.prepare), ("Streamed", data.StreamingDataset)],
)
def test_old_names_work_with_a_warning(old, new):
    with pytest.warns(
        DeprecationWarning, match=rf"data\.{old} is deprecated; use .*{new.__name__}"
    ):
        assert getattr(data, old) is new
    assert old not in data.__all__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = data.nothing


MODULES = [
    module.name
    for package in (data, preparation)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]
