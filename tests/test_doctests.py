"""The examples in docstrings run and print what they say; each takes about a second on a CPU."""

import doctest
import importlib
import pkgutil

import pytest

import bitmixer_jax

OPTIONAL = {"torch", "onnx", "onnxruntime", "flatbuffers", "simplejpeg", "cv2", "array_record"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(bitmixer_jax.__path__, "bitmixer_jax.")
    if not module.name.endswith("__main__")
)


def test_the_modules_are_found():
    assert {"bitmixer_jax.quantizers", "bitmixer_jax.training.step"} <= set(MODULES)


@pytest.mark.parametrize("name", ["bitmixer_jax", *MODULES])
def test_examples_of_a_module(name, tmp_path, monkeypatch):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    monkeypatch.chdir(tmp_path)  # where an example may write
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    said = []
    runner = doctest.DocTestRunner(optionflags=flags)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
