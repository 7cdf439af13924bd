"""What tests share: a tiny configuration, and runs of it that were trained once and are stored."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

HERE = pathlib.Path(__file__).parent
TINY = HERE / "tiny_config.py"
ARCHIVE = HERE / "stored" / "tiny.tar.gz"  # made by stored/make_tiny.py
MOST_MAPPINGS = 30_000  # of the 65,530 that Linux allows a process


def pytest_configure(config):
    """Compiles fast, and keeps programmes between tests, processes and sessions.

    Most of the time is XLA. ``make test-all`` sets JAX_DISABLE_MOST_OPTIMIZATIONS=0, so that what
    users run is tested as well.
    """
    cache = config.rootpath / config.getini("cache_dir") / "d" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.fixture(scope="module", autouse=True)
def _release_programmes():
    """Drops what was compiled before there is too much of it: programmes are mapped into memory."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if not mappings.exists() or mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
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
def stored_runs(tmp_path_factory):
    """Folder with the stored runs of the tiny configuration; tests that write copy them first."""
    folder = tmp_path_factory.mktemp("tiny")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def trained(stored_runs):
    """Workdir of a tiny run through the three stages: 2 + 6 + 80 steps."""
    return stored_runs / "run"


@pytest.fixture(scope="session")
def trained_float(stored_runs):
    """Workdir of a tiny full-precision baseline: 8 steps."""
    return stored_runs / "float"


@pytest.fixture(scope="session")
def command():
    """``command("evaluate", ...)``: runs the command line in a process of its own."""

    def run(*words, **changes):
        environment = {**os.environ, **{k: v for k, v in changes.items() if v is not None}}
        for name in (name for name, value in changes.items() if value is None):
            environment.pop(name, None)
        return subprocess.run(
            [sys.executable, "-m", "bitmixer_jax.cli", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
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
