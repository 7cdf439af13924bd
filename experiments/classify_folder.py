"""Classifies the images of a folder again and again; SIGUSR1 switches to the next policy.

    python experiments/classify_folder.py photos --workdir runs/digits --policy 4 3 2
    kill -USR1 PID      # the first line shows the PID; --front FILE uses the policies of a front

Ends after --rounds, or on SIGTERM or an interrupt.
"""

import argparse
import itertools
import os
import pathlib
import signal
import sys
import time

import numpy as np

from bitmixer_jax.data.image_files import find_images
from bitmixer_jax.errors import UserError
from bitmixer_jax.front import load_front
from bitmixer_jax.policy import parse_policy
from bitmixer_jax.runtime import Runtime


def classify(runtime, folder):
    """Prints file, class and confidence of each image, at the policy in force."""
    policy = runtime.policy  # read once: a signal may change it at any moment
    paths = find_images(folder)
    logits = runtime.predict(runtime.reader.read(paths), policy)
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    print(f"policy {','.join(map(str, policy))}")
    for path, row in zip(paths, chances, strict=True):
        print(f"  {path.name}  {runtime.classes[row.argmax()]}  {row.max():.3f}")
    sys.stdout.flush()


def main():
    """Reads the command line and goes round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--workdir", required=True, metavar="DIR[@STAGE]")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--front", type=pathlib.Path, metavar="FILE", help="cheapest policy first")
    which.add_argument("--policy", action="extend", nargs="+", help="widths, or policy files")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: until stopped")
    given = parser.parse_args()

    runtime = Runtime.load(given.workdir)
    if given.front:
        front = load_front(given.front, runtime.names, runtime.space, runtime.weights_digest)
        policies = [point.widths for point in front.points]
    else:
        policies = [parse_policy(text, runtime.names, runtime.space) for text in given.policy]
    turn = itertools.cycle([runtime.check(policy) for policy in policies])
    runtime.set_policy(next(turn))

    stopped = []
    signal.signal(signal.SIGUSR1, lambda *_: runtime.set_policy(next(turn)))
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    print(f"running as {os.getpid()}, {len(policies)} policies", flush=True)
    for number in itertools.count(1):
        due = time.monotonic() + given.every
        classify(runtime, given.folder)
        if number == given.rounds:
            break
        while time.monotonic() < due and not stopped:
            time.sleep(0.02)
        if stopped:
            break
    print(f"stopped after {number} rounds", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"classify_folder: {error}", file=sys.stderr)
        sys.exit(2)
