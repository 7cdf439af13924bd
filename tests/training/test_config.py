"""Configurations: those in the tree build; mistakes are one clear error before data are read."""

import pathlib

import pytest
from ml_collections import ConfigDict

from bitmixer_jax import data
from bitmixer_jax.errors import UserError
from bitmixer_jax.training import default_config, load_config
from bitmixer_jax.training.config import Run, read, to_json

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


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    with pytest.raises(UserError, match=f"unknown setting.*did you mean {hint}") as caught:
        read(changed(path, 1))
    one_line(caught)


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        ("model.name", "resnet80", "resnet8"),
        ("order", ["activations", "mixd"], "mixed"),
    ],
)
def test_unknown_name_names_the_nearest(path, value, hint):
    with pytest.raises(UserError, match=f"did you mean .*{hint}") as caught:
        read(changed(path, value))
    one_line(caught)


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
        ("stages.mixed.name", "other"),
        ("stages.mixed", 3),
        ("stages", {}),
        ("stages", 3),
        ("order", []),
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
        ("model.num_classes", 3),
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
    with pytest.raises(UserError) as caught:
        read(changed(path, value))
    words = one_line(caught).replace("bit-widths", "choices")
    assert path.split(".")[-1].removeprefix("num_") in words


@pytest.mark.parametrize("path", ["stages.mixed.epochs", "model.name"])
def test_missing_setting_is_an_error_that_names_it(path):
    tree = changed(path, None)
    *folders, name = path.split(".")
    node = tree
    for folder in folders:
        node = node[folder]
    del node[name]
    with pytest.raises(UserError, match=name):
        read(tree)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages.mixed.quantize": "nothing"}, "full-precision baseline"),
        ({"stages.mixed.distill": "teacher"}, r"config\.teacher"),
        ({"stages.mixed.distill": "widest"}, "sandwich"),
        ({"optimizer.name": "adam"}, "adamw"),
    ],
)
def test_contradiction_is_an_error(settings, message):
    config = default_config()
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=message) as caught:
        read(config)
    one_line(caught)


def test_override_changes_a_setting(tiny_file):
    config = load_config(
        tiny_file, ["--config.stages.mixed.epochs=3", "--config.seed=5", "--config.choices=(2,8)"]
    )
    run = read(config)
    assert (run.stages[-1].epochs, run.seed, run.choices) == (3.0, 5, (2, 8))


@pytest.mark.parametrize(
    "override",
    [
        "stages.mixed.epochs=abc",
        "stages.mixed.epoch=3",
        "stages.mixd.epochs=3",
        "sed=3",
        "seed=x",
        "flip=maybe",
    ],
)
def test_wrong_override_is_an_error(tiny_file, override):
    with pytest.raises(UserError, match=r"tiny_config\.py") as caught:
        load_config(tiny_file, [f"--config.{override}"])
    one_line(caught)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("batch_sise=4", r"config\.batch_sise: no such setting; did you mean batch_size\?"),
        ("stages.mixd.epochs=3", r"config\.stages\.mixd\.epochs: .*; did you mean mixed\?"),
        ("model.quux=3", r"config\.model\.quux: .*; there are .*name"),
        ("seed.x=3", r"config\.seed\.x: no such setting; it has no parts"),
    ],
)
def test_an_override_of_no_setting_names_the_nearest(tiny_file, override, says):
    with pytest.raises(UserError, match=says) as caught:
        load_config(tiny_file, [f"--config.{override}"])
    one_line(caught)


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
    with pytest.raises(UserError, match=r"broken\.py") as caught:
        load_config(tmp_path / "broken.py", [])
    one_line(caught)


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"none\.py: no such file"):
        load_config(tmp_path / "none.py", [])


def test_default_configuration_is_a_config_dict():
    assert isinstance(default_config(), ConfigDict)
