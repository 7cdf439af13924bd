"""Training and evaluation on images that are streamed: as on resident ones, resumed or not."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from bitmixer_jax import data
from bitmixer_jax.data import ImageReader
from bitmixer_jax.evaluation import Evaluator, evaluate, random_policies, recalibrate_missing
from bitmixer_jax.export import export_network
from bitmixer_jax.levels import levels_of
from bitmixer_jax.pairs import covering_policies
from bitmixer_jax.report import report
from bitmixer_jax.runtime import Runtime
from bitmixer_jax.search import SearchSession, SearchSettings
from bitmixer_jax.trained import load
from bitmixer_jax.training import Interrupted, load_config, train
from bitmixer_jax.training.config import read
from bitmixer_jax.training.metrics import read_metrics
from tests.refusals import refused
from tests.states import assert_same_end, newest_values, terminate_at

CONFIG = pathlib.Path(__file__).parent / "streamed_config.py"


@pytest.fixture(scope="module")
def pictures(jpegs, tmp_path_factory):
    """A data folder with 40 training and 9 validation pictures of 3 classes and a bit."""
    folder = tmp_path_factory.mktemp("pictures")
    jpegs.make_folder(folder / "pictures", classes=3, train=14, validation=3, longest=32)
    return folder


def configured(pictures, *settings, variant=""):
    words = [f"--config.{s}" for s in (f"data_dir={pictures}", *settings)]
    return load_config(f"{CONFIG}:{variant}", words)


@pytest.fixture(scope="module")
def streamed(pictures, tmp_path_factory):
    """Workdir of a run through the last stage alone, with its report."""
    workdir = tmp_path_factory.mktemp("streamed") / "run"
    report(train(configured(pictures, "order=('mixed',)"), workdir))
    return workdir


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """Workdir of a run through the three stages."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(configured(pictures), workdir)
    return workdir


def test_a_run_on_streamed_images_learns_and_reports(streamed):
    records = read_metrics(streamed, "train")
    assert len(records) == 50
    assert np.mean([r["accuracy"] for r in records[-10:]]) > 0.6
    assert all("unreadable_images" not in record for record in records)
    assert "9 images" in (streamed / "report" / "README.md").read_text()


@pytest.mark.slow
def test_two_runs_of_a_seed_are_the_same_and_of_another_are_not(pictures, tmp_path, capsys):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        train(configured(pictures, f"seed={seed}", variant="float"), tmp_path / name)
    one, two, other = (newest_values(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one != other
    assert "warning" not in capsys.readouterr().out  # as where the step is compiled twice


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 5, 33])
def test_a_stopped_run_ends_as_the_one_that_never_was(whole, pictures, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patched:
        terminate_at(patched, at)
        with pytest.raises(Interrupted):
            train(configured(pictures), tmp_path / "run")
    assert at <= newest_values(tmp_path / "run")[0] <= at + 2
    train(configured(pictures), tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.slow
def test_workers_may_change_when_a_run_goes_on(whole, pictures, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) > 7:
            shutil.rmtree(folder)
    train(configured(pictures, "workers=2"), workdir)
    assert_same_end(workdir, whole)


def test_settings_that_streams_have_no_use_for_are_refused(pictures, tmp_path):
    for setting in ("pad=4", "steps_per_dispatch=2"):
        with refused("conflict", f"config.{setting.replace('=', ' = ')}"):
            train(configured(pictures, setting), tmp_path / "run")


@pytest.mark.slow
def test_unreadable_images_are_counted_or_fatal(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    damaged = sorted((tmp_path / "data").rglob("train/*/*.JPEG"))[3]
    damaged.write_bytes(damaged.read_bytes()[:100])
    wrong = next((tmp_path / "data").rglob("val/*/*.JPEG"))
    wrong.write_bytes(b"")
    with refused("bad-image", 1, 8, damaged.name):
        train(configured(tmp_path / "data", variant="float"), tmp_path / "fatal")
    skip = configured(tmp_path / "data", "stream.skip_unreadable=True", variant="float")
    report(train(skip, tmp_path / "run"))
    last = read_metrics(tmp_path / "run", "train")[-1]
    assert last["unreadable_images"] == 1
    found = evaluate(tmp_path / "run")
    assert found["examples"] == 8


@pytest.mark.slow
def test_a_stream_scores_as_the_same_images_in_memory(streamed):
    loaded = load(streamed)
    run, model, variables = loaded.run, loaded.model, loaded.variables
    test = run.load("validation")
    policies = np.concatenate([random_policies(model, 20, 0), covering_policies(model)])
    resident = test.subset(np.arange(len(test)))
    found = [
        Evaluator(model, images, test.mean, test.std, batch_size=4, policies=8)
        for images in (test, resident)
    ]
    scores = [evaluator.scores(variables, policies) for evaluator in found]
    assert np.array_equal(scores[0].top1, scores[1].top1)
    assert np.array_equal(scores[0].loss, scores[1].loss)
    assert [evaluator.traces for evaluator in found] == [1, 1]


def test_images_are_read_once_for_all_policies(streamed, monkeypatch):
    loaded = load(streamed)
    run, model, variables = loaded.run, loaded.model, loaded.variables
    test = run.load("validation")
    read, original = [], type(test.source).read

    def counted(source, index):
        read.append(index)
        return original(source, index)

    monkeypatch.setattr(type(test.source), "read", counted)
    evaluator = Evaluator(model, test, test.mean, test.std, batch_size=4, policies=2)
    evaluator.scores(variables, random_policies(model, 9, 0))
    assert sorted(read) == list(range(9))


@pytest.mark.slow
def test_what_comes_after_training_takes_a_subset(streamed):
    trained, _ = recalibrate_missing(load(streamed))
    assert evaluate(trained)["examples"] == 9
    assert {row.bits for row in levels_of(trained)} == {2, 3, 4}
    session = SearchSession(trained, SearchSettings(images=10))
    assert isinstance(session.data, data.Dataset)
    assert len(session.data) == 10


@pytest.mark.slow
def test_a_baseline_starts_a_streamed_run(pictures, tmp_path):
    train(configured(pictures, variant="float"), tmp_path / "float")
    few = configured(pictures, f"init_from={tmp_path / 'float'}", "order=('weights',)")
    report(train(few, tmp_path / "run"))
    assert "| full-precision baseline |" in (tmp_path / "run" / "report" / "README.md").read_text()


@pytest.mark.slow
def test_the_imagenet_configurations_follow_the_protocol():
    folder = pathlib.Path(__file__).parents[2] / "experiments" / "configs"
    layers = {"resnet18": 16, "resnet50": 48, "mobilenetv2": 51}
    for name, number in layers.items():
        run = read(load_config(f"{folder}/imagenet_{name}.py", []))
        assert sum(stage.epochs for stage in run.stages) == 160
        assert [stage.widths for stage in run.stages] == ["network", "network", "layer"]
        assert run.choices == (2, 3, 4)
        assert (run.stream.size, run.stream.resize, run.flip, run.pad) == (224, 256, True, 0)
        model = run.build(1000, (run.stream.size, run.stream.size, 3))
        assert model.num_layers == number
        images = jax.ShapeDtypeStruct((2, 224, 224, 3), np.float32)
        bits = model.space.uniform(2, number)
        start = functools.partial(model.init_with_output, bits=bits, train=False)
        logits, _ = jax.eval_shape(start, jax.random.key(0), images)
        assert logits.shape == (2, 1000)


@pytest.mark.slow
def test_an_imagenet_configuration_trains_and_evaluates(jpegs, command, tmp_path):
    pytest.importorskip("simplejpeg")
    jpegs.make_folder(tmp_path / "imagenet", classes=3, train=14, validation=3, longest=40)
    file = pathlib.Path(__file__).parents[2] / "experiments/configs/imagenet_resnet18.py"
    changes = {
        "data_dir": tmp_path,
        "model.name": "resnet8",  # a smaller network: the rest is as it is
        "batch_size": 8,
        "stream.size": 16,
        "stream.resize": 20,
        "workers": 1,
        "stages.activations.epochs": 0.5,
        "stages.weights.epochs": 1,
        "stages.mixed.epochs": 2,
    }
    words = [f"--config.{name}={value}" for name, value in changes.items()]
    done = command("train", "--config", file, "--workdir", tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    done = command("evaluate", "--workdir", tmp_path / "run", "--random", 2, "--recalibrate")
    assert done.returncode == 0, done.stderr
    assert "9 images" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_four_devices_train_on_the_same_batches(pictures, command, tmp_path, monkeypatch):
    losses = []
    for devices in (1, 4):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")
        workdir = tmp_path / f"run{devices}"
        words = ["--config.order=('weights',)", "--config.report_random=0"]
        done = command(
            *("train", "--config", CONFIG, "--workdir", workdir, *words),
            f"--config.data_dir={pictures}",
        )
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stdout
        losses.append([record["loss"] for record in read_metrics(workdir, "train")])
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-4)
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05)


def test_files_are_read_as_evaluation_reads_them(streamed, pictures):
    run = load(streamed).run
    test = run.load(run.test_split)
    reader = Runtime.load(streamed, batch_size=8).reader
    assert reader.stream == test.settings
    assert reader.stream.orientation == "obey"
    found = reader.read([test.source.name(i) for i in range(len(test))])
    assert np.array_equal(found, test.subset(np.arange(len(test))).images)
    again = ImageReader.from_json(reader.to_json(), reader.image_shape, "a file")
    assert np.array_equal(found[:2], again.read([test.source.name(i) for i in range(2)]))


def test_a_run_from_before_the_setting_of_orientation_ignores_tags(streamed, tmp_path):
    workdir = shutil.copytree(streamed, tmp_path / "old")
    config = json.loads((workdir / "config.json").read_text())
    del config["stream"]["orientation"]
    (workdir / "config.json").write_text(json.dumps(config))
    run = load(workdir).run
    assert run.load(run.test_split).settings.orientation == "ignore"
    assert Runtime.load(workdir, batch_size=8).reader.stream.orientation == "ignore"


@pytest.mark.parametrize("change", ["renamed", "added", "removed", "in capitals"])
def test_classes_that_changed_since_the_training_are_refused(streamed, pictures, tmp_path, change):
    folder = shutil.copytree(pictures / "pictures", tmp_path / "pictures")
    for split in sorted(path for path in folder.iterdir() if path.is_dir()):
        last = sorted(path for path in split.iterdir() if path.is_dir())[-1]
        if change == "renamed":
            last.rename(split / "aaa")
        elif change == "added":
            shutil.copytree(last, split / "zzz")
        elif change == "removed":
            shutil.rmtree(last)
        else:
            last.rename(split / last.name.upper())
    data_dir = str(tmp_path)
    export = dict(format="packed", images=9, data_dir=data_dir)
    for use in (
        lambda: evaluate(streamed, data_dir=data_dir),
        lambda: SearchSession(load(streamed), SearchSettings(data_dir=data_dir)),
        lambda: export_network(streamed, tmp_path / "net", **export),
    ):
        with refused("other-data"):
            use()
    assert not (tmp_path / "net").exists()
