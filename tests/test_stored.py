"""Files of earlier versions open, and say what they said.

``stored/version1.tar.gz`` was made on 2026-11-25 with the code of commit c669767, before faults of
the field were mended: a resnet8 of width 4 on digits, trained for 2, 6 and 20 epochs (seed 0), what
was searched and exported from it, and logits of the last 20 images for four policies.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.cli import main
from bitmixer_jax.evaluation import Evaluator
from bitmixer_jax.front import load_front
from tests.refusals import check_line

CONFIG = pathlib.Path(__file__).parents[1] / "experiments" / "configs" / "digits.py"
ARCHIVE = pathlib.Path(__file__).parent / "stored" / "version1.tar.gz"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folder with the files; logits.npz holds images, policies and logits."""
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def known(stored):
    with np.load(stored / "logits.npz") as file:
        return dict(file)


def agrees(found, wanted):
    """Within the rounding of another processor; every choice of class is the same."""
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.argmax(found, -1), np.argmax(wanted, -1))


@pytest.mark.parametrize("source", ["digits", "net.packed"])
def test_a_runtime_gives_the_logits_of_its_time(stored, known, source):
    runtime = bm.Runtime.load(stored / source)
    assert runtime.classes == tuple("0123456789")
    for policy, logits in zip(known["policies"], known["logits"], strict=True):
        agrees(runtime.predict(known["images"], policy), logits)


def test_a_workdir_evaluates_as_it_did(stored, tmp_path):
    words = ["--workdir", str(stored / "digits"), "--policy", str(stored / "policy.json")]
    assert main(["evaluate", *words, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    wanted = json.loads((stored / "evaluation.json").read_text())
    assert found["examples"] == wanted["examples"] == 360
    assert found["policy"]["widths"] == wanted["policy"]["widths"]
    assert found["policy"]["top1"] == pytest.approx(wanted["policy"]["top1"], abs=0.003)
    for width, top1 in wanted["uniform"].items():
        assert found["uniform"][width] == pytest.approx(top1, abs=0.003)  # one image of 360


def test_a_search_goes_on_with_its_scores(stored, tmp_path, monkeypatch):
    measure = Evaluator.scores

    def only_test(self, variables, policies, *rest):
        assert self.examples == 360, "measured again"
        return measure(self, variables, policies, *rest)

    monkeypatch.setattr(Evaluator, "scores", only_test)
    words = ["--workdir", str(stored / "digits"), "--method", "greedy", "--images", "100"]
    out = tmp_path / "policy.json"
    assert main(["search", *words, "--budget", "avg_bits=3", "--out", str(out)]) == 0
    found, wanted = (json.loads(path.read_text()) for path in (out, stored / "policy.json"))
    assert found["layers"] == wanted["layers"]


def test_a_front_opens(stored):
    layers = tuple(json.loads((stored / "policy.json").read_text())["layers"])
    front = load_front(stored / "front.json", layers, bm.BitSpace((2, 3, 4)))
    assert [point.cost for point in front.points] == sorted(point.cost for point in front.points)
    assert len(front.points) == 11
    assert front.points[-1].widths == (4,) * 6


def test_a_finished_run_is_known_to_be_finished(stored, capsys):
    epochs = {"activations": 2, "weights": 6, "mixed": 20}
    settings = [f"--config.stages.{name}.epochs={count}" for name, count in epochs.items()]
    settings += ["--config.model.width=4", "--config.evaluate_every=30", "--config.report_random=4"]
    words = ["train", "--config", str(CONFIG), "--workdir", str(stored / "digits"), *settings]
    assert main([*words, "--config.stages.mixed.epochs=21"]) == 2
    check_line(capsys.readouterr().err, "config.stages.mixed.epochs: ", start="bitmixer: ")
    before = (stored / "digits" / "metrics.jsonl").read_bytes()
    assert main(words) == 0
    after = (stored / "digits" / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    assert b'"kind": "train"' not in after[len(before) :]


def test_onnx_files_run_as_they_did(stored, known, caplog):
    pytest.importorskip("onnxruntime")
    from bitmixer_jax.export.onnx_runner import OnnxRunner

    switchable = OnnxRunner(stored / "switchable.onnx")
    for policy, logits in zip(known["policies"], known["logits"], strict=True):
        agrees(switchable(known["images"], policy), logits)
    fixed = OnnxRunner(stored / "policy.onnx")
    agrees(fixed(known["images"]), switchable(known["images"], fixed.policy))
    warned = [record.getMessage().partition(": ")[0] for record in caplog.records]
    assert warned == [str(stored / name) for name in ("switchable.onnx", "policy.onnx")]


def test_a_stablehlo_file_runs_as_it_did(stored, known):
    pytest.importorskip("flatbuffers")
    from bitmixer_jax.export.stablehlo import StablehloRunner

    run = StablehloRunner(stored / "net.stablehlo")
    for policy, logits in zip(known["policies"], known["logits"], strict=True):
        agrees(run(known["images"], policy), logits)
