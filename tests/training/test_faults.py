"""Faults around a workdir: one user at a time, classes that changed, paths, diverged training."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from bitmixer_jax import cli
from bitmixer_jax.errors import UserError
from bitmixer_jax.files import hold
from bitmixer_jax.runs import evaluate_workdir
from bitmixer_jax.training import load_trained, train
from bitmixer_jax.training.checkpoints import Checkpoints
from bitmixer_jax.training.claims import LOCK_FILE

CONFIG = pathlib.Path(__file__).parents[1] / "tiny_config.py"


# Classes.


def test_data_of_other_classes_are_not_evaluated(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    config = json.loads((workdir / "config.json").read_text())
    names = config["made_for"]["classes"]
    names[2], names[3] = names[3], names[2]
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="class 2 is 2, in the network 3"):
        evaluate_workdir(str(workdir))
    run, _, _ = load_trained(workdir)
    with pytest.raises(UserError, match="classes"):
        run.load(run.train_split)  # the reading that search, export and recalibration share


@pytest.mark.parametrize("key", ["classes", "image_shape", "examples", "mean", "std"])
@pytest.mark.parametrize("value", [None, [], "x", [None], -1, [1e400], {"a": 1}])
def test_a_damaged_entry_about_the_data_is_one_line(trained, tmp_path, key, value):
    workdir = tmp_path / "run"
    workdir.mkdir()
    config = json.loads((trained / "config.json").read_text())
    config["made_for"][key] = value
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json") as error:
        load_trained(workdir)
    assert "\n" not in str(error.value)


# One training at a time.


def test_a_second_training_is_refused_and_changes_nothing(trained, tiny, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    before = (workdir / "metrics.jsonl").read_bytes()
    with (
        hold(workdir / LOCK_FILE, "it"),
        pytest.raises(UserError, match="another process"),
    ):
        train(tiny(), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_second_search_on_the_same_scores_is_refused(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    words = ["search", "--workdir", str(workdir), "--budget", "avg_bits=3", "--images", "20"]
    assert cli.main([*words, "--out", str(tmp_path / "a.json")]) == 0
    (scores,) = (workdir / "search").glob("scores-*.jsonl")
    with hold(scores.with_name(f".{scores.name}.lock"), "it"):
        assert cli.main([*words, "--out", str(tmp_path / "b.json")]) == 2
    assert "another process" in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()


# Paths.


@pytest.mark.parametrize("name", ["sweep[lr=0.1]", "a*b", "what?", "back\\slash"])
def test_a_workdir_whose_checkpoints_could_not_be_read_is_refused(tiny, tmp_path, name):
    with pytest.raises(UserError, match="cannot be read from a path with"):
        train(tiny(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_other_characters_in_a_workdir_work(tiny, tmp_path):
    workdir = tmp_path / "lr=0.1, wd={1}" / "a#b%20c" / "ein Gerät" / "run@1:2"
    train(tiny(variant="float"), workdir)
    result = evaluate_workdir(str(workdir))
    assert result["examples"] == 100
    assert result["float"] > 0.1


def test_a_bucket_is_refused_before_anything_is_made(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs:// are not supported"):
        train(tiny(), "gs://bucket/run")
    assert list(tmp_path.iterdir()) == []


# Checkpoints.


def test_a_first_checkpoint_that_cannot_be_read_back_ends_the_run(tiny, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("no such checkpoint")

    monkeypatch.setattr(Checkpoints, "restore", fail)
    with pytest.raises(UserError, match="cannot be read back"):
        train(tiny(variant="float"), tmp_path / "run")


def test_a_checkpoint_that_is_called_good_is_finite(tiny, tmp_path):
    config = tiny("checkpoint_seconds=0.0", "log_every=1", variant="float")
    config.stages.float.learning_rate = 1e30
    config.optimizer.clip_norm = 0.0
    with pytest.raises(UserError, match="not finite") as error:
        train(config, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", read_only=True)
    steps = checkpoints.steps
    checkpoints.close()
    said = str(error.value)
    if steps:
        assert f"the checkpoint of step {steps[-1]} is good" in said
    else:
        assert "no good state was saved" in said
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
    assert done.stderr == (
        "bitmixer: standard output cannot be written (No space left on device)\n"
    )


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_ends_training_in_one_line(tmp_path):
    words = f"train --config {CONFIG}:float --workdir {tmp_path / 'run'}"
    line = f"ulimit -f 20; {sys.executable} -m bitmixer_jax.cli {words}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "checkpoints: cannot save a checkpoint" in done.stderr


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
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "setting",
    ["batch_size=1099511627776", "evaluate_random=100000000000", "stages.float.epochs=1e12"],
)
def test_settings_beyond_reason_are_refused(tiny, tmp_path, setting):
    with pytest.raises(UserError):
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
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not pathlib.Path("run").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "policy.json"])
def test_a_result_does_not_replace_a_file_that_is_none(trained, tmp_path, capsys, name):
    workdir = shutil.copytree(trained, tmp_path / "run")
    if name == "policy.json":
        (workdir / name).write_text('{"format": "bitmixer-policy"}')
    before = (workdir / name).read_bytes()
    words = ["evaluate", "--workdir", str(workdir), "--no-uniform", "--policy", "3", "--json"]
    assert cli.main([*words, str(workdir / name)]) == 2
    assert "already exists and is no result" in capsys.readouterr().err
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
    assert "an empty path" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_data_folder_that_is_not_read_is_refused(trained):
    with pytest.raises(UserError, match="--data_dir elsewhere: digits is not read from there"):
        evaluate_workdir(str(trained), data_dir="elsewhere")


def test_a_line_break_in_a_path_stays_on_one_line(capsys):
    assert cli.main(["cost", "--workdir", "a\nb"]) == 2
    assert capsys.readouterr().err == "bitmixer: a\\nb: no run here (config.json is missing)\n"


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
    assert done.stderr.startswith("bitmixer: JAX cannot start: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_run_that_was_stopped_is_evaluated_with_a_word(trained, tmp_path, command):
    workdir = shutil.copytree(trained, tmp_path / "run")
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    shutil.rmtree(workdir / "checkpoints" / str(steps[-1]))
    done = command("cost", "--workdir", workdir)
    assert done.returncode == 0
    assert done.stderr == (
        f"bitmixer: warning: {workdir}: not trained to its end: step {steps[-2]} of {steps[-1]}, "
        "stage weights\n"
    )


@pytest.mark.parametrize("content", ["[]", "5", '{"item_handlers": 5}', '{"metrics": [1]}'])
def test_damaged_metadata_of_a_checkpoint_are_one_line(trained, tmp_path, content):
    workdir = shutil.copytree(trained, tmp_path / "run")
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    (newest / "_CHECKPOINT_METADATA").write_text(content)
    with pytest.raises(UserError, match=f"{newest}: damaged checkpoint .*Remove it"):
        load_trained(workdir)
