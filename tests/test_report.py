"""The report of a run: a summary and plots, from whatever the run left."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bitmixer_jax.evaluation import evaluate
from bitmixer_jax.report import plot_curves, report, table, write_report
from bitmixer_jax.trained import load
from bitmixer_jax.training import train
from bitmixer_jax.training.metrics import METRICS_FILE, Metrics, read_metrics
from tests.refusals import refused


def assert_real_plot(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 200
    assert len(np.unique(pixels)) > 10


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """A copy of the trained run, with a report written now."""
    workdir = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("report"))
    loaded = load(workdir)
    write_report(loaded, evaluate(loaded, random=5))
    return workdir


def test_report_of_a_run_has_summary_and_plots(reported):
    names = {path.name for path in (reported / "report").iterdir()}
    assert names == {"README.md", "evaluation.json", "curves.png", "accuracy.png", "pairs.png"}
    for name in ("curves.png", "accuracy.png", "pairs.png"):
        assert_real_plot(reported / "report" / name)
        assert f"({name})" in (reported / "report" / "README.md").read_text()


def test_summary_names_network_data_stages_and_accuracies(reported):
    text = (reported / "report" / "README.md").read_text()
    assert text.startswith("# resnet8 on digits\n")
    result = json.loads((reported / "report" / "evaluation.json").read_text())
    assert set(result["uniform"]) == {"2", "3", "4"}
    for width, top1 in result["uniform"].items():
        assert f"| all layers at {width} bits | {100 * top1:.2f} |" in text
    assert "| 5 random policies " in text
    for stage in ("activations", "weights", "mixed"):
        assert f"| {stage} | " in text


def test_report_of_a_float_twin_has_curves_and_one_accuracy(trained_float, tiny, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained_float, workdir, ignore=shutil.ignore_patterns("report"))
    report(train(tiny(variant="float"), workdir))
    assert {path.name for path in (workdir / "report").iterdir()} == {
        *("README.md", "evaluation.json", "curves.png"),
    }
    assert_real_plot(workdir / "report" / "curves.png")
    assert "| full-precision baseline | " in (workdir / "report" / "README.md").read_text()


def test_float_twin_that_a_run_started_from_is_in_its_report(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    result = json.loads((workdir / "report" / "evaluation.json").read_text())
    write_report(load(workdir), result, 0.75)
    text = (workdir / "report" / "README.md").read_text()
    assert "| full-precision baseline | 75.00 |" in text


def test_report_of_pairs_not_visited_yet_leaves_accuracies_out(trained, tiny, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    config = tiny("order=('activations',)")
    for step in (8, 88):  # as if the first stage were all
        shutil.rmtree(workdir / "checkpoints" / str(step))
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**saved, "order": list(config.order)}))
    report(train(config, workdir))
    folder = workdir / "report"
    assert "report without accuracies: " in capsys.readouterr().out
    assert_real_plot(folder / "curves.png")
    assert json.loads((folder / "evaluation.json").read_text()) == {"examples": 100}


def test_file_in_place_of_the_report_is_an_error(trained, tmp_path):
    (tmp_path / "report").write_text("")
    loaded = dataclasses.replace(load(trained), folder=tmp_path)
    with refused("not-writable", tmp_path / "report"):
        write_report(loaded, {})


@pytest.mark.parametrize("lines", [0, 1])
def test_curves_of_a_run_with_few_records_are_drawn(trained, tmp_path, lines):
    content = (trained / METRICS_FILE).read_text().splitlines(keepends=True)
    (tmp_path / METRICS_FILE).write_text("".join(content[:lines]))
    plot_curves(tmp_path / "curves.png", tmp_path)
    assert_real_plot(tmp_path / "curves.png")


def test_names_that_look_like_formulas_are_drawn_as_they_stand(tmp_path):
    records = [
        {"kind": "train", "step": 1, "stage": r"a$\no{$", "epoch": 0.5, "loss": 1.0},
        {"kind": "train", "step": 2, "stage": "b", "epoch": 1.0, "loss": 0.5},
        {"kind": "evaluate", "step": 2, "uniform": {r"$\no{$": 0.5}},
    ]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    plot_curves(tmp_path / "curves.png", tmp_path)
    assert_real_plot(tmp_path / "curves.png")


def test_table_holds_what_was_asked_for_only():
    assert table({"examples": 9, "policy": {"widths": [2, 4], "top1": 0.5}}) == [
        "| top-1, 9 images | % |",
        "|---|---|",
        "| policy 2,4 (3.00 bits on average) | 50.00 |",
    ]


def write_lines(workdir, *lines):
    (workdir / METRICS_FILE).write_bytes(b"\n".join(lines) + b"\n")


def test_last_record_of_a_step_counts(tmp_path):
    write_lines(
        tmp_path,
        b'{"kind": "train", "step": 2, "loss": 1}',
        b'{"kind": "train", "step": 4, "loss": 2}',
        b'{"kind": "train", "step": 2, "loss": 3}',
    )
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path, "train")] == [(2, 3), (4, 2)]


def test_records_of_another_kind_are_left_out(tmp_path):
    write_lines(tmp_path, b'{"kind": "evaluate", "step": 2}', b'{"kind": "train", "step": 3}')
    assert [r["step"] for r in read_metrics(tmp_path, "train")] == [3]


@pytest.mark.parametrize(
    "cut", [b'{"kind": "train", "st', b"", b"\x00\x00\xff", b"[1]", b'{"kind": "train"}']
)
def test_line_that_is_no_record_is_left_out(tmp_path, cut):
    write_lines(tmp_path, b'{"kind": "train", "step": 2}', cut, b'{"kind": "train", "step": 3}')
    assert [r["step"] for r in read_metrics(tmp_path, "train")] == [2, 3]


def test_missing_metrics_are_no_records(tmp_path):
    assert read_metrics(tmp_path, "train") == []


def test_record_after_a_cut_line_is_kept(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"kind": "train", "step": 2}\n{"kind": "tr')
    metrics = Metrics(tmp_path, 2)
    metrics.write("train", 3, {"loss": 1.0})
    metrics.close()
    assert [r["step"] for r in read_metrics(tmp_path, "train")] == [2, 3]


def test_file_in_place_of_the_workdir_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with refused("not-writable", tmp_path / "file"):
        Metrics(tmp_path / "file", 0)


def test_the_backend_of_a_notebook_stays_chosen():
    program = (
        "from bitmixer_jax.plotting import new_figure\n"
        "new_figure(2, 2)\n"
        "import matplotlib.pyplot\n"
        "print(matplotlib.get_backend())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MPLBACKEND": "svg"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "svg"
