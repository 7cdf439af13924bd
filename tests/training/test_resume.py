"""A run that was stopped and started again ends bit-identical to the run that never was."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bitmixer_jax.training import Interrupted, train
from bitmixer_jax.training.metrics import METRICS_FILE, read_metrics
from bitmixer_jax.training.workdir import read_config
from tests.states import assert_same_end, newest_values, terminate_at

EVERY_STEP = ("checkpoint_seconds=0.0", "log_every=1", "report_random=0")
END_OF_ACTIVATIONS, END_OF_WEIGHTS, END = 2, 8, 88
HALF = "60.orbax-checkpoint-tmp-12"


def stopped_after(trained, workdir, *steps):
    """A copy of a whole run in which only the checkpoints of ``steps`` are left."""
    shutil.copytree(trained, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) not in steps:
            shutil.rmtree(folder)
    return workdir


@pytest.fixture(scope="module")
def reference(trained, tiny, tmp_path_factory):
    """The last stage of the stored run, trained here from the end of the stage before: another
    machine rounds differently."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    train(tiny(), stopped_after(trained, workdir, END_OF_WEIGHTS))
    return workdir


@pytest.fixture(scope="module")
def resumed(trained, tiny, tmp_path_factory):
    """The same, begun beside a half-written checkpoint and a half-written record, told to stop in
    the middle and started again; the step where it stopped, and what both runs said."""
    workdir = stopped_after(trained, tmp_path_factory.mktemp("resumed") / "run", END_OF_WEIGHTS)
    folder, half = workdir / "checkpoints", workdir / "checkpoints" / HALF
    shutil.copytree(folder / str(END_OF_WEIGHTS), half)
    (half / "state" / "manifest.ocdbt").unlink()
    with (workdir / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "step": 9')
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        with pytest.MonkeyPatch.context() as patched:
            terminate_at(patched, END_OF_WEIGHTS + 20)
            with pytest.raises(Interrupted) as stopped:
                train(tiny(), workdir)
        assert stopped.value.args[0] == signal.SIGTERM
        step, _ = newest_values(workdir)
        train(tiny(), workdir)
    return workdir, step, said.getvalue()


def test_a_run_that_was_told_to_stop_saves_and_ends_the_same(resumed, reference):
    workdir, step, said = resumed
    assert END_OF_WEIGHTS + 20 <= step < END
    assert f"going on from step {END_OF_WEIGHTS} of {END}" in said
    assert f"signal 15: saved at step {step}" in said
    assert f"going on from step {step} of {END}" in said
    assert newest_values(workdir)[0] == END
    assert_same_end(workdir, reference)


def test_half_written_checkpoints_are_passed_over(resumed):
    workdir, _, _ = resumed
    assert not (workdir / "checkpoints" / HALF).exists()


def test_each_step_is_logged_once(resumed, trained):
    workdir, _, _ = resumed
    steps = [record["step"] for record in read_metrics(workdir, "train")]
    assert steps == [record["step"] for record in read_metrics(trained, "train")]
    lines = (workdir / METRICS_FILE).read_text().splitlines()
    assert sum(line.startswith("{") and line.endswith("}") for line in lines) == len(lines) - 1
    assert json.loads(lines[-1])["kind"] == "evaluate"


def test_whole_run_started_again_changes_nothing(trained, tiny, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    train(tiny(), workdir)
    assert f"going on from step {END} of {END}" in capsys.readouterr().out
    assert_same_end(workdir, trained)


# Trained from the start, and stopped from outside.


@pytest.fixture(scope="module")
def fresh(tiny, tmp_path_factory):
    """The tiny run, trained here from its start."""
    workdir = tmp_path_factory.mktemp("fresh") / "run"
    train(tiny(), workdir)
    return workdir


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


@pytest.mark.slow
def test_training_gives_a_run_like_the_stored_one(fresh, trained):
    """Of the same steps, records and values, and about as good: bits differ between machines."""
    (step, found), (wanted_step, wanted) = newest_values(fresh), newest_values(trained)
    assert step == wanted_step == END
    sizes = [{name: len(value) for name, value in values.items()} for values in (found, wanted)]
    assert sizes[0] == sizes[1]
    ends = {str(END_OF_ACTIVATIONS), str(END_OF_WEIGHTS), str(END)}
    assert ends <= {path.name for path in (fresh / "checkpoints").iterdir()}
    records = [read_metrics(run, "train") for run in (fresh, trained)]
    assert [set(record) for record in records[0]] == [set(record) for record in records[1]]
    assert [record["step"] for record in records[0]] == [record["step"] for record in records[1]]
    late = [np.mean([record["accuracy"] for record in run[-10:]]) for run in records]
    assert late[0] == pytest.approx(late[1], abs=0.1)
    assert read_config(fresh) == read_config(trained)  # the stored one has settings by old names


@pytest.mark.slow
def test_resumed_at_the_end_of_a_stage_ends_the_same(fresh, tiny, tmp_path):
    workdir = stopped_after(fresh, tmp_path / "run", END_OF_WEIGHTS)
    train(tiny(), workdir)
    assert_same_end(workdir, fresh)


@pytest.mark.slow
def test_killed_in_three_stages_and_started_again_ends_the_same(fresh, tiny, tiny_file, tmp_path):
    for step in (END_OF_ACTIVATIONS - 1, END_OF_ACTIVATIONS + 3, END_OF_WEIGHTS + 12):
        process = start(tiny_file, tmp_path / "run")
        wait_for_step(process, tmp_path / "run", step)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    train(tiny(*EVERY_STEP), tmp_path / "run")
    assert_same_end(tmp_path / "run", fresh)


@pytest.mark.slow
def test_terminated_run_saves_first_and_ends_the_same(fresh, tiny, tiny_file, tmp_path):
    process = start(tiny_file, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", END_OF_WEIGHTS + 1)
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in output
    step, _ = newest_values(tmp_path / "run")
    assert f"signal 15: saved at step {step}" in output
    assert END_OF_WEIGHTS < step < END
    train(tiny(), tmp_path / "run")
    assert_same_end(tmp_path / "run", fresh)


@pytest.mark.slow
def test_run_saved_from_four_devices_goes_on_with_one(command, tiny_file, tmp_path):
    words = ["--config", tiny_file, "--config.order=('activations','weights')"]
    words += ["--workdir", tmp_path / "run"]
    four = "--xla_force_host_platform_device_count=4"
    done = command("train", *words, "--config.report_random=0", XLA_FLAGS=four)
    assert done.returncode == 0, done.stderr
    done = command("evaluate", "--workdir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = command("train", *words)
    assert "going on from step 8 of 8" in done.stdout
