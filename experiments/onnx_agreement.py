"""Counts the images that keep their class in each kind of ONNX file, on trained networks.

    python experiments/onnx_agreement.py runs/net20-s0 runs/net20-s1 runs/net20-s2 --json out.json

Uses uniform widths and seven random policies of each network, on test images, in onnxruntime.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import onnxruntime

from bitmixer_jax.evaluation import random_policies
from bitmixer_jax.export.export import integer_model_of
from bitmixer_jax.export.onnx_graph import policy_model, save_onnx, switchable_model
from bitmixer_jax.export.onnx_int8 import int8_model, stream_ranges
from bitmixer_jax.export.onnx_runner import OnnxRunner
from bitmixer_jax.files import check_new
from bitmixer_jax.runtime import Runtime
from bitmixer_jax.trained import load


def rows_of(workdir, number, data_dir, folder):
    """One row for each policy."""
    trained = load(workdir)
    model, runtime = trained.model, Runtime.load(workdir)
    test = trained.load_split(trained.run.test_split, data_dir).subset(np.arange(number))
    training = trained.load_split(trained.run.train_split, data_dir).subset(np.arange(500)).images
    found, layers = integer_model_of(trained), model.num_layers
    save_onnx(folder / "all.onnx", switchable_model(found), overwrite=True)
    levels = {"switchable": "default", "switchable, basic optimisation": "basic"}
    runners = {name: OnnxRunner(folder / "all.onnx", level) for name, level in levels.items()}
    policies = [model.space.uniform(width, layers) for width in (4, 3, 2)]
    policies += list(random_policies(model, 7, 0))

    def compared(logits, wanted):
        return {
            "agreement": float((logits.argmax(-1) == wanted.argmax(-1)).mean()),
            "share above 1e-4": float((np.abs(logits - wanted).max(-1) > 1e-4).mean()),
            "top1": float((logits.argmax(-1) == test.labels).mean()),
        }

    for place, policy in enumerate(policies):
        wanted = runtime.predict(test.images, policy)
        row = {"widths": policy.tolist(), "top1": float((wanted.argmax(-1) == test.labels).mean())}
        for name, runner in runners.items():
            row[name] = compared(runner(test.images, policy), wanted)
        ranges = stream_ranges(found, policy, training)
        forms = {"fast": int8_model(found, policy, ranges)}
        if place < 5:
            forms["one policy"] = policy_model(found, policy)
        for name, exported in forms.items():
            save_onnx(folder / "one.onnx", exported, overwrite=True)
            row[name] = compared(OnnxRunner(folder / "one.onnx")(test.images), wanted)
        print(json.dumps(row), flush=True)
        yield row


def main():
    """Reads the command line, compares, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", help="folders of runs, one for each seed")
    parser.add_argument("--images", type=int, default=10000, help="test images")
    parser.add_argument("--data_dir", help="where the data are")
    parser.add_argument("--json", type=pathlib.Path, required=True, help="write the result there")
    given = parser.parse_args()
    check_new(given.json, "--json")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, workdir in enumerate(given.workdirs):
            for row in rows_of(workdir, given.images, given.data_dir, pathlib.Path(folder)):
                rows.append({"seed": seed, **row})
    about = {"images": given.images, "onnxruntime": onnxruntime.__version__}
    given.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
