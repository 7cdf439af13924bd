"""The command line: exit status, one line for a mistake, JSON results, help without jax."""

import json
import shutil
import subprocess
import sys

import pytest

from bitmixer_jax import cli
from bitmixer_jax.errors import UserError, one_line
from bitmixer_jax.evaluation import random_policies
from bitmixer_jax.front import load_front
from bitmixer_jax.policy import load_policy, save_policy
from bitmixer_jax.trained import load
from bitmixer_jax.training.checkpoints import Checkpoints
from tests.refusals import check_line

COMMANDS = ("train", "evaluate", "cost", "search", "front", "prepare", "benchmark")


@pytest.fixture
def fails(capsys, monkeypatch):
    """``fails(code, "evaluate", ..., mentions=())``: a command must fail with one line so."""
    errors, init = [], UserError.__init__

    def keep(self, *arguments, **more):
        init(self, *arguments, **more)
        errors.append(self)

    monkeypatch.setattr(UserError, "__init__", keep)

    def run(code, *words, mentions=()):
        assert cli.main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        check_line(said, *mentions, start="bitmixer: ")
        # The command line may add the flag that helps.
        assert {e.code for e in errors if said.startswith(f"bitmixer: {one_line(e)}")} == {code}

    return run


def evaluated(workdir, path, *words):
    assert cli.main(["evaluate", "--workdir", str(workdir), "--json", str(path), *words]) == 0
    return json.loads(path.read_text())


# A user's mistakes.


def test_unknown_width_is_one_line(fails, trained):
    words = ("evaluate", "--workdir", trained, "--policy", "5")
    fails("policy-width", *words, mentions=(5, (2, 3, 4)))


def test_wrong_policy_length_is_one_line(fails, trained):
    fails("policy-length", "evaluate", "--workdir", trained, "--policy", "4,3", mentions=(2, 6))


def test_misspelt_layer_in_a_policy_file_names_the_nearest(fails, trained, tmp_path):
    model = load(trained).model
    path = tmp_path / "policy.json"
    save_policy(path, [3] * model.num_layers, model.names, model.space)
    path.write_text(path.read_text().replace("stage1.block1.conv1", "stage1.blok1.conv1"))
    fails(
        *("unknown-name", "evaluate", "--workdir", trained, "--policy", path),
        mentions=(path, "'stage1.blok1.conv1'", "did you mean stage1.block1.conv1"),
    )


def test_policy_that_is_no_file_is_one_line(fails, trained):
    words = ("evaluate", "--workdir", trained, "--policy", "best.json")
    fails("policy-form", *words, mentions=("'best.json'",))


def test_policy_on_a_float_twin_is_one_line(fails, trained_float):
    fails("no-widths", "evaluate", "--workdir", trained_float, "--policy", "3")


def test_random_policies_of_a_float_twin_are_refused(fails, trained_float):
    words = ("evaluate", "--workdir", trained_float, "--random", "5")
    fails("no-widths", *words, mentions=(trained_float,))


def test_missing_workdir_is_one_line(fails, tmp_path):
    workdir = tmp_path / "none"
    fails("no-run", "evaluate", "--workdir", workdir, mentions=(workdir, "config.json"))


def test_unknown_stage_names_those_there_are(fails, trained):
    fails(
        *("no-run", "evaluate", "--workdir", f"{trained}@mixd"),
        mentions=(trained, "'mixd'", "activations, weights, mixed"),
    )


def test_data_that_are_not_prepared_say_how_to(fails, tiny_file, tmp_path):
    fails(
        *("no-data", "train", "--config", tiny_file, "--workdir", tmp_path / "run"),
        *("--config.dataset=cifar10", f"--config.data_dir={tmp_path}"),
        mentions=(f"`bitmixer prepare cifar10 --source PATH --data_dir {tmp_path}`",),
    )


def test_unknown_setting_is_one_line(fails, tiny_file, tmp_path):
    words = ("train", "--config", tiny_file, "--workdir", tmp_path, "--config.sed=1")
    fails("unknown-name", *words, mentions=("config.sed", "did you mean seed"))


def test_missing_configuration_is_one_line(fails, tmp_path):
    config = tmp_path / "none.py"
    words = ("train", "--config", config, "--workdir", tmp_path / "run")
    fails("no-such-file", *words, mentions=(config,))


def test_configuration_that_raises_is_one_line(fails, tiny_file, tmp_path):
    words = ("train", "--config", f"{tiny_file}:raises", "--workdir", tmp_path / "run")
    fails("bad-value", *words, mentions=(tiny_file, "RuntimeError: this file is broken"))


def test_batch_larger_than_the_data_is_one_line(fails, tiny_file, tmp_path):
    words = ("train", "--config", tiny_file, "--workdir", tmp_path, "--config.batch_size=512")
    fails("bad-value", *words, mentions=("config.batch_size = 512", 256))


def test_other_configuration_in_the_workdir_lists_the_difference(fails, tiny_file, trained):
    words = ("train", "--config", tiny_file, "--workdir", trained, "--config.seed=1")
    fails("other-run", *words, mentions=(trained, "config.seed: 0 -> 1"))


def test_workdir_that_is_a_file_is_one_line(fails, tiny_file, tmp_path):
    (tmp_path / "file").write_text("")
    words = ("train", "--config", tiny_file, "--workdir", tmp_path / "file")
    fails("not-writable", *words, mentions=(tmp_path / "file",))


@pytest.mark.parametrize("where", ["none/out.json", "."])
def test_result_that_cannot_be_written_is_refused_before_the_work(fails, tmp_path, where):
    words = ("evaluate", "--workdir", tmp_path / "none", "--json", tmp_path / where)
    fails("not-writable", *words, mentions=(f"--json {tmp_path / where}",))


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate",),
        ("evaluate", "--workdir", "x", "--random", "-1"),
        ("evaluate", "--workdir", "x", "--random", "many"),
        ("evaluate", "--workdir", "x", "--config.seed=1"),
        ("train", "--config", "x", "--workdir", "x", "--confg.seed=1"),
        ("train", "--config", "x", "--workdir", "x", "--config.seed", "1"),
        ("search", "--workdir", "x", "--out", "x"),
        ("search", "--workdir", "x", "--out", "x", "--budget", "avg_bits=3", "--seed", "-1"),
        ("front", "--workdir", "x", "--out", "x", "--budget", "avg_bits=3"),
        ("evaluat",),
        (),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_one_line(capsys, words):
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    assert end.value.code == 2
    check_line(capsys.readouterr().err, "--help", start="bitmixer")


def test_mistake_leaves_no_traceback_in_a_process_of_its_own(command, tmp_path):
    done = command("evaluate", "--workdir", tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr == (f"bitmixer: {tmp_path / 'none'}: no run here (config.json is missing)\n")


@pytest.mark.slow
def test_loss_that_is_not_finite_stops_training_and_keeps_the_last_checkpoint(
    fails, tiny_file, tmp_path
):
    fails(
        *("not-finite", "train", "--config", tiny_file, "--workdir", tmp_path),
        *("--config.log_every=1", "--config.stages.weights.learning_rate=1e30"),
        mentions=("weights", 2, "config.optimizer.clip_norm"),
    )
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.steps[-1] == 2
    checkpoints.close()


# Results.


@pytest.fixture(scope="module")
def evaluation(trained, tmp_path_factory):
    """The result of the trained run by every protocol."""
    path = tmp_path_factory.mktemp("evaluation") / "out.json"
    return evaluated(trained, path, "--random", "5", "--policy", "4,3,2,2,3,4")


def test_the_seed_draws_the_random_policies(trained, tmp_path):
    model = load(trained).model
    found = []
    for seed in (1, 2):
        words = ("--no-uniform", "--random", "3", "--seed", str(seed))
        found.append(evaluated(trained, tmp_path / f"{seed}.json", *words)["random"])
        drawn = random_policies(model, 3, seed)
        assert found[-1]["average_bits"] == pytest.approx(drawn.mean())
    assert found[0]["average_bits"] != found[1]["average_bits"]


def test_json_holds_the_documented_keys_and_no_others(evaluation):
    assert set(evaluation) == {"examples", "uniform", "random", "policy"}
    assert evaluation["examples"] == 100
    assert set(evaluation["uniform"]) == {"2", "3", "4"}
    assert set(evaluation["random"]) == {
        *("policies", "mean", "std", "worst", "average_bits", "scores"),
    }
    assert evaluation["random"]["policies"] == len(evaluation["random"]["scores"]) == 5
    assert evaluation["policy"]["widths"] == [4, 3, 2, 2, 3, 4]
    assert set(evaluation["policy"]) == {"widths", "top1"}


def test_one_policy_alone_scores_as_in_the_uniform_protocol(trained, evaluation, tmp_path):
    result = evaluated(trained, tmp_path / "out.json", "--no-uniform", "--policy", "3")
    assert set(result) == {"examples", "policy"}
    assert result["policy"]["top1"] == evaluation["uniform"]["3"]


def test_stage_in_the_workdir_evaluates_the_network_of_then(trained, evaluation, tmp_path):
    then = evaluated(f"{trained}@weights", tmp_path / "then.json")
    assert then["uniform"].keys() == evaluation["uniform"].keys()
    assert then["uniform"] != evaluation["uniform"]


def test_unvisited_pairs_are_refused(fails, trained):
    words = ("evaluate", "--workdir", f"{trained}@weights", "--policy", "4,3,2,2,3,4")
    fails("uncalibrated", *words, mentions=("4->3", "--recalibrate"))


def test_recalibration_serves_unvisited_pairs_and_says_which(trained, tmp_path, capsys):
    words = ("--policy", "4,3,2,2,3,4", "--recalibrate", "--no-uniform")
    result = evaluated(f"{trained}@weights", tmp_path / "out.json", *words)
    assert set(result) == {"examples", "policy", "recalibrated"}
    right = 100 * result["policy"]["top1"]
    assert right == pytest.approx(round(right))
    assert right > 5  # of 100: the statistics were measured, not left at their start
    assert "stage1.block1.conv2 2->3" in result["recalibrated"]
    assert "stage1.block1.conv2 2->2" not in result["recalibrated"]
    assert "stage1.block1.conv2 2->3" in capsys.readouterr().out


def test_float_twin_has_one_accuracy(trained_float, tmp_path):
    assert set(evaluated(trained_float, tmp_path / "out.json")) == {"examples", "float"}


# Policies: what they cost, searching for them, changing them.


@pytest.fixture(scope="module")
def searched(trained, tmp_path_factory):
    """A copy of the trained run: searches write into it."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("searched") / "run")


def test_policy_with_changed_layers_is_evaluated(trained, tmp_path):
    words = ("--no-uniform", "--policy", "4", "--set", "stage2.*=2", "--set", "*.conv2=3")
    result = evaluated(trained, tmp_path / "out.json", *words)
    assert result["policy"]["widths"] == [4, 3, 2, 3, 4, 3]


@pytest.mark.parametrize(
    ("change", "code", "mentions"),
    [
        ("stage2.blok1.conv1=2", "unknown-name", ("did you mean stage2.block1.conv1",)),
        ("stage4.*=2", "unknown-name", ("'stage4.*'", "stage2.*")),
        ("stage2.*=5", "policy-width", ("stage2.*=5", (2, 3, 4))),
        ("stage2.*", "bad-value", ("stage2.*", "stage2.block1.conv1=2")),
    ],
)
@pytest.mark.parametrize("name", ["evaluate", "cost"])
def test_change_that_does_not_fit_is_one_line(fails, trained, name, change, code, mentions):
    words = (name, "--workdir", trained, "--policy", "4", "--set", change)
    fails(code, *words, mentions=mentions)


def test_change_of_no_policy_is_one_line(fails, trained):
    words = ("evaluate", "--workdir", trained, "--set", "stage2.*=2")
    fails("missing-value", *words, mentions=("--set", "--policy 4"))


def test_cost_of_a_policy_with_changed_layers_is_shown_and_written(trained, tmp_path, capsys):
    model = load(trained).model
    out = tmp_path / "policy.json"
    words = ("--set", "stage?.block1.conv1=2", "--set", "stage1.block1.conv1=3", "--out", str(out))
    assert cli.main(["cost", "--workdir", str(trained), *words]) == 0
    said = capsys.readouterr().out
    assert load_policy(out, model.names, model.space).tolist() == [3, 4, 2, 4, 2, 4]
    assert said.startswith("policy 3,4,2,4,2,4\n")
    for name in ("avg_bits", "bitops", "bytes", "activation_bytes", "activation peak"):
        assert name in said
    assert "3.16667 bits" in said
    assert f"written: {out}" in said


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet18", 16), ("mobilenetv2", 51), ("resnet20", 18)]
)
def test_cost_knows_networks_by_name(capsys, name, layers):
    assert cli.main(["cost", "--model", name, "--policy", "2"]) == 0
    said = capsys.readouterr().out
    assert f"policy {','.join(['2'] * layers)}\n" in said
    assert "25.0%" in said


@pytest.mark.parametrize(
    ("words", "code", "mentions"),
    [
        (("--model", "resnet19"), "unknown-name", ("'resnet19'", "did you mean resnet")),
        (("--model", "resnet20", "--policy", "5"), "policy-width", (5, (2, 3, 4))),
        (("--model", "resnet20", "--policy", "4,3"), "policy-length", (2, 18)),
        (("--model", "resnet20", "--latency", "none.json"), "no-such-file", ("none.json",)),
        (
            ("--model", "resnet20", "--out", "none/policy.json"),
            "not-writable",
            ("--out none/policy.json",),
        ),
        (("--workdir", "none"), "no-run", ("none", "config.json")),
    ],
)
def test_cost_of_what_there_is_not_is_one_line(fails, words, code, mentions):
    fails(code, "cost", *words, mentions=mentions)


def test_cost_of_a_float_twin_is_refused(fails, trained_float):
    fails("no-widths", "cost", "--workdir", trained_float)


def test_cost_does_not_overwrite_unasked(fails, tmp_path):
    out = tmp_path / "policy.json"
    out.write_text("mine")
    words = ("cost", "--model", "resnet20", "--out", out)
    fails("exists", *words, mentions=(f"--out {out}", "--overwrite"))
    assert out.read_text() == "mine"
    words = ["cost", "--model", "resnet20", "--out", str(out), "--overwrite"]
    assert cli.main(words) == 0
    assert json.loads(out.read_text())["format"] == "bitmixer-policy"


def test_search_writes_a_policy_that_can_be_evaluated(searched, tmp_path, capsys):
    out = tmp_path / "policy.json"
    words = ("--method", "random", "--evaluations", "6", "--images", "64", "--out", str(out))
    budget = ("--budget", "avg_bits=3", "--budget", "bitops=80%")
    assert cli.main(["search", "--workdir", str(searched), *budget, *words]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Test data: 100 images, read once, after the search." in said
    assert said.endswith(f"policy: {out}")
    found = json.loads(out.read_text())
    assert set(found["budget"]) == {"avg_bits", "bitops"}
    result = evaluated(searched, tmp_path / "out.json", "--no-uniform", "--policy", str(out))
    assert result["policy"]["top1"] == found["test"]["top1"]
    assert result["policy"]["widths"] == list(found["layers"].values())


@pytest.mark.slow
def test_front_writes_a_front_and_its_plots(searched, tmp_path, capsys):
    out = tmp_path / "front"
    words = ("--method", "random", "--evaluations", "6", "--images", "64", "--random", "3")
    assert cli.main(["front", "--workdir", str(searched), *words, "--out", str(out)]) == 0
    assert "read once, after the search." in " ".join(capsys.readouterr().out.split())
    model = load(searched).model
    front = load_front(out / "front.json", model.names, model.space)
    assert front.cost == "bitops"
    assert {path.name for path in out.iterdir()} == {"front.json", "front.png", "widths.png"}


SEARCH = ("search", "--budget", "avg_bits=3", "--images", "64")


@pytest.mark.parametrize(
    ("words", "code", "mentions"),
    [
        ((*SEARCH, "--method", "gredy"), "unknown-name", ("'gredy'", "did you mean greedy")),
        ((*SEARCH, "--sensitivity", "guess"), "unknown-name", ("'guess'", "'hessian'")),
        ((*SEARCH, "--evaluations", "0"), "bad-value", ("evaluations 0",)),
        (("search", "--budget", "avg_bits=3", "--images", "0"), "bad-value", ("images 0",)),
        ((*SEARCH, "--budget", "avg_bits=2"), "conflict", ("avg_bits",)),
        ((*SEARCH, "--split", "test"), "test-data", ("test",)),
        ((*SEARCH, "--split", "tset"), "unknown-name", ("'tset'", "train")),
        ((*SEARCH, "--latency", "none.json"), "no-such-file", ("none.json",)),
        (("search", "--budget", "avg_bits=1"), "out-of-reach", ("avg_bits=1", "[2, 4] bits")),
        (("search", "--budget", "latency_ms=1"), "missing-value", ("latency_ms",)),
        (("search", "--budget", "bit=1"), "unknown-name", ("'bit'", "bitops")),
        (("front", "--cost", "bitop"), "unknown-name", ("'bitop'", "did you mean bitops")),
        (("front", "--method", "evolve"), "unknown-name", ("'evolve'", "'evolution'")),
        (("front", "--split", "test[:10]"), "test-data", ("test[:10]",)),
    ],
    ids=lambda words: " ".join(map(str, words)) if isinstance(words, tuple) else words,
)
def test_search_that_makes_no_sense_is_one_line(fails, searched, tmp_path, words, code, mentions):
    out = tmp_path / "out"
    fails(code, *words, "--workdir", searched, "--out", out, mentions=mentions)
    assert not out.exists()


@pytest.mark.parametrize("words", [SEARCH, ("front",)], ids=["search", "front"])
def test_search_of_a_float_twin_or_of_nothing_is_refused(fails, trained_float, tmp_path, words):
    out = ("--out", tmp_path / "out")
    none, stage = tmp_path / "none", f"{trained_float}@mixed"
    fails("no-widths", *words, "--workdir", trained_float, *out, mentions=(trained_float,))
    fails("no-run", *words, "--workdir", none, *out, mentions=(none, "config.json"))
    fails("no-run", *words, "--workdir", stage, *out, mentions=(stage, "'mixed'"))


# Help.


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert f"example: bitmixer {name} " in " ".join(capsys.readouterr().out.split())


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in said] == []


def test_help_does_not_import_jax():
    code = (
        "import sys\nfrom bitmixer_jax import cli\n"
        f"for words in ([], *([name] for name in {COMMANDS!r})):\n"
        "    try: cli.main([*words, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0, words\n"
        "    heavy = {'jax', 'flax', 'orbax', 'matplotlib', 'tensorflow_datasets'}\n"
        "    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: ") == 1 + len(COMMANDS)


def test_prepare_without_data_dir_uses_the_default_place(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("BITMIXER_DATA", str(tmp_path / "data"))
    (tmp_path / "empty").mkdir()
    words = ("prepare", "mnist", "--source", tmp_path / "empty")
    fails("no-data", *words, mentions=(tmp_path / "empty", "mnist"))
