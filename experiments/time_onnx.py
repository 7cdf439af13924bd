"""Times ONNX exports in onnxruntime against the full-precision float32 baseline, in one run.

    python experiments/time_onnx.py --json experiments/results/onnx_speed/results.json

The networks take turns, one call each, so that a busy machine slows all alike. Weights are random,
because time does not depend on them.
"""

import argparse
import json
import pathlib
import platform
import tempfile
import time

import jax
import numpy as np

import bitmixer_jax as bm
from bitmixer_jax.errors import UserError
from bitmixer_jax.export.integer_model import to_integer_model
from bitmixer_jax.export.onnx_builder import Builder, finish, head, oihw, real_ops
from bitmixer_jax.export.onnx_graph import policy_model, save_onnx, switchable_model
from bitmixer_jax.export.onnx_int8 import int8_model, stream_ranges
from bitmixer_jax.files import check_new


def network(name, ends):
    """An integer model of random weights."""
    model = bm.create_model(name, num_classes=1000, ends=ends)
    images = np.random.default_rng(0).normal(size=(1, *model.image_shape)).astype(np.float32)
    widest = (model.space.widest,) * model.num_layers
    start = jax.jit(lambda key: model.init(key, images, bits=widest, train=False))
    variables = jax.tree.map(np.asarray, dict(start(jax.random.key(0))))
    variables["batch_stats"] = jax.tree.map(
        lambda leaf: np.maximum(leaf, 1) if leaf.dtype == np.int32 else leaf,
        variables["batch_stats"],
    )
    classes = tuple(map(str, range(1000)))
    moments = dict(mean=[120.0] * 3, std=[60.0] * 3)
    return to_integer_model(model, variables, **moments, classes=classes, weights_digest="random")


def baseline(integer_model):
    """The same network in float32: convolutions with bias, nothing quantised."""
    b, rng = Builder(), np.random.default_rng(0)
    layers = {layer.info.name: layer for layer in integer_model.layers}

    def conv(x, info, name):
        shape = info.shape
        deviation = np.sqrt(2 / np.prod(shape[:3]))
        kernel = b.constant(oihw(rng.normal(size=shape) * deviation), name=f"{name}.kernel")
        return b.conv(x, kernel, info, b.constant(np.zeros(shape[-1]), name=f"{name}.bias"))

    def layer(node, x):
        infos = layers[node.layer].info.kernels
        return tuple(conv(x, info, f"{node.layer}.{info.name}") for info in infos)

    ops = {
        **real_ops(b),
        "stem": lambda node, x: conv(x, integer_model.stem.info, "stem"),
        "layer": layer,
        "head": lambda node, x: head(b, integer_model, x),
    }
    widest = np.full(len(integer_model.layers), integer_model.space.widest)
    return finish(b, integer_model, ops, opset=19, policy=widest, form="float32")


def main():
    """Reads the command line, measures, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    given = parser.parse_args()
    if given.json:
        check_new(given.json, "--json")
    import onnxruntime

    real, whole = network(given.model, "float"), network(given.model, "int8")
    rng = np.random.default_rng(0)
    some = rng.integers(256, size=(4, *real.image_shape), dtype=np.uint8)
    layers = len(real.layers)
    mixed = rng.choice(real.space.choices, layers).astype(np.int32)
    models = {"float32": baseline(real)}
    policies = {"4 bits": np.full(layers, 4, np.int32), "mixed": mixed}
    for name, policy in policies.items():
        ranges = stream_ranges(real, policy, some)
        models[f"one policy, {name}"] = policy_model(real, policy)
        models[f"fast, {name}"] = int8_model(real, policy, ranges)
        ranges = stream_ranges(whole, policy, some)
        models[f"fast, {name}, 8-bit ends"] = int8_model(whole, policy, ranges)
    models["switchable"] = switchable_model(real)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given.threads
    # Else the threads of one session spin on while the next is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    sessions, seconds = {}, {name: [] for name in models}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            path = pathlib.Path(folder) / "net.onnx"
            save_onnx(path, model, overwrite=True)
            feed = {"images": some[:1]}
            if name == "switchable":
                feed["policy"] = policies["mixed"].astype(np.int64)
            session = onnxruntime.InferenceSession(
                path.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
            session.run(None, feed)
            sessions[name] = (session, feed)
    for _ in range(given.repeats):
        for name, (session, feed) in sessions.items():
            begun = time.perf_counter()
            session.run(None, feed)
            seconds[name].append(time.perf_counter() - begun)
    rows = {}
    for name, each in seconds.items():
        low, middle, high = (1e3 * float(q) for q in np.quantile(each, (0.1, 0.5, 0.9)))
        rows[name] = {"ms": middle, "ms_10%": low, "ms_90%": high}
        for figure in ("ms", "ms_10%"):
            rows[name][f"float32_by_{figure}"] = rows["float32"][figure] / rows[name][figure]
        print(
            f"{name:32} {middle:7.2f} ms ({low:.2f} to {high:.2f}), "
            f"{rows[name]['float32_by_ms']:.2f} times as fast as float32 "
            f"({rows[name]['float32_by_ms_10%']:.2f} by the fastest tenth)",
            flush=True,
        )
    if given.json:
        about = {
            "model": given.model,
            "threads": given.threads,
            "repeats": given.repeats,
            "onnxruntime": onnxruntime.__version__,
            "machine": platform.machine(),
        }
        given.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"time_onnx: {error}") from None
