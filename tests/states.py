"""The state that a workdir holds, and a run that is told to stop: for tests of going on."""

import signal

import jax
import numpy as np

from bitmixer_jax.trained import load
from bitmixer_jax.training.checkpoints import Checkpoints
from bitmixer_jax.training.metrics import Metrics
from bitmixer_jax.training.schedule import make_schedule
from bitmixer_jax.training.workdir import read_config


def newest_state(workdir):
    """The newest state of a run, whole: parameters, statistics, optimiser, average."""
    loaded = load(workdir)
    run, model = loaded.run, loaded.model
    schedule = make_schedule(run, model, read_config(workdir)["dataset_info"]["examples"])
    checkpoints = Checkpoints(workdir, read_only=True)
    state = checkpoints.restore(schedule.abstract_state())
    checkpoints.close()
    return state


def newest_values(workdir):
    """Step of the newest state, and the bytes of each of its values by name."""
    state = newest_state(workdir)
    flat = jax.tree_util.tree_leaves_with_path(state)
    found = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}
    return int(state.step), found


def assert_same_end(workdir, reference):
    """Both runs ended at one step, bit for bit in one state."""
    (step, found), (wanted_step, wanted) = newest_values(workdir), newest_values(reference)
    assert step == wanted_step
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def terminate_at(monkeypatch, step):
    """SIGTERM comes once, as soon as a training record of ``step`` or later is written."""
    write, sent = Metrics.write, []

    def writing(self, kind, at, *values, **named):
        write(self, kind, at, *values, **named)
        if kind == "train" and at >= step and not sent:
            sent.append(at)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Metrics, "write", writing)
