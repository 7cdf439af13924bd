"""Times a switch of policy: calls after a switch against calls without one.

    python experiments/time_switches.py --workdir runs/digits --json out.json

Both kinds take turns in one run, so that a busy machine slows both alike. The time of a call with a
switch is that of the switch and the call. The switches cycle through 32 random policies.
"""

import argparse
import itertools
import json
import pathlib
import sys
import time

import jax
import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.files import check_new
from bitmixer_jax.runtime import Runtime


def measure(runtime, images, calls):
    """Seconds of calls with and without a switch, and of the switches alone: ``[calls]`` each."""
    rng = np.random.default_rng(0)
    policies = rng.choice(runtime.space.choices, size=(32, len(runtime.names))).astype(np.int32)
    seconds = {name: np.zeros(calls) for name in ("with", "without", "switch")}
    runtime.predict(images)
    for i, policy in zip(range(calls), itertools.cycle(policies), strict=False):
        for kind in ("with", "without") if i % 2 else ("without", "with"):
            start = time.perf_counter()
            if kind == "with":
                runtime.set_policy(policy)
                seconds["switch"][i] = time.perf_counter() - start
            runtime.predict(images)
            seconds[kind][i] = time.perf_counter() - start
    return seconds


def main():
    """Reads the command line, measures, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, metavar="DIR[@STAGE]")
    parser.add_argument("--calls", type=int, default=1000, help="of each kind (default 1000)")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8, 64], help="of a call")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    given = parser.parse_args()
    if given.calls < 1:
        raise UserError(f"--calls {given.calls}: give 1 or more")
    if given.json:
        check_new(given.json, "--json")
    rows = []
    for number in given.images:
        runtime = Runtime.load(given.workdir, batch_size=number)
        shape = (number, *runtime.image_shape)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        seconds = measure(runtime, images, given.calls)
        row = {"images": number, "calls": given.calls, "compilations": runtime.traces}
        for name, average in (("mean", np.mean), ("median", np.median)):
            row[name] = {kind: 1e6 * float(average(s)) for kind, s in seconds.items()}
            row[name]["ratio"] = row[name]["with"] / row[name]["without"]
            print(
                f"{number:4d} images, {name:6}: with a switch {row[name]['with']:8.1f} us, without "
                f"{row[name]['without']:8.1f} us, ratio {row[name]['ratio']:.3f}; "
                f"the switch {row[name]['switch']:.1f} us",
                flush=True,
            )
        rows.append(row)
    if given.json:
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        given.json.write_text(json.dumps({**about, "workdir": given.workdir, "rows": rows}) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"time_switches: {error}", file=sys.stderr)
        sys.exit(2)
