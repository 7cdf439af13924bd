"""Configurations: those in the tree build; mistakes are one clear error before data are read."""

import pathlib

import pytest
from ml_collections import ConfigDict

from bitmixer_jax import data
from bitmixer_jax.training import default_config, load_config
from bitmixer_jax.training.config import Run, read, to_json
from tests.refusals import refused

CONFIGS = pathlib.Path(__file__).parents[2] / "experiments" / "configs"
FILES = sorted(CONFIGS.glob("*.py"))


def changed(path, value):
    """The default configuration with one setting changed, of whatever type."""
    tree = to_json(default_config())
    *folders, name = path.split(".")
    node = tree
    for folder in folders:
        node = node[folder]
    node[name] = value
    return tree


@pytest.fixture(autouse=True)
def _no_data(monkeypatch):
    def load(*_, **__):
        pytest.fail("data were read")

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(data, "open_split", load)


def test_a_setting_that_the_file_does_not_name_can_be_given(tiny_file):
    config = load_config(
        str(tiny_file),
        ["--config.model.stem_strides=2", "--config.stages.activations.rho_end=0.5"],
    )
    assert config.model.stem_strides == 2
    assert config.stages.activations.rho_end == 0.5


def test_there_are_configurations():
    assert FILES


@pytest.mark.parametrize("variant", ["", "float"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_configuration_builds(file, variant):
    run = read(load_config(f"{file}:{variant}", []))
    assert isinstance(run, Run)
    assert run.is_baseline == (variant == "float")
    assert run.build(10, (32, 32, 3)).num_layers > 0


def test_tiny_configuration_builds(tiny):
    assert [stage.name for stage in read(tiny()).stages] == ["activations", "weights", "mixed"]


def test_saved_configuration_reads_as_the_same_run():
    assert read(to_json(default_config())) == read(default_config())


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("batchsize", "batch_size"),
        ("optimizer.momentun", "momentum"),
        ("model.widht", "width"),
        ("stages.mixed.epoch", "epochs"),
    ],
)
def test_unknown_setting_names_the_nearest(path, hint):
    with refused("unknown-name", repr(path.split(".")[-1]), f"did you mean {hint}"):
        read(changed(path, 1))


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        ("model.name", "resnet80", "resnet8"),
        ("order", ["activations", "mixd"], "mixed"),
    ],
)
def test_unknown_name_names_the_nearest(path, value, hint):
    with refused("unknown-name", path.split(".")[0], f"did you mean {hint}"):
        read(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("stages.mixed.epochs", "abc"),
        ("stages.mixed.epochs", float("inf")),
        ("stages.mixed.epochs", 0),
        ("stages.mixed.draws", "2"),
        ("stages.mixed.draws", 1.5),
        ("stages.mixed.learning_rate", None),
        ("stages.mixed.rho_end", 1.5),
        ("stages.mixed.quantize", "all"),
        ("stages.mixed", 3),
        ("stages", 3),
        ("order", "mixed"),
        ("order", [["mixed"]]),
        ("order", [3]),
        ("order", ["mixed", "mixed"]),
        ("choices", []),
        ("choices", [4, 3]),
        ("choices", ["2"]),
        ("choices", 3),
        ("optimizer", 3),
        ("optimizer.momentum", "x"),
        ("optimizer.momentum", 1.0),
        ("optimizer.nesterov", "no"),
        ("optimizer.weight_decay", None),
        ("optimizer.ema", float("nan")),
        ("optimizer.name", "sdg"),
        ("model.name", 3),
        ("model.width", "x"),
        ("model.width", 0),
        ("model.momentum", "x"),
        ("model.momentum", 2.0),
        ("model.norm", "batch"),
        ("model.first_last_layers", "int4"),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", True),
        ("seed", 2**40),
        ("selection", "blok"),
        ("batch_size", 0),
        ("log_every", 0),
        ("evaluate_every", float("inf")),
        ("checkpoint_seconds", float("nan")),
        ("label_smoothing", 1.0),
        ("flip", 1),
        ("dataset", 3),
    ],
    ids=str,
)
def test_wrong_value_is_an_error_that_names_the_setting(path, value):
    with refused("bad-value") as caught:
        read(changed(path, value))
    assert path.split(".")[-1] in str(caught.value).replace("bit-widths", "choices")


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        ("stages.mixed.name", "other", "unknown-name"),
        ("stages", {}, "unknown-name"),
        ("order", [], "missing-value"),
        ("model.num_classes", 3, "unknown-name"),
    ],
)
def test_what_is_no_setting_or_has_none_is_named(path, value, code):
    with refused(code, path.split(".")[-1]):
        read(changed(path, value))


@pytest.mark.parametrize(
    ("path", "code"), [("stages.mixed.epochs", "missing-value"), ("model.name", "bad-value")]
)
def test_missing_setting_is_an_error_that_names_it(path, code):
    tree = changed(path, None)
    *folders, name = path.split(".")
    node = tree
    for folder in folders:
        node = node[folder]
    del node[name]
    with refused(code, name):
        read(tree)


@pytest.mark.parametrize(
    ("settings", "code", "mention"),
    [
        ({"stages.mixed.quantize": "nothing"}, "conflict", "config.init_from"),
        ({"stages.mixed.distill": "teacher"}, "missing-value", "config.teacher"),
        ({"stages.mixed.distill": "widest"}, "conflict", "sandwich"),
        ({"optimizer.name": "adam"}, "conflict", "adamw"),
    ],
)
def test_contradiction_is_an_error(settings, code, mention):
    config = default_config()
    config.update_from_flattened_dict(settings)
    with refused(code, mention):
        read(config)


def test_override_changes_a_setting(tiny_file):
    config = load_config(
        tiny_file, ["--config.stages.mixed.epochs=3", "--config.seed=5", "--config.choices=(2,8)"]
    )
    run = read(config)
    assert (run.stages[-1].epochs, run.seed, run.choices) == (3.0, 5, (2, 8))


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("stages.mixed.epochs=abc", "bad-value"),
        ("stages.mixed.epoch=3", "unknown-name"),
        ("stages.mixd.epochs=3", "unknown-name"),
        ("sed=3", "unknown-name"),
        ("seed=x", "bad-value"),
        ("flip=maybe", "bad-value"),
    ],
)
def test_wrong_override_is_an_error(tiny_file, override, code):
    with refused(code, tiny_file):
        load_config(tiny_file, [f"--config.{override}"])


@pytest.mark.parametrize(
    ("override", "mentions"),
    [
        ("batch_sise=4", ("config.batch_sise", "did you mean batch_size?")),
        ("stages.mixd.epochs=3", ("config.stages.mixd.epochs", "did you mean mixed?")),
        ("model.quux=3", ("config.model.quux", "name")),
        ("seed.x=3", ("config.seed.x",)),
    ],
)
def test_an_override_of_no_setting_names_the_nearest(tiny_file, override, mentions):
    with refused("unknown-name", *mentions):
        load_config(tiny_file, [f"--config.{override}"])


@pytest.mark.parametrize(
    "text",
    [
        "def get_config():\n    return 1 / 0\n",
        "import no_such_module\n",
        "def get_config(:\n",
        "x = 1\n",
        "def get_config():\n    return 3\n",
    ],
    ids=["raises", "imports", "syntax", "no function", "no config"],
)
def test_broken_file_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "broken.py").write_text(text)
    with refused("bad-value", tmp_path / "broken.py"):
        load_config(tmp_path / "broken.py", [])


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with refused("no-such-file", tmp_path / "none.py"):
        load_config(tmp_path / "none.py", [])


def test_default_configuration_is_a_config_dict():
    assert isinstance(default_config(), ConfigDict)
