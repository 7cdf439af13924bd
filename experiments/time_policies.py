"""Times 64 policies in one compiled call, and one at a time: policies x images a second.

    python experiments/time_policies.py --workdir runs/net20-s0 --json out.json

One call saves what a call costs besides its arithmetic, so the gain shrinks with more images. The
full-precision baseline quantises nothing and has one plain batch norm. Its convolutions have the
same size, so its rate bounds what batching can give.
"""

import argparse
import json
import pathlib
import time
from functools import partial

import jax
import numpy as np

from bitmixer_jax import data as datasets
from bitmixer_jax.evaluation import Evaluator, random_policies
from bitmixer_jax.trained import load

POLICIES = 64


def seconds(evaluator, variables, policies, repeats):
    """Median time of scoring all policies, compilation left out."""
    evaluator.top1(variables, policies[:1])
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        evaluator.top1(variables, policies)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main():
    """Reads the command line, measures, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data_dir", help="where the data are")
    parser.add_argument("--json", type=pathlib.Path, help="write the result there")
    given = parser.parse_args()
    loaded = load(given.workdir)
    run, model, variables = loaded.run, loaded.model, loaded.variables
    variables = jax.device_put(variables, jax.local_devices()[0])
    policies = random_policies(model, POLICIES, 0)
    float_model = model.baseline()
    float_variables = jax.jit(partial(float_model.init, bits=None, train=False))(
        jax.random.key(0), np.zeros((1, *model.image_shape), np.float32)
    )
    data = datasets.load(run.dataset, run.train_split, given.data_dir or run.data_dir or None)
    rows = []
    for images in given.images:
        some = datasets.Dataset(
            data.name,
            data.split,
            data.images[:images],
            data.labels[:images],
            data.classes,
            data.mean,
            data.std,
        )
        rates = {}
        for name, number in (("one by one", 1), ("batch", POLICIES)):
            evaluator = Evaluator(model, some, data.mean, data.std, policies=number)
            elapsed = seconds(evaluator, variables, policies, given.repeats)
            rates[name] = POLICIES * images / elapsed
        evaluator = Evaluator(float_model, some, data.mean, data.std, policies=1)
        rates["baseline"] = (
            POLICIES * images / seconds(evaluator, float_variables, policies, given.repeats)
        )
        rows.append({"images": images, **rates, "ratio": rates["batch"] / rates["one by one"]})
        print(
            f"{images:5d} images: one by one {rates['one by one']:9.0f}, in one call "
            f"{rates['batch']:9.0f} policies x images/s, ratio {rows[-1]['ratio']:.2f}; "
            f"baseline {rates['baseline']:9.0f}",
            flush=True,
        )
    if given.json:
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        given.json.write_text(json.dumps({**about, "workdir": given.workdir, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
