"""Mutates files at random: each must fail with one line, or change nothing.

    python experiments/fuzz_files.py --packed runs/net.packed --number 100000
    python experiments/fuzz_files.py --packed runs/net.packed --onnx runs/net.onnx --number 3000
    python experiments/fuzz_files.py --workdir runs/digits --number 1000

Prints how many mutations failed with a clear message, and how many were harmless. A harmless one
changes bytes that no reader uses, such as spaces. Another exception, a wrong load or a hang ends
the script. In a workdir, config.json and metrics.jsonl have no checksum, so they may also read as
other settings and other numbers. The arrays of a checkpoint may not.
"""

import argparse
import collections
import pathlib
import shutil
import tempfile
import time

import numpy as np

from bitmixer_jax import BitSpace, load_policy, save_policy
from bitmixer_jax.errors import UserError
from bitmixer_jax.export.packed import pack, unpack
from bitmixer_jax.report import plot_curves
from bitmixer_jax.trained import load
from bitmixer_jax.training.checkpoints import digest

SLOW = 30.0  # seconds; a file takes milliseconds, a plot one second


def mutated(data, rng):
    """One to four changes: a bit, a byte, bytes removed, put in or copied, a cut."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not found:
            break
        place, other = (int(x) for x in rng.integers(len(found), size=2))
        count = int(rng.integers(1, 17))
        match rng.integers(7):
            case 0:
                found[place] ^= 1 << int(rng.integers(8))
            case 1:
                found[place] = int(rng.integers(256))
            case 2:
                del found[place : place + count]
            case 3:
                found[place:place] = rng.bytes(count)
            case 4:
                found[place : place + count] = found[other : other + count]
            case 5:
                found[place:place] = b"9" * count
            case 6:
                del found[place:]
    return bytes(found)


def fuzz(what, data, load, same, number, seed):
    """Counts outcomes of ``number`` mutations."""
    rng = np.random.default_rng(seed)
    outcomes, slowest = collections.Counter(), 0.0
    for _ in range(number):
        changed = mutated(data, rng)
        start = time.perf_counter()
        try:
            found = load(changed)
        except UserError as error:
            outcomes["failed in one line"] += 1
            if "\n" in str(error):
                raise SystemExit(f"{what}: more than one line: {error}") from None
        else:
            if not same(found, changed):
                pathlib.Path("fuzz-failure").write_bytes(changed)
                raise SystemExit(f"{what}: a wrong load; the file is in ./fuzz-failure")
            outcomes["changed nothing"] += 1
        slowest = max(slowest, time.perf_counter() - start)
        if slowest > SLOW:
            raise SystemExit(f"{what}: took {slowest:.0f} s")
    print(f"{what}: {number} mutations: {dict(outcomes)}; slowest {1e3 * slowest:.0f} ms")


def main():
    """Reads the command line and fuzzes the formats."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packed", type=pathlib.Path)
    parser.add_argument("--workdir", type=pathlib.Path, help="a copy of it is mutated")
    parser.add_argument("--onnx", type=pathlib.Path, help="a switchable export of version 2")
    parser.add_argument("--number", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.packed:
        fuzz_exports(given)
    if given.workdir:
        with tempfile.TemporaryDirectory() as folder:
            fuzz_workdir(given, pathlib.Path(folder) / "run")


def fuzz_exports(given):
    """Fuzzes a packed file, a policy file, and an ONNX file if there is one."""
    data = given.packed.read_bytes()
    whole = unpack(data, "file")
    prefixes = {pack(unpack(data, "file", planes)) for planes in _usable(data)}

    def same_network(found, changed):
        """Unchanged, or cut after a plane: then it is the narrower network, as documented."""
        return pack(found) in prefixes if data.startswith(changed) else pack(found) == pack(whole)

    fuzz("packed", data, lambda b: unpack(b, "file"), same_network, given.number, given.seed)
    names, space = whole.names, BitSpace(whole.space.choices)
    policy = np.resize(space.choices, len(names)).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "policy.json"
        save_policy(path, policy, names, space, note="text", numbers=[1, 2.5])
        text = path.read_bytes()

        def load(changed):
            path.write_bytes(changed)
            return load_policy(path, names, space)

        def same_policy(found, changed):
            return np.array_equal(found, policy)

        fuzz("policy", text, load, same_policy, given.number, given.seed)
        if given.onnx:
            fuzz_onnx(given, pathlib.Path(folder) / "net.onnx")


def fuzz_onnx(given, path):
    """Fuzzes an ONNX file, which is written to ``path`` each time."""
    from bitmixer_jax.export.onnx_runner import OnnxRunner

    whole = OnnxRunner(given.onnx)
    images = np.random.default_rng(0).integers(256, size=(2, *whole.image_shape)).astype(np.uint8)
    wanted = whole(images, whole.space.widest)

    def load(changed):
        path.write_bytes(changed)
        return OnnxRunner(path)

    def same(found, changed):
        return np.array_equal(found(images, whole.space.widest), wanted)

    fuzz("onnx", given.onnx.read_bytes(), load, same, given.number, given.seed)


def fuzz_workdir(given, copy):
    """Fuzzes the files of a workdir, in a copy of it."""
    shutil.copytree(given.workdir, copy)
    wanted = digest(load(copy).variables)

    def through(path, read):
        def run(changed):
            path.write_bytes(changed)
            return read()

        return run

    def same(found, changed):
        return True

    def values():
        return digest(load(copy).variables)

    def curves():
        plot_curves(copy / "curves.png", copy)

    for name, read in (("config.json", values), ("metrics.jsonl", curves)):
        path = copy / name
        whole = path.read_bytes()
        fuzz(name, whole, through(path, read), same, given.number, given.seed)
        path.write_bytes(whole)
    newest = max(int(path.name) for path in (copy / "checkpoints").iterdir())
    files = sorted(p for p in (copy / "checkpoints" / str(newest)).rglob("*") if p.is_file())
    for path in files:
        whole = path.read_bytes()
        each = max(1, given.number // len(files))
        name = str(path.relative_to(copy))
        fuzz(name, whole, through(path, values), lambda d, _: d == wanted, each, given.seed)
        path.write_bytes(whole)


def _usable(data):
    for planes in range(1, 9):
        try:
            unpack(data, "file", planes)
        except UserError:
            continue
        yield planes


if __name__ == "__main__":
    main()
