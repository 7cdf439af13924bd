"""Faults around a workdir: one user at a time, classes that changed, paths, diverged training."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from bitmixer_jax import cli
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import evaluate
from bitmixer_jax.files import hold
from bitmixer_jax.trained import load
from bitmixer_jax.training import train
from bitmixer_jax.training.checkpoints import Checkpoints
from bitmixer_jax.training.workdir import LOCK_FILE, read_config
from tests.refusals import check_line, refused

CONFIG = pathlib.Path(__file__).parents[1] / "tiny_config.py"


# Classes.


def test_data_of_other_classes_are_not_evaluated(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    config = read_config(workdir)
    names = config["dataset_info"]["classes"]
    names[2], names[3] = names[3], names[2]
    (workdir / "config.json").write_text(json.dumps(config))
    with refused("other-data", "digits", 2, 3):
        evaluate(workdir)
    run = load(workdir).run
    with refused("other-data", "digits"):
        run.load(run.train_split)  # the reading that search, export and recalibration share


@pytest.mark.parametrize("key", ["classes", "image_shape", "examples", "mean", "std"])
@pytest.mark.parametrize("value", [None, [], "x", [None], -1, [1e400], {"a": 1}])
def test_a_damaged_entry_about_the_data_is_one_line(trained, tmp_path, key, value):
    workdir = tmp_path / "run"
    workdir.mkdir()
    config = read_config(trained)
    config["dataset_info"][key] = value
    (workdir / "config.json").write_text(json.dumps(config))
    # JSON has no infinity, so that file is not JSON.
    with refused("damaged", workdir / "config.json"):
        load(workdir)


# One training at a time.


def test_a_second_training_is_refused_and_changes_nothing(trained, tiny, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    before = (workdir / "metrics.jsonl").read_bytes()
    with (
        hold(workdir / LOCK_FILE, "it"),
        refused("in-use", workdir),
    ):
        train(tiny(), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_second_search_on_the_same_scores_is_refused(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    words = ["search", "--workdir", str(workdir), "--budget", "avg_bits=3", "--images", "20"]
    assert cli.main([*words, "--out", str(tmp_path / "a.json")]) == 0
    (scores,) = (workdir / "search").glob("scores-*.jsonl")
    capsys.readouterr()
    with hold(scores.with_name(f".{scores.name}.lock"), "it"):
        assert cli.main([*words, "--out", str(tmp_path / "b.json")]) == 2
    check_line(capsys.readouterr().err, scores.name, start="bitmixer: ")
    assert not (tmp_path / "b.json").exists()


# Paths.


@pytest.mark.parametrize("name", ["sweep[lr=0.1]", "a*b", "what?", "back\\slash"])
def test_a_workdir_whose_checkpoints_could_not_be_read_is_refused(tiny, tmp_path, name):
    with refused("bad-path", tmp_path / name):
        train(tiny(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_other_characters_in_a_workdir_work(tiny, tmp_path):
    workdir = tmp_path / "lr=0.1, wd={1}" / "a#b%20c" / "ein Gerät" / "run@1:2"
    train(tiny(variant="float"), workdir)
    result = evaluate(workdir)
    assert result["examples"] == 100
    assert result["float"] > 0.1


def test_a_bucket_is_refused_before_anything_is_made(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("bad-path", "gs://bucket/run"):
        train(tiny(), "gs://bucket/run")
    assert list(tmp_path.iterdir()) == []


# Checkpoints.


def test_a_first_checkpoint_that_cannot_be_read_back_ends_the_run(tiny, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("no such checkpoint")

    monkeypatch.setattr(Checkpoints, "restore", fail)
    with refused("not-readable", tmp_path / "run", "no such checkpoint"):
        train(tiny(variant="float"), tmp_path / "run")


def test_a_checkpoint_that_is_called_good_is_finite(tiny, tmp_path):
    config = tiny("checkpoint_seconds=0.0", "log_every=1", variant="float")
    config.stages.float.learning_rate = 1e30
    config.optimizer.clip_norm = 0.0
    with refused("not-finite", "config.optimizer.clip_norm") as error:
        train(config, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", read_only=True)
    steps = checkpoints.steps
    checkpoints.close()
    said = str(error.value)
    if steps:
        assert f"checkpoint of step {steps[-1]} " in said
    _, step = said.split("step ", 1)
    assert all(saved < int(step.split(":")[0]) for saved in steps)


# Places to run.


@pytest.mark.slow
def test_no_home_is_needed(command, tmp_path):
    done = command(
        *("train", "--config", f"{CONFIG}:float", "--workdir", tmp_path / "run"),
        HOME=None,
        MPLBACKEND="module://no_such_backend",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report" / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("words", [["cost", "--model", "resnet8"], ["--help"], ["cost", "--help"]])
def test_output_that_cannot_be_written_ends_in_one_line(words):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bitmixer_jax.cli", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    check_line(done.stderr, os.strerror(errno.ENOSPC), start="bitmixer: ")


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_ends_training_in_one_line(tmp_path):
    words = f"train --config {CONFIG}:float --workdir {tmp_path / 'run'}"
    line = f"ulimit -f 20; {sys.executable} -m bitmixer_jax.cli {words}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    check_line(done.stderr, tmp_path / "run" / "checkpoints", start="bitmixer: ")


@pytest.mark.parametrize(
    "ending",
    [
        "| head -1",
        *(
            pytest.param(ending, marks=pytest.mark.slow)
            for ending in ("| true", "1>&-", "2>&-", "<&- 1>&- 2>&-")
        ),
    ],
)
def test_closed_outputs_end_nothing(tmp_path, ending):
    policy = tmp_path / "policy.json"
    line = f"{sys.executable} -m bitmixer_jax.cli cost --model resnet8 --out {policy} {ending}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(policy.read_text())["format"] == "bitmixer-policy"


@pytest.mark.slow
def test_a_terminal_of_another_alphabet_gets_escapes(command):
    done = command(
        *("cost", "--model", "resnet8"), PYTHONIOENCODING="ascii", LC_ALL="C", COLUMNS="20"
    )
    assert done.returncode == 0, done.stderr


# Numbers.


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--workdir", "x", "--random", "100000000000"],
        ["evaluate", "--workdir", "x", "--seed", str(2**64)],
        ["evaluate", "--workdir", "x", "--seed", "9" * 5000],
        ["export", "--workdir", "x", "--format", "packed", "--out", "y", "--random", "9" * 12],
        ["evaluate", "--workdir", "x" * 300],
        ["evaluate", "--workdir", "x\0y"],
        ["train", "--config", str(CONFIG), "--workdir", "y" * 300],
    ],
)
def test_numbers_and_names_beyond_reason_are_one_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    check_line(capsys.readouterr().err, start="bitmixer")  # or "bitmixer evaluate: "
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "setting",
    ["batch_size=1099511627776", "evaluate_random=100000000000", "stages.float.epochs=1e12"],
)
def test_settings_beyond_reason_are_refused(tiny, tmp_path, setting):
    with refused("bad-value", setting.partition("=")[0].split(".")[-1]):
        train(tiny(setting, variant="float"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# What people give.


@pytest.mark.parametrize("name", ["init_from", "teacher"])
@pytest.mark.parametrize("source", ["nowhere", "gs://bucket/run", "photo.png"])
def test_a_wrong_source_of_weights_makes_no_workdir(name, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    distill = ["--config.stages.mixed.distill=teacher"] if name == "teacher" else []
    words = ["train", "--config", str(CONFIG), "--workdir", "run", f"--config.{name}={source}"]
    assert cli.main([*words, *distill]) == 2
    check_line(capsys.readouterr().err, source, start="bitmixer: ")
    assert not pathlib.Path("run").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "policy.json"])
def test_a_result_does_not_replace_a_file_that_is_none(trained, tmp_path, capsys, name):
    workdir = shutil.copytree(trained, tmp_path / "run")
    if name == "policy.json":
        (workdir / name).write_text('{"format": "bitmixer-policy"}')
    before = (workdir / name).read_bytes()
    words = ["evaluate", "--workdir", str(workdir), "--no-uniform", "--policy", "3", "--json"]
    assert cli.main([*words, str(workdir / name)]) == 2
    check_line(capsys.readouterr().err, start=f"bitmixer: --json {workdir / name}: ")
    assert (workdir / name).read_bytes() == before


def test_a_result_replaces_an_earlier_one(trained, tmp_path):
    out = tmp_path / "result.json"
    words = ["evaluate", "--workdir", str(trained), "--no-uniform", "--json", str(out)]
    for policy in ("3", "2"):
        assert cli.main([*words, "--policy", policy]) == 0
        assert json.loads(out.read_text())["policy"]["widths"] == [int(policy)] * 6


def test_an_empty_path_is_not_the_current_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--config", str(CONFIG), "--workdir", ""])
    check_line(capsys.readouterr().err, "--workdir", start="bitmixer train: ")
    assert not list(tmp_path.iterdir())


def test_a_data_folder_that_is_not_read_is_refused(trained):
    with refused("conflict", "--data_dir elsewhere", "digits"):
        evaluate(trained, data_dir="elsewhere")


def test_a_line_break_in_a_path_stays_on_one_line(capsys):
    assert cli.main(["cost", "--workdir", "a\nb"]) == 2
    check_line(capsys.readouterr().err, "config.json", start="bitmixer: a\\nb: ")


@pytest.mark.parametrize(
    "columns", ["0", *(pytest.param(text, marks=pytest.mark.slow) for text in ("1", "abc"))]
)
def test_a_terminal_without_columns_shows_the_table(trained, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    words = ["evaluate", "--workdir", str(trained), "--no-uniform", "--policy", "3"]
    assert cli.main(words) == 0
    assert "policy 3,3,3,3,3,3 (3.00 bits on average)" in capsys.readouterr().out


def test_a_platform_that_jax_does_not_have_is_one_line(trained, command):
    done = command("cost", "--workdir", trained, JAX_PLATFORMS="nonsense")
    assert done.returncode == 2
    check_line(done.stderr, "JAX_PLATFORMS=nonsense", start="bitmixer: ")


def test_a_run_that_was_stopped_is_evaluated_with_a_word(trained, tmp_path, command):
    workdir = shutil.copytree(trained, tmp_path / "run")
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    shutil.rmtree(workdir / "checkpoints" / str(steps[-1]))
    done = command("cost", "--workdir", workdir)
    assert done.returncode == 0
    start = f"bitmixer: warning: {workdir}: "
    check_line(done.stderr, f"step {steps[-2]} of {steps[-1]}", "stage weights", start=start)


@pytest.mark.parametrize("content", ["[]", "5", '{"item_handlers": 5}', '{"metrics": [1]}'])
def test_damaged_metadata_of_a_checkpoint_are_one_line(trained, tmp_path, content):
    workdir = shutil.copytree(trained, tmp_path / "run")
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    (newest / "_CHECKPOINT_METADATA").write_text(content)
    with refused("damaged", newest):
        load(workdir)
