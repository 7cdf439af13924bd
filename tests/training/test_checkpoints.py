"""Checkpoints come back bit for bit, or not at all: damage is one clear error."""

import errno
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from bitmixer_jax.errors import UserError
from bitmixer_jax.training.checkpoints import Checkpoints
from bitmixer_jax.training.step import TrainState
from bitmixer_jax.training.workdir import create_or_check_workdir, differences, read_config
from tests.refusals import check_line, refused


def make_state(step, width=16, tx=None):
    rng = np.random.default_rng(step)
    params = {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 8, width)), jnp.float32)},
        "input": {"step": jnp.asarray(rng.uniform(size=3), jnp.float32)},
    }
    stats = {"norm": {"count": jnp.asarray(rng.integers(0, 9, (3, 3)), jnp.int32)}}
    opt_state = (tx or optax.sgd(0.1, 0.9)).init(params)
    opt_state = jax.tree.map(lambda x: x + step, opt_state)
    return TrainState(jnp.int32(step), params, stats, opt_state)


def save(workdir, *steps, **options):
    checkpoints = Checkpoints(workdir, **options)
    for step in steps:
        checkpoints.save(make_state(step), {"stage": "mixed"})
    checkpoints.wait()
    found = checkpoints.steps
    checkpoints.close()
    return found


def restore(workdir, like=None, step=None):
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.restore(like if like is not None else make_state(0), step)
    finally:
        checkpoints.close()


def assert_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 3, 7)
    return workdir


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_newest_state_comes_back_bit_for_bit(saved):
    assert_equal(restore(saved), make_state(7))


def test_older_state_comes_back_when_asked_for(saved):
    assert_equal(restore(saved, step=3), make_state(3))


def test_no_checkpoint_restores_none(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert restore(tmp_path) is None


def test_unknown_step_names_those_there_are(saved):
    with refused("no-run", "checkpoints/5", [3, 7]):
        restore(saved, step=5)


def test_newest_and_ends_of_stages_are_kept(tmp_path):
    assert save(tmp_path, 1, 2, 3, 4, 5, keep=2, keep_steps=(2,)) == [2, 4, 5]


def test_saving_a_step_again_leaves_it(saved, copy):
    checkpoints = Checkpoints(copy)
    checkpoints.save(make_state(3).replace(step=jnp.int32(7)), {})
    checkpoints.close()
    assert_equal(restore(copy), make_state(7))


def test_saved_values_are_those_before_the_state_is_donated(tmp_path):
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = jax.jit(lambda: make_state(0, width=512))()
    checkpoints = Checkpoints(tmp_path, keep=9)
    wanted = {}
    for step in range(4):
        wanted[step] = jax.tree.map(np.array, state)
        checkpoints.save(state, {})
        state = bump(state)
    checkpoints.close()
    for step, value in wanted.items():
        assert_equal(restore(tmp_path, value, step), value)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif how == "overwrite":
        path.write_bytes(b"\x00 not what was here \xff" * 20)
    else:
        content[int(how * (len(content) - 1))] ^= 0x10
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["delete", "truncate", "overwrite", 0.0, 0.3, 0.6, 1.0])
def test_damaged_file_is_an_error_that_names_the_folder_or_changes_nothing(saved, tmp_path, how):
    noticed = set()
    for i, name in enumerate(files(saved / "checkpoints/7")):
        copy = shutil.copytree(saved, tmp_path / str(i))
        damage(copy / "checkpoints/7" / name, how)
        try:
            assert_equal(restore(copy), make_state(7))
        except UserError as error:
            noticed.add(name)
            message = str(error)
        else:
            continue
        check_line(message, copy / "checkpoints/7")
    assert "notes/metadata" in noticed
    assert "state/manifest.ocdbt" in noticed


def test_flipped_bits_in_the_arrays_are_noticed(saved, tmp_path):
    noticed = 0
    for i, place in enumerate(np.linspace(0, 1, 12)):
        copy = shutil.copytree(saved, tmp_path / str(i))
        damage(largest(copy / "checkpoints/7/state/ocdbt.process_0"), place)
        try:
            assert_equal(restore(copy), make_state(7))
        except UserError:
            noticed += 1
    assert noticed >= 6


def test_wrong_digest_is_an_error(copy):
    path = copy / "checkpoints/7/notes/metadata"
    notes = json.loads(path.read_text())
    path.write_text(json.dumps({**notes, "sha256": "0" * 64}))
    with refused("damaged", copy / "checkpoints/7"):
        restore(copy)


def test_checkpoint_before_the_damaged_one_is_good_once_that_is_removed(copy):
    damage(largest(copy / "checkpoints/7/state"), "truncate")
    with refused("damaged", copy / "checkpoints/7"):
        restore(copy)
    shutil.rmtree(copy / "checkpoints/7")
    assert_equal(restore(copy), make_state(3))


@pytest.mark.parametrize("how", ["truncate", "overwrite", "delete"])
def test_training_skips_damaged_checkpoints_and_keeps_them_aside(copy, how):
    for name in ("state/manifest.ocdbt", "notes/metadata"):
        damage(copy / "checkpoints/7" / name, how)
    before = files(copy / "checkpoints/7")
    said = []
    checkpoints = Checkpoints(copy)
    assert_equal(checkpoints.restore_whole(make_state(0), said.append), make_state(3))
    assert checkpoints.steps == [3]
    assert len(said) == 1
    assert str(copy / "checkpoints/7") in said[0]
    assert files(copy / "damaged/7") == before
    # The run comes past that step, saves it anew, and may be damaged there again.
    checkpoints.save(make_state(7), {})
    checkpoints.close()
    damage(copy / "checkpoints/7/state/manifest.ocdbt", "truncate")
    assert_equal(Checkpoints(copy).restore_whole(make_state(0), said.append), make_state(3))
    assert said[-1].endswith(f" {copy / 'damaged/7-1'}")
    assert (copy / "damaged/7-1").is_dir()


def test_where_no_checkpoint_is_whole_nothing_starts_anew_in_silence(copy):
    for step in (3, 7):
        damage(copy / f"checkpoints/{step}/state/manifest.ocdbt", "truncate")
    for _ in range(2):
        with refused("no-run", copy / "checkpoints/7", copy / "checkpoints/3", "--workdir"):
            Checkpoints(copy).restore_whole(make_state(0), lambda text: None)


def test_a_machine_that_cannot_read_is_not_damage(copy, monkeypatch):
    checkpoints = Checkpoints(copy)
    for error in (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), OSError(24, "too many")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
        with refused("not-readable", copy / "checkpoints/7"):
            checkpoints.restore_whole(make_state(0), lambda text: None)
    assert checkpoints.steps == [3, 7]
    assert not (copy / "damaged").exists()


def test_a_checkpoint_of_another_network_is_not_skipped(copy):
    with refused("other-network", copy / "checkpoints/7"):
        Checkpoints(copy).restore_whole(make_state(0, width=9), lambda text: None)


def test_damage_says_nothing_on_standard_error_but_the_error(copy):
    damage(next((copy / "checkpoints/7/state/d").iterdir()), "truncate")
    code = (
        "import sys; from bitmixer_jax.training.checkpoints import Checkpoints\n"
        "import jax, numpy as np\n"
        f"try: Checkpoints({str(copy)!r}, read_only=True).restore({{'a': np.zeros(3)}})\n"
        "except ValueError as error: print(error.code, error, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    check_line(done.stderr, copy / "checkpoints/7", start="damaged ")


def test_empty_step_folder_is_an_error(copy):
    (copy / "checkpoints/9").mkdir()
    with refused("damaged", copy / "checkpoints/9"):
        restore(copy)


def test_foreign_checkpoint_is_an_error(tmp_path):
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(5, args=ocp.args.StandardSave({"w": np.ones(3)}))
    with refused("damaged", tmp_path / "checkpoints/5"):
        restore(tmp_path)


def test_other_network_names_the_first_difference(saved):
    with refused("other-network", "kernel", "8, 16]", "8, 32]"):
        restore(saved, make_state(0, width=32))


def test_other_optimiser_is_an_error(saved):
    with refused("other-network", "opt_state"):
        restore(saved, make_state(0, tx=optax.adam(0.1)))


def test_full_disk_keeps_the_checkpoint_before(copy, monkeypatch):
    checkpoints = Checkpoints(copy)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with refused("not-writable", copy / "checkpoints", "step 7"):
        checkpoints.save(make_state(8), {})
    checkpoints.close()
    assert_equal(restore(copy), make_state(7))


def test_differences_name_each_setting_with_both_values():
    old = {"a": 1, "b": {"c": [1, 2], "gone": 0}}
    assert differences(old, {"a": 2, "b": {"c": [1, 2], "new": 3}}) == [
        "config.a: 1 -> 2",
        "config.b.gone: 0 -> absent",
        "config.b.new: absent -> 3",
    ]


def test_other_configuration_is_an_error_that_lists_the_differences(tmp_path):
    create_or_check_workdir(tmp_path, {"seed": 0, "model": {"width": 4}})
    differ = ("config.model.width: 4 -> 8", "config.seed: 0 -> 1")
    with refused("other-run", tmp_path / "config.json", *differ):
        create_or_check_workdir(tmp_path, {"seed": 1, "model": {"width": 8}})


def test_a_free_setting_within_others_leaves_those_fixed(tmp_path):
    free = ("stream.skip",)
    create_or_check_workdir(tmp_path, {"stream": {"skip": False, "size": 8}}, free=free)
    create_or_check_workdir(tmp_path, {"stream": {"skip": True, "size": 8}}, free=free)
    for changed, differs in (
        ({"skip": True, "size": 9}, "config.stream.size: 8 -> 9"),
        ({"skip": True, "size": 8, "skips": 1}, "config.stream.skips: absent -> 1"),
    ):
        with refused("other-run", differs):
            create_or_check_workdir(tmp_path, {"stream": changed}, free=free)


def test_free_settings_may_change(tmp_path):
    create_or_check_workdir(tmp_path, {"seed": 0, "log_every": 1})
    create_or_check_workdir(tmp_path, {"seed": 0, "log_every": 2}, free=("log_every",))
    assert read_config(tmp_path) == {"seed": 0, "log_every": 2}


def test_checkpoints_without_a_configuration_are_not_taken_over(saved):
    with refused("other-run", saved, "config.json"):
        create_or_check_workdir(saved, {})


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    create_or_check_workdir(tmp_path, {"seed": 1, "optimizer": {"name": "sgd"}})
    now = {"seed": 1, "optimizer": {"name": "sgd", "nesterov": False}, "workers": 2}
    defaults = {"seed": 0, "optimizer": {"name": "adam", "nesterov": False}, "workers": 2}
    with refused("other-run", "config.workers: absent -> 2"):
        create_or_check_workdir(tmp_path, now)
    with refused("other-run", "config.workers: 2 -> 3"):
        create_or_check_workdir(tmp_path, {**now, "workers": 3}, defaults=defaults)
    create_or_check_workdir(tmp_path, now, defaults=defaults)
    assert read_config(tmp_path) == now
    create_or_check_workdir(tmp_path, {"seed": 1, "optimizer": {"name": "sgd"}}, defaults=defaults)


@pytest.mark.parametrize(
    ("text", "code"), [("{", "damaged"), ("[1]", "wrong-format"), ("", "damaged")]
)
def test_damaged_configuration_names_the_file(tmp_path, text, code):
    (tmp_path / "config.json").write_text(text)
    with refused(code, tmp_path / "config.json"):
        create_or_check_workdir(tmp_path, {})


def test_workdir_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with refused("not-writable", tmp_path / "file" / "run"):
        create_or_check_workdir(tmp_path / "file" / "run", {})


def test_file_in_place_of_the_checkpoints_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with refused("not-writable", tmp_path / "checkpoints"):
        Checkpoints(tmp_path)
