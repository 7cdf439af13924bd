"""Kills a small run at random moments, again and again, and compares it with an undisturbed run.

    python experiments/soak.py --out experiments/results/soak [--kills 100]

Most kills are SIGKILL, some SIGTERM. Each comes after a random time, drawn from the seed, so that
they hit compilation, training, evaluation, saving and the report. Then the same command starts the
run again. At the end, parameters, statistics and optimiser state must equal those of the
undisturbed run, bit for bit, and the log must show the same steps.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from bitmixer_jax.training.checkpoints import Checkpoints
from bitmixer_jax.training.metrics import read_metrics

CONFIG = pathlib.Path(__file__).parent.parent / "tests" / "tiny_config.py"
SETTINGS = ["--config.stages.mixed.epochs=200", "--config.checkpoint_seconds=0.3"]
STEPS = 808


def start(workdir, log):
    """A process that trains, or goes on."""
    command = [sys.executable, "-m", "bitmixer_jax.cli", "train", "--config", str(CONFIG)]
    command += ["--workdir", str(workdir), *SETTINGS]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def final(workdir):
    """Digest of the last checkpoint, and the log without times."""
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.steps[-1]
    notes = json.loads(next((workdir / "checkpoints" / str(step)).glob("notes/*")).read_text())
    log = {kind: read_metrics(workdir, kind) for kind in ("train", "evaluate")}
    for records in log.values():
        for record in records:
            for name in ("images_per_second", "loss", "accuracy", "grad_norm", "rho", "epoch"):
                record.pop(name, None)  # means since the last line, which a restart moves
    steps = {kind: sorted(r["step"] for r in records) for kind, records in log.items()}
    return {"step": step, "sha256": notes["sha256"], "evaluate": log["evaluate"]}, steps


def main():
    """Reads the command line, runs both, compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    work = given.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    # Compiled programs are kept between starts, so that a start takes seconds.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str((work / "cache").absolute())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    draw = random.Random(given.seed)
    with (work / "log.txt").open("a") as log:
        begun = time.monotonic()
        assert start(work / "whole", log).wait() == 0
        begun = time.monotonic()  # again, with programs compiled: how long a start takes
        shutil.rmtree(work / "whole")
        assert start(work / "whole", log).wait() == 0
        usual = time.monotonic() - begun
        kills, starts, finished, hits = 0, 0, 0, {}
        while kills < given.kills:
            workdir = work / f"killed-{finished}"
            process = start(workdir, log)
            starts += 1
            wait = draw.uniform(0.1, 0.9) * usual
            number = signal.SIGTERM if draw.random() < 0.2 else signal.SIGKILL
            try:
                status = process.wait(timeout=wait)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                process.wait()
                kills += 1
                saved = sorted(
                    int(p.name)
                    for p in (workdir / "checkpoints").glob("[0-9]*")
                    if p.name.isdigit()
                )
                phase = (
                    "before the first checkpoint"
                    if not saved
                    else ("after the last" if saved[-1] == STEPS else "between")
                )
                hits[phase] = hits.get(phase, 0) + 1
                continue
            assert status == 0, f"ended with status {status}: see {work / 'log.txt'}"
            finished += 1
        process = start(work / f"killed-{finished}", log)
        assert process.wait() == 0
        finished += 1
    wanted, wanted_steps = final(work / "whole")
    same = 0
    for number in range(finished):
        found, steps = final(work / f"killed-{number}")
        ok = found == wanted and set(wanted_steps["evaluate"]) <= set(steps["evaluate"])
        same += ok
        print(f"run {number}: {'identical' if ok else 'DIFFERS'}", flush=True)
    result = {
        "kills": kills,
        "starts": starts,
        "runs": finished,
        "identical": same,
        "seconds_of_an_undisturbed_start": round(usual, 1),
        "hits": hits,
        "steps": wanted["step"],
        "sha256": wanted["sha256"],
    }
    (given.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if same == finished:
        shutil.rmtree(work)
    sys.exit(same != finished)


if __name__ == "__main__":
    main()
