"""The examples of experiments/ run as a person would run them."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from bitmixer_jax import data
from bitmixer_jax.cost import costs
from bitmixer_jax.front import Front, Point
from bitmixer_jax.trained import load
from bitmixer_jax.training.checkpoints import digest
from tests.refusals import check_line

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"
SLOW = pytest.mark.slow
POLICIES = ([2] * 6, [3, 2, 3, 2, 3, 2], [4] * 6)


def script(name, *words):
    return [sys.executable, str(EXPERIMENTS / name), *map(str, words)]


def run(name, *words):
    return subprocess.run(script(name, *words), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def front(trained, tmp_path_factory):
    """A front file of three policies of the tiny network."""
    loaded = load(trained)
    model, variables = loaded.model, loaded.variables
    cost = costs(model)["bitops"]
    points = tuple(
        Point(widths=tuple(p), cost=float(cost(np.asarray(p))), loss=1.0 - i / 4, top1=0.5)
        for i, p in enumerate(POLICIES)
    )
    made = Front(
        points=points,
        names=model.names,
        choices=model.space.choices,
        cost=cost.name,
        unit=cost.unit,
        weights_digest=digest(variables),
    )
    path = tmp_path_factory.mktemp("front") / "front.json"
    made.save(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three digits, one of them in colour and larger."""
    folder = tmp_path_factory.mktemp("photos")
    images = data.load("digits", "test[:3]").images[..., 0]
    for i, image in enumerate(images):
        picture = PIL.Image.fromarray(image)
        if i == 2:
            picture = picture.resize((60, 40)).convert("RGB")
        picture.save(folder / f"digit{i}.png")
    return folder


# --- follow_budget.py ---


@pytest.mark.slow
def test_follow_budget_writes_numbers_and_a_plot(trained, front, tmp_path):
    out = tmp_path / "out"
    given = ["--workdir", trained, "--front", front, "--out", out, "--steps", 60]
    done = run("follow_budget.py", *given, "--batch_size", 16)
    assert done.returncode == 0, done.stderr
    with PIL.Image.open(out / "follow_budget.png") as image:
        assert image.width > 500
    found = json.loads((out / "follow_budget.json").read_text())
    assert (found["calls"], found["compilations"]) == (60, 1)
    assert 2 <= found["switches"] <= found["switches_without_hysteresis"]
    assert f"switches: {found['switches']} with hysteresis 0.05" in done.stdout
    records = found["records"]
    cheapest = min(r["cost"] for r in records)
    assert f"{cheapest:g}" in done.stderr  # the warning of budgets below every point
    assert len({r["cost"] for r in records}) == 3
    for record in records:
        assert record["fits"] == (record["cost"] <= record["budget"])
        assert record["fits"] or record["cost"] == cheapest
        assert record["accuracy"] in {right / 16 for right in range(17)}
    assert found["calls_below_every_point"] == sum(not r["fits"] for r in records) > 0
    assert found["accuracy"] == pytest.approx(np.mean([r["accuracy"] for r in records]))
    assert found["accuracy"] > 0.2


@pytest.mark.slow
def test_follow_budget_refuses_a_front_of_other_weights(trained, front, tmp_path):
    given = ["--front", front, "--out", tmp_path / "out", "--steps", 5]
    done = run("follow_budget.py", "--workdir", f"{trained}@weights", *given)
    assert done.returncode == 2
    check_line(done.stderr, front, "weights", start="follow_budget: ")


# --- classify_folder.py ---


@pytest.mark.slow
def test_classify_folder_goes_round_and_ends(trained, photos):
    given = [photos, "--workdir", trained, "--policy", "4,3,2,2,3,4", "--rounds", 2, "--every", 0]
    done = run("classify_folder.py", *given)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1] == lines[5] == "policy 4,3,2,2,3,4"
    assert lines[2:5] == lines[6:9]
    for i, line in enumerate(lines[2:5]):
        name, found, confidence = line.split()
        assert name == f"digit{i}.png"
        assert found in set("0123456789")
        assert 0.1 <= float(confidence) <= 1
    assert lines[9:] == ["stopped after 2 rounds"]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_classify_folder_switches_when_told(trained, front, photos, stop):
    by_file = stop == signal.SIGTERM
    which = ["--front", front] if by_file else ["--policy", 4, 3, "--policy", 2]
    order = POLICIES if by_file else ([4] * 6, [3] * 6, [2] * 6)
    words = [photos, "--workdir", trained, *which, "--every", 0.05]
    with subprocess.Popen(
        script("classify_folder.py", *words), stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        try:
            assert process.stdout.readline().startswith(f"running as {process.pid}, 3 policies")
            for policy in [*order, order[0]]:
                wanted = f"policy {','.join(map(str, policy))}\n"
                seen = next(line for line in process.stdout if line == wanted)
                assert seen
                process.send_signal(signal.SIGUSR1)
            process.send_signal(stop)
            rest = process.stdout.read().splitlines()
            assert process.wait() == 0
            assert rest[-1].startswith("stopped after ")
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        (["--policy", "5"], (5, (2, 3, 4))),
        pytest.param(["--policy", "4,4"], (2, 6), marks=SLOW),
        pytest.param(["--front", "none.json"], ("none.json",), marks=SLOW),
    ],
)
def test_classify_folder_says_what_is_wrong_in_one_line(trained, photos, words, mentions):
    done = run("classify_folder.py", photos, "--workdir", trained, *words, "--rounds", 1)
    assert done.returncode == 2
    check_line(done.stderr, *mentions, start="classify_folder: ")


# --- time_switches.py ---


@pytest.mark.slow
def test_time_switches_writes_both_times(trained, tmp_path):
    out = tmp_path / "out.json"
    given = ["--workdir", trained, "--calls", 20, "--images", 1, 8, "--json", out]
    done = run("time_switches.py", *given)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["images"], row["compilations"]) for row in rows] == [(1, 1), (8, 1)]
    for row in rows:
        for average in ("mean", "median"):
            times = row[average]
            assert min(times[kind] for kind in ("with", "without", "switch")) > 0
            assert times["ratio"] == pytest.approx(times["with"] / times["without"])
    assert done.stdout.count("ratio") == 4
