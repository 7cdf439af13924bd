"""Shows where the time of a training step goes: milliseconds by kind of compiled operation.

python experiments/profile_step.py resnet20 --batch_size 128
"""

import argparse
import collections
import pathlib
import tempfile

import jax
import numpy as np

from bitmixer_jax.benchmark import KINDS, prepare_step
from bitmixer_jax.distributed import replicate
from bitmixer_jax.models import create_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    model = create_model(arguments.model, num_classes=10)
    devices, batch = jax.devices(), arguments.batch_size
    rng = np.random.default_rng(0)
    data = {
        "image": rng.integers(0, 256, (batch, *model.image_shape), np.uint8),
        "label": rng.integers(0, 10, batch, np.int32),
    }
    data, rows = replicate(data, devices), np.arange(batch, dtype=np.int32)[None]
    for kind in ("float", "layer-wise"):
        step, state = prepare_step(model, KINDS[kind], batch, devices)
        for _ in range(2):
            state, _ = jax.block_until_ready(step(state, data, rows))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(arguments.steps):
                    state, _ = jax.block_until_ready(step(state, data, rows))
            (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
            profile = jax.profiler.ProfileData.from_file(str(trace))
        time, calls = collections.Counter(), collections.Counter()
        for plane in profile.planes:
            for line in plane.lines:
                if "python" not in line.name.lower():
                    for event in line.events:
                        name = event.name.partition(".")[0]
                        time[name] += event.duration_ns / 1e6 / arguments.steps
                        calls[name] += 1 / arguments.steps
        print(f"\n{kind}: operation, milliseconds a step, calls a step")
        for name, milliseconds in time.most_common(16):
            print(f"  {name:48}{milliseconds:9.1f}{calls[name]:9.1f}")


if __name__ == "__main__":
    main()
