"""A run that was stopped and started again ends bit-identical to the run that never was."""

import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from bitmixer_jax.training import train
from bitmixer_jax.training.checkpoints import Checkpoints
from bitmixer_jax.training.metrics import METRICS_FILE, read_metrics

EVERY_STEP = ("checkpoint_seconds=0.0", "log_every=1", "report_random=0")
END_OF_ACTIVATIONS, END_OF_WEIGHTS, END = 2, 8, 88


def leaves(workdir):
    """All values of the newest state, by name, as they lie in the checkpoint."""
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.steps[-1]
    state = checkpoints._manager.restore(step)["state"]
    checkpoints.close()
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_same_end(workdir, reference):
    step, found = leaves(workdir)
    _, wanted = leaves(reference)
    assert step == END
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if found[name].tobytes() != wanted[name].tobytes()]
    assert different == []


def start(tiny_file, workdir):
    words = [f"--config.{setting}" for setting in EVERY_STEP]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "bitmixer_jax.cli", "train", "--config", str(tiny_file)),
            *("--workdir", str(workdir), *words),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, workdir, step):
    """Returns as soon as the metrics of ``step`` are written."""
    while process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(workdir, "train")):
            return
        time.sleep(0.005)
    pytest.fail(f"ended before step {step}: {process.stdout.read()}")


def stopped_after(trained, workdir, *steps):
    """A copy of a whole run in which only the checkpoints of ``steps`` are left."""
    shutil.copytree(trained, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) not in steps:
            shutil.rmtree(folder)
    return workdir


@pytest.mark.slow
def test_killed_in_three_stages_and_started_again_ends_the_same(trained, tiny, tiny_file, tmp_path):
    for step in (END_OF_ACTIVATIONS - 1, END_OF_ACTIVATIONS + 3, END_OF_WEIGHTS + 12):
        process = start(tiny_file, tmp_path / "run")
        wait_for_step(process, tmp_path / "run", step)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    train(tiny(*EVERY_STEP), tmp_path / "run")
    assert_same_end(tmp_path / "run", trained)


@pytest.mark.slow
def test_terminated_run_saves_first_and_ends_the_same(trained, tiny, tiny_file, tmp_path):
    process = start(tiny_file, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", END_OF_WEIGHTS + 1)
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in output
    step, _ = leaves(tmp_path / "run")
    assert f"signal 15: saved at step {step}" in output
    assert END_OF_WEIGHTS < step < END
    train(tiny(), tmp_path / "run")
    assert_same_end(tmp_path / "run", trained)


def test_resumed_at_the_end_of_a_stage_ends_the_same(trained, tiny, tmp_path):
    workdir = stopped_after(trained, tmp_path / "run", END_OF_WEIGHTS)
    train(tiny(), workdir)
    assert_same_end(workdir, trained)


def test_half_written_checkpoint_is_passed_over(trained, tiny, tmp_path):
    workdir = stopped_after(trained, tmp_path / "run", END_OF_WEIGHTS)
    folder = workdir / "checkpoints"
    half = folder / "60.orbax-checkpoint-tmp-12"
    shutil.copytree(folder / str(END_OF_WEIGHTS), half)
    (half / "state" / "manifest.ocdbt").unlink()
    train(tiny(), workdir)
    assert_same_end(workdir, trained)
    assert not half.exists()


def test_whole_run_started_again_changes_nothing(trained, tiny, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    train(tiny(), workdir)
    assert f"going on from step {END} of {END}" in capsys.readouterr().out
    assert_same_end(workdir, trained)


def test_resumed_run_logs_each_step_once(trained, tiny, tmp_path):
    workdir = stopped_after(trained, tmp_path / "run", END_OF_WEIGHTS)
    with (workdir / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "step": 9')
    train(tiny(), workdir)
    steps = [record["step"] for record in read_metrics(workdir, "train")]
    assert steps == [record["step"] for record in read_metrics(trained, "train")]
    lines = (workdir / METRICS_FILE).read_text().splitlines()
    assert sum(line.startswith("{") and line.endswith("}") for line in lines) == len(lines) - 1
    assert json.loads(lines[-1])["kind"] == "evaluate"


@pytest.mark.slow
def test_run_saved_from_four_devices_goes_on_with_one(command, tiny_file, tmp_path, monkeypatch):
    words = ["--config", tiny_file, "--config.order=('activations','weights')"]
    words += ["--workdir", tmp_path / "run"]
    with monkeypatch.context() as four:
        four.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
        done = command("train", *words, "--config.report_random=0")
        assert done.returncode == 0, done.stderr
    done = command("evaluate", "--workdir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = command("train", *words)
    assert "going on from step 8 of 8" in done.stdout
