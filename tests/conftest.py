"""What tests share: a tiny configuration, and runs of it that are trained once."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

TINY = pathlib.Path(__file__).parent / "tiny_config.py"


def pytest_configure(config):
    """Keeps compiled programmes between tests, processes and sessions: most of the time is XLA."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="module", autouse=True)
def _release_programmes():
    """Drops what a file compiled: all of it in one process meets the system's limit on mappings."""
    yield
    import jax  # after `pytest_configure`

    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_file():
    """Path of the tiny configuration, for --config."""
    return TINY


@pytest.fixture(scope="session")
def tiny():
    """``tiny("log_every=1", variant="float")``: the tiny configuration with settings changed."""
    from bitmixer_jax.training import load_config

    def make(*settings, variant=""):
        return load_config(f"{TINY}:{variant}", [f"--config.{setting}" for setting in settings])

    return make


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """Workdir of a tiny run through the three stages, with its report: 2 + 6 + 80 steps."""
    from bitmixer_jax.report import report
    from bitmixer_jax.training import train

    workdir = tmp_path_factory.mktemp("trained") / "run"
    report(train(tiny(), workdir))
    return workdir


@pytest.fixture(scope="session")
def trained_float(tiny, tmp_path_factory):
    """Workdir of a tiny float twin, with its report: 8 steps."""
    from bitmixer_jax.report import report
    from bitmixer_jax.training import train

    workdir = tmp_path_factory.mktemp("float") / "run"
    report(train(tiny(variant="float"), workdir))
    return workdir


@pytest.fixture(scope="session")
def command():
    """``command("evaluate", ...)``: runs the command line in a process of its own."""

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "bitmixer_jax.cli", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def jpegs():
    """The module experiments/make_jpegs.py, which makes pictures and folders of them."""
    path = pathlib.Path(__file__).parent.parent / "experiments" / "make_jpegs.py"
    spec = importlib.util.spec_from_file_location("make_jpegs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
