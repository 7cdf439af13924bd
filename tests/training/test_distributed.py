"""Many processes: the same numbers as one, orderly stops, and no one left waiting."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from bitmixer_jax import distributed
from bitmixer_jax.errors import UserError
from bitmixer_jax.trained import load
from bitmixer_jax.training.checkpoints import digest
from tests.refusals import refused

LONG = "--config.stages.mixed.epochs=5000"


@pytest.fixture
def start(tiny_file, tmp_path):
    """``start(workdir, processes, devices, *words)``: the processes of a run, each logging."""
    running = []

    def run(workdir, processes, devices, *words, config=tiny_file):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = f"--xla_force_host_platform_device_count={devices}"
        many = ["--coordinator", f"localhost:{port}", "--processes", str(processes)]
        found = []
        for index in range(processes):
            command = [sys.executable, "-m", "bitmixer_jax.cli", "train"]
            command += ["--config", str(config), "--workdir", str(workdir), *words]
            if processes > 1:
                command += [*many, "--process", str(index)]
            log = (tmp_path / f"{workdir.name}-{index}.log").open("w")
            found.append(
                subprocess.Popen(
                    command, env=os.environ | {"XLA_FLAGS": flags}, stdout=log, stderr=log
                )
            )
        running.extend(found)
        return found

    yield run
    for process in running:
        process.kill()
        process.wait()


def said(tmp_path, workdir, index):
    return (tmp_path / f"{workdir.name}-{index}.log").read_text()


def statuses(processes, seconds=300):
    return [process.wait(timeout=seconds) for process in processes]


def until(condition, seconds=300):
    """Waits; fails rather than hangs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)


def records(workdir):
    found = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("images_per_second", None)
        found.append(record)
    return found


def step_of(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.mark.slow
def test_two_processes_are_one_with_two_devices(start, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    assert statuses(start(two, 2, 1)) == [0, 0]
    assert statuses(start(one, 1, 2)) == [0]
    assert digest(load(two).variables) == digest(load(one).variables)
    assert records(two) == records(one)
    # The first process alone speaks, logs and reports.
    assert "test accuracy" in said(tmp_path, two, 0)
    others = [line for line in said(tmp_path, two, 1).splitlines() if "Gloo" not in line]
    assert others == []
    assert len(list((two / "tensorboard").iterdir())) == 1
    assert (two / "report").is_dir()


@pytest.mark.slow
def test_streamed_images_of_two_processes_are_those_of_one(start, jpegs, tmp_path):
    jpegs.make_folder(tmp_path / "pictures", classes=3, train=14, validation=3, longest=32)
    config = pathlib.Path(__file__).parent / "streamed_config.py"
    words = [f"--config.data_dir={tmp_path}", "--config.stages.mixed.epochs=4"]
    words += ["--config.evaluate_batch=2"]
    two, one = tmp_path / "two", tmp_path / "one"
    assert statuses(start(two, 2, 1, *words, config=config)) == [0, 0]
    assert statuses(start(one, 1, 2, *words, config=config)) == [0]
    assert digest(load(two).variables) == digest(load(one).variables)
    # So are evaluations, where each process decodes its part of nine images, in batches of two
    # by two devices; of the last one, a single image, the second process has nothing.
    evaluations = [record for record in records(two) if record["kind"] == "evaluate"]
    assert evaluations
    assert evaluations[-1]["examples"] == 9
    assert records(two) == records(one)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step_and_they_go_on(start, tmp_path):
    workdir = tmp_path / "run"
    processes = start(workdir, 2, 1, LONG)
    until(lambda: step_of(workdir) > 20)
    processes[1].send_signal(signal.SIGTERM)
    assert statuses(processes) == [143, 143]
    stopped = int(re.search(r"signal 15: saved at step (\d+)", said(tmp_path, workdir, 0))[1])
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    # One process with one device goes on where two stopped.
    (alone,) = start(workdir, 1, 1, LONG)
    until(lambda: step_of(workdir) > stopped + 20)
    alone.send_signal(signal.SIGTERM)
    assert statuses([alone]) == [143]
    assert f"going on from step {stopped}" in said(tmp_path, workdir, 0)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_others(start, tmp_path, lost):
    workdir = tmp_path / "run"
    processes = start(workdir, 2, 1, LONG, "--heartbeat_seconds", "10")
    until(lambda: step_of(workdir) > 20)
    processes[lost].kill()
    other = processes[1 - lost]
    status = other.wait(timeout=120)
    # 75, or aborted by the heartbeat where no collective was under way.
    assert status in (distributed.LOST, -signal.SIGABRT)
    if status == distributed.LOST:
        assert "another one was lost" in said(tmp_path, workdir, 1 - lost)


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others(start, jpegs, tmp_path):
    folder = tmp_path / "pictures"
    jpegs.make_folder(folder, classes=3, train=14, validation=3, longest=32)
    config = pathlib.Path(__file__).parent / "streamed_config.py"
    damaged = sorted(folder.rglob("train/*/*.JPEG"))[3]
    damaged.write_bytes(damaged.read_bytes()[:100])
    words = [f"--config.data_dir={tmp_path}", LONG, "--heartbeat_seconds", "10"]
    processes = start(tmp_path / "run", 2, 1, *words, config=config)
    found = sorted(statuses(processes, 200))
    assert 2 in found
    assert 0 not in found
    logs = [said(tmp_path, tmp_path / "run", index) for index in (0, 1)]
    assert any(damaged.name in log for log in logs)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(start, tmp_path):
    workdir = tmp_path / "run"
    processes = start(workdir, 2, 1, LONG, "--heartbeat_seconds", "10")
    until(lambda: step_of(workdir) > 20)
    processes[1].send_signal(signal.SIGSTOP)
    assert processes[0].wait(timeout=120) != 0


@pytest.mark.slow
def test_a_mistake_is_that_of_all_processes(start, tmp_path):
    workdir = tmp_path / "run"
    assert statuses(start(workdir, 1, 1)) == [0]
    assert statuses(start(workdir, 2, 1, "--config.seed=7")) == [2, 2]
    for index in (0, 1):
        assert f"bitmixer: {workdir / 'config.json'}: " in said(tmp_path, workdir, index)
        assert "config.seed: 0 -> 7" in said(tmp_path, workdir, index)


@pytest.mark.parametrize(
    ("arguments", "code", "mentions"),
    [
        (dict(coordinator="localhost:1"), "missing-value", ("--processes", "--process ")),
        (dict(processes=2), "missing-value", ("--coordinator", "--process ")),
        (
            dict(coordinator="localhost:1", processes=2, process=2),
            "bad-value",
            ("--process 2", "0 to 1"),
        ),
    ],
)
def test_arguments_that_do_not_go_together(arguments, code, mentions):
    with refused(code, *mentions):
        distributed.connect(**arguments)


def test_variables_that_are_no_numbers_are_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with refused("bad-value", "JAX_NUM_PROCESSES=two"):
        distributed.connect()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with refused("missing-value", "JAX_PROCESS_ID"):
        distributed.connect()


@pytest.mark.parametrize("launcher", ["variables", "slurm", "openmpi"])
def test_the_environment_tells_who_the_others_are(launcher):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def told(index):
        """What a launcher tells the process; the port, which it would derive, is a free one."""
        if launcher == "variables":
            address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
            return {**address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        if launcher == "slurm":
            job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
            job |= {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
        else:
            job = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:5", "OMPI_COMM_WORLD_SIZE": "2"}
            ranks = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
            job |= dict.fromkeys(ranks, str(index))
        return job | {"JAX_COORDINATOR_PORT": port}

    code = (
        "from bitmixer_jax import distributed; distributed.connect(); import jax; "
        "print(jax.process_index(), jax.process_count(), "
        "*distributed.all_reduce_max(10.0 + jax.process_index()))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | told(index),
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        found = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [text.splitlines()[-1] for text in found] == ["0 2 11.0", "1 2 11.0"]


def test_one_process_needs_nobody():
    distributed.connect(processes=1)
    assert jax.process_count() == 1
    assert distributed.is_primary()
    assert distributed.all_reduce_max(3, 0) == (3, 0)
    assert distributed.local_devices(jax.devices()) == jax.devices()
    assert distributed.local_batch_indices(jax.devices(), 4).tolist() == [0, 1, 2, 3]
    assert distributed.as_aborted(RuntimeError("Gloo all-reduce failed")) is None
    error = UserError("no", "exists")
    with refused("exists", "no"):
        distributed.on_primary(lambda: (_ for _ in ()).throw(error), lambda: None)
