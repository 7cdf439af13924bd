"""Outputs of a run while it trains: metrics, a progress bar, evaluations, and checkpoints."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax import distributed
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Evaluator, UncalibratedPairs, evaluate_protocols
from bitmixer_jax.training.checkpoints import Checkpoints
from bitmixer_jax.training.metrics import Bar, Clock, Metrics, format_evaluation, format_progress
from bitmixer_jax.training.schedule import TrainSchedule
from bitmixer_jax.training.step import TrainState


class Recorder:
    """Logs, evaluates and saves. Stages are given by their index.

    Of several processes all evaluate and save; only the first one logs and prints.

    Attributes:
      saved_at: time of the last checkpoint, or of the start, as `time.monotonic` tells it.
      is_read_back: whether a checkpoint of this run is known to be readable.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        schedule: TrainSchedule,
        checkpoints: Checkpoints,
        step: int,
    ) -> None:
        """Opens the outputs of a run that starts or resumes at ``step``."""
        enabled = distributed.is_primary()
        self._schedule, self._checkpoints = schedule, checkpoints
        self._metrics = Metrics(workdir, step, enabled)
        self._bar = Bar(schedule.stage_ends[-1], step, enabled)
        self._pending: list[tuple[int, Any]] = []  # steps and metrics that are not logged yet
        self._unreadable = 0
        self.saved_at = time.monotonic()
        self.is_read_back = bool(checkpoints.steps)  # the run was restored from one of these
        self.start_clock()

    def say(self, text: str) -> None:
        """Prints a line."""
        self._bar.say(text)

    def start_clock(self) -> None:
        """Starts to measure images per second anew, without the time of the next compilation."""
        self._clock = Clock(self._schedule.run.batch_size)

    def show(self, step: int, index: int, text: str) -> None:
        """Shows where training is."""
        self._bar.show(step, self._schedule.run.stages[index].name, text)

    def add(self, step: int, metrics: Any, unreadable: int) -> None:
        """Keeps the metrics of one dispatch for the next `log`; does not wait for the devices.

        Args:
          step: the first one of the dispatch.
          metrics: arrays ``[K]``, one value a step, as `ParallelStep` returns them.
          unreadable: images that could not be read since this start.
        """
        self._pending.append((step, metrics))
        self._unreadable = unreadable

    def log(self, step: int, index: int) -> None:
        """Fetches and records the metrics since the last call.

        Raises:
          UserError: a loss or a gradient is not finite.
        """
        if not self._pending:
            return
        run, name = self._schedule.run, self._schedule.run.stages[index].name
        first = self._pending[0][0]
        fetched = [jax.device_get(metrics) for _, metrics in self._pending]
        self._pending = []
        values = {key: np.concatenate([m[key] for m in fetched]) for key in fetched[0]}
        bad = ~(np.isfinite(values["loss"]) & np.isfinite(values["grad_norm"]))
        if bad.any():
            loss, norm = (values[key][bad][0] for key in ("loss", "grad_norm"))
            raise self._diverged(
                name,
                first + int(np.argmax(bad)),
                f"the loss is not finite (loss {loss}, gradient norm {norm})",
            )
        record = {key: float(v.mean()) for key, v in values.items()}
        record["epoch"] = step / self._schedule.steps_per_epoch
        if self._unreadable:
            record["unreadable_images"] = self._unreadable
        rate = self._clock.rate(len(values["loss"]))
        if rate is not None:
            record["images_per_second"] = rate
        self._metrics.write("train", step, {"stage": name, **record})
        images_left = (self._schedule.stage_ends[-1] - step) * run.batch_size
        self._bar.show(step, name, format_progress(record, images_left))

    def evaluate(self, evaluator: Evaluator, state: TrainState, index: int) -> None:
        """Records test accuracy of uniform widths and, if layer-wise, of some random policies."""
        run, step = self._schedule.run, int(state.step)
        stage = run.stages[index]
        self.log(step, index)
        is_layer_wise = stage.widths == "layer" and not run.is_baseline
        try:
            result = evaluate_protocols(
                evaluator,
                state.variables,
                random=run.evaluate_random if is_layer_wise else 0,
                seed=run.seed,
                groups=self._schedule.model.groups(run.selection),  # type: ignore[arg-type]
            )
        except UncalibratedPairs as error:  # a short stage may not have visited every pair yet
            self.say(f"step {step}: not evaluated: {error}")
        else:
            result.get("random", {}).pop("scores", None)
            self._metrics.write("evaluate", step, {"stage": stage.name, **result})
            self.say(f"step {step}: test accuracy: {format_evaluation(result)}")
        self._clock.restart()

    def save(self, state: TrainState, index: int) -> None:
        """Saves the state; the first checkpoint of a run is read back.

        Raises:
          UserError: a loss or a value of the state is not finite, or what was saved cannot be read
            back.
        """
        name, step = self._schedule.run.stages[index].name, int(state.step)
        # A checkpoint must be one that training can go on from. So the losses up to here are
        # fetched and checked first; the last of them is of the weights before the last update, so
        # the weights are checked as well.
        self.log(step, index)
        if not _all_finite((state.params, state.batch_stats)):
            raise self._diverged(name, step, "the weights are not finite")
        self._checkpoints.save(state, {"stage": name})
        if not self.is_read_back:
            self._checkpoints.wait()
            try:
                self._checkpoints.restore(self._schedule.abstract_state(), step, on_host=True)
            except UserError as error:
                raise UserError(
                    f"{self._checkpoints.folder}: the first checkpoint was saved but cannot be "
                    f"read back ({error}); train in another --workdir",
                    "not-readable",
                ) from None
            self.is_read_back = True
        self.saved_at = time.monotonic()
        self._clock.restart()

    def wait(self) -> None:
        """Waits until the checkpoints are on the disk."""
        self._checkpoints.wait()

    def _diverged(self, stage: str, step: int, what: str) -> UserError:
        """Returns the error of a training that diverged at ``step``.

        A checkpoint of that step or a later one holds the diverged state. It is moved aside, so
        that a new start resumes from the last finite checkpoint.
        """
        self._checkpoints.wait()
        bad = [saved for saved in self._checkpoints.steps if saved >= step]
        aside = self._checkpoints.set_aside(bad)
        steps = self._checkpoints.steps
        kept = f"the checkpoint of step {steps[-1]} is good" if steps else "no good state was saved"
        if aside:
            kept += f"; the checkpoint of step {bad[-1]} was moved to {aside[-1]}"
        return UserError(
            f"stage {stage}, step {step}: {what}; {kept}. Lower the learning rate or set "
            "config.optimizer.clip_norm, in another --workdir",
            "not-finite",
        )

    def close(self) -> None:
        """Closes the outputs; checkpoints stay open."""
        self._bar.stop()
        self._metrics.close()


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    """Returns whether all values of a tree of arrays are finite: a bool scalar."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
