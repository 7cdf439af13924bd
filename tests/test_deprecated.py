"""What version 0.1 called otherwise: names, modules, settings, flags and keys of files."""

import importlib
import json
import logging
import pickle

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax import cli, deprecated
from bitmixer_jax.front import Front, Point, load_front
from bitmixer_jax.training import default_config
from bitmixer_jax.training.config import read

QUICK = dict(images=16, random=1)


@pytest.mark.parametrize(("old", "new"), deprecated.MODULES.items())
def test_a_module_is_found_by_its_old_name(old, new):
    with pytest.warns(DeprecationWarning, match=f"bitmixer_jax.{old} is deprecated"):
        found = importlib.import_module(f"bitmixer_jax.{old}")
    assert found is importlib.import_module(f"bitmixer_jax.{new}")


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [(module, *names) for module, names_ in deprecated.NAMES.items() for names in names_.items()],
)
def test_a_name_in_a_module_is_found_by_its_old_name(module, old, new):
    found = importlib.import_module(f"bitmixer_jax.{module}")
    home, _, name = new.rpartition(".")
    target = importlib.import_module(f"bitmixer_jax.{home}") if home else found
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated .*{name}"):
        assert getattr(found, old) is getattr(target, name)
    with pytest.raises(AttributeError):
        found.no_such_name  # noqa: B018


@pytest.mark.parametrize(("old", "new"), deprecated.MODEL_SETTINGS.items())
def test_settings_of_a_network_are_read_by_their_old_names(old, new, caplog):
    value = {"weight_quantizer": "double", "first_last_layers": "int8"}[new]
    plain = bm.create_model("resnet8", num_classes=10, **{new: value})
    assert bm.create_model("resnet8", num_classes=10, **{old: value}) == plain
    deprecated.tell.cache_clear()
    config = default_config()
    with caplog.at_level(logging.WARNING, "bitmixer_jax"):
        setattr(config.model, old, value)
    assert f"config.model.{old} is deprecated" in caplog.text
    assert config.model[new] == config.model[old] == value
    assert read(config).model[new] == value
    saved = json.loads(json.dumps(read(config).model))
    saved[old] = saved.pop(new)
    again = {**json.loads(config.to_json_best_effort()), "model": saved}
    assert read(again).model[new] == value


def test_an_override_may_name_a_setting_as_before(tiny):
    assert tiny("model.weight_kind=double").model.weight_quantizer == "double"


def test_a_front_file_of_before_is_read(tmp_path):
    point = Point(widths=(2, 4), cost=1.0, loss=1.0, top1=0.5)
    front = Front(
        points=(point,),
        names=("a", "b"),
        choices=(2, 3, 4),
        cost="bits",
        unit="bits",
        weights_digest="0123",
    )
    front.save(tmp_path / "front.json")
    content = json.loads((tmp_path / "front.json").read_text())
    content["network"] = content.pop("weights_digest")
    (tmp_path / "old.json").write_text(json.dumps(content))
    found = load_front(tmp_path / "old.json", ("a", "b"), bm.BitSpace(), "0123")
    assert found == front
    with pytest.warns(DeprecationWarning, match=r"Front\.network"):
        assert found.network == "0123"


def test_flags_of_export_keep_their_old_names(trained, tmp_path, caplog):
    words = ["export", "--workdir", trained, "--format", "packed", "--out", tmp_path / "net"]
    deprecated.tell.cache_clear()
    with caplog.at_level(logging.WARNING, "bitmixer_jax"):
        status = cli.main([*map(str, words), "--images", "16", "--tables", "float16"])
    assert status == 0
    assert "--tables is deprecated" in caplog.text
    arguments = ["--norm_dtype", "float16", "--images", "16", "--overwrite"]
    before = (tmp_path / "net").read_bytes()
    assert cli.main([*map(str, words), *arguments]) == 0
    assert (tmp_path / "net").read_bytes() == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_functions_that_took_a_workdir_still_do(trained, tmp_path):
    from bitmixer_jax.export.workdir import Settings as ExportSettings
    from bitmixer_jax.export.workdir import export_workdir
    from bitmixer_jax.runs import evaluate_workdir
    from bitmixer_jax.search.workdir import Settings, front_workdir, search_workdir

    from bitmixer_jax.training import load_trained

    run, model, variables = load_trained(trained)
    assert (run.seed, model.num_layers, set(variables)) == (0, 6, {"params", "batch_stats"})
    result = evaluate_workdir(str(trained), policy="4", changes=["stage3.*=2"], count_levels=True)
    assert result["policy"]["widths"] == [4, 4, 4, 4, 2, 2]
    assert {row.bits for row in result["levels"]} == {2, 3, 4}
    small = Settings(images=16, method="random", evaluations=2)
    lines = search_workdir(str(trained), ["avg_bits=3"], str(tmp_path / "policy.json"), small)
    assert lines[0].startswith("| policy |")
    front_workdir(str(trained), "bitops", str(tmp_path / "front"), small, random=2)
    assert (tmp_path / "front" / "front.json").is_file()
    settings = ExportSettings(format="packed", tables="float16", **QUICK)
    lines = export_workdir(str(trained), str(tmp_path / "net"), settings)
    assert lines[0].startswith("verified: packed")
    with pytest.warns(DeprecationWarning, match=r"Runtime\.network"):
        assert bm.Runtime.load(tmp_path / "net").network == bm.load(trained).weights_digest


def test_what_training_returns_has_the_settings_of_its_run(trained):
    found = bm.load(trained)
    with pytest.warns(DeprecationWarning, match=r"Trained\.test_split"):
        assert found.test_split == found.run.test_split
    with pytest.raises(AttributeError):
        found.nothing  # noqa: B018


def test_errors_keep_their_code_when_they_are_pickled():
    error = pickle.loads(pickle.dumps(bm.UserError("words", "exists")))
    assert (str(error), error.code) == ("words", "exists")


def test_widths_of_numpy_are_widths():
    assert bm.BitSpace((2, 4)).check(np.asarray([2, 4])).tolist() == [2, 4]
