"""The training loop: evaluate when due, checkpoint, next batch, step, log."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from bitmixer_jax.data import Dataset, StreamingDataset, require_classes
from bitmixer_jax.devices import replicate
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Evaluator, UncalibratedPairs, evaluate_protocols
from bitmixer_jax.files import cannot_write, hold, user_path
from bitmixer_jax.pairs import fill_uncalibrated_pairs
from bitmixer_jax.trained import Trained
from bitmixer_jax.training import config as configuration
from bitmixer_jax.training import hosts
from bitmixer_jax.training.checkpoints import Checkpoints, check_path
from bitmixer_jax.training.config import Run
from bitmixer_jax.training.feed import check_streamed, make_feed
from bitmixer_jax.training.initial import initial_state, load_weights
from bitmixer_jax.training.metrics import Bar, Metrics
from bitmixer_jax.training.schedule import TrainSchedule, as_of, make_schedule
from bitmixer_jax.training.step import (
    ParallelStep,
    StepSettings,
    TrainState,
    make_train_step,
)
from bitmixer_jax.training.workdir import (
    LOCK_FILE,
    create_or_check_workdir,
    parse_source,
    read_config,
)

_ASK_EVERY = 8  # dispatches
_FIRST_CHECKPOINT_SECONDS = 30.0


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state has been saved. ``args[0]`` is the signal's number."""


def train(
    config: Any, workdir: str | pathlib.Path, devices: Sequence[jax.Device] | None = None
) -> Trained:
    """Trains a network through all stages of a configuration, or goes on where a run stopped.

    Args:
      config: see `config.default_config`.
      workdir: folder of the run; made if need be.
      devices: to train on; None takes all.

    Returns:
      the network after its last stage.

    Raises:
      UserError: something in the configuration, the data or the workdir is wrong, or the loss is
        no longer finite.
      Interrupted: SIGTERM or SIGINT; the state is saved.
      hosts.ProcessAborted: of several processes this one failed, or another.
    """
    workdir = user_path(workdir)
    check_path(workdir)
    run = configuration.read(config)
    train_data, test_data = run.load(run.train_split), run.load(run.test_split)
    if isinstance(train_data, StreamingDataset):
        check_streamed(run)
    devices = list(devices or jax.devices())
    if run.batch_size % len(devices):
        raise UserError(
            f"config.batch_size = {run.batch_size}: not a multiple of the {len(devices)} devices"
        )
    if _has_teacher(run):
        _check_teacher(run.teacher, train_data.classes)
    schedule = make_schedule(run, run.network(train_data), len(train_data))
    if not _has_checkpoints(workdir):
        # A workdir belongs to one configuration, so a wrong source must fail before it is made.
        if _has_teacher(run):
            load_weights(run.teacher, schedule.model)
        if run.init_from:
            initial_state(schedule, train_data)
    about = {
        "classes": list(train_data.classes),
        "image_shape": list(train_data.image_shape),
        "examples": len(train_data),
        "mean": [float(x) for x in train_data.mean],
        "std": [float(x) for x in train_data.std],
    }
    # All settings of streams are stored: one that a file lacks is newer than its run.
    stream = dataclasses.asdict(run.stream)
    made = {**configuration.to_json(config), "stream": stream, "dataset_info": about}
    # Stages and models differ from the default in what they name: only whole settings are filled.
    defaults = configuration.to_json(configuration.default_config())
    for name in ("stages", "model"):
        defaults.pop(name)
    check = partial(
        create_or_check_workdir, workdir, made, free=configuration.FREE, defaults=defaults
    )
    with contextlib.ExitStack() as held:

        def take() -> None:
            """Takes the workdir for this process alone, then checks or writes its configuration."""
            try:
                workdir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(workdir, error, "workdir") from None
            held.enter_context(hold(workdir / LOCK_FILE, f"workdir {workdir}"))
            check()

        hosts.on_primary(take, partial(check, write=False))
        state = _train(schedule, workdir, train_data, test_data, devices)
    return Trained(
        source=str(workdir),
        folder=workdir,
        config=read_config(workdir),
        run=dataclasses.replace(run, dataset_info=about),
        model=as_of(schedule.model, run.stages[-1]),
        variables=jax.device_get(state.variables),
    )


def _train(
    schedule: TrainSchedule,
    workdir: pathlib.Path,
    train_data: Dataset | StreamingDataset,
    test_data: Dataset | StreamingDataset,
    devices: list[jax.Device],
) -> TrainState:
    """Trains from the newest checkpoint, or from the start; returns the state at the end."""
    run = schedule.run
    checkpoints = Checkpoints(workdir, keep=run.keep_checkpoints, keep_steps=schedule.stage_ends)
    with contextlib.ExitStack() as opened:
        try:
            trainer, state = _set_up(
                schedule, workdir, train_data, test_data, devices, checkpoints, opened
            )
            with _Signals() as signals:
                for stage in range(len(run.stages)):
                    if int(state.step) < schedule.stage_ends[stage]:
                        state = trainer.run_stage(stage, state, signals)
                trainer.evaluate(state, len(run.stages) - 1)
                trainer.save(state, len(run.stages) - 1)
                checkpoints.wait()
        except (Interrupted, KeyboardInterrupt):
            checkpoints.close()
            raise
        except Exception as error:
            if aborted := hosts.as_aborted(error):  # closing checkpoints would wait for the others
                raise aborted from error
            with contextlib.suppress(UserError):  # of the disk; ``error`` says what went wrong
                checkpoints.close()
            raise
        checkpoints.close()
    return state


def _set_up(
    schedule: TrainSchedule,
    workdir: pathlib.Path,
    train_data: Dataset | StreamingDataset,
    test_data: Dataset | StreamingDataset,
    devices: list[jax.Device],
    checkpoints: Checkpoints,
    opened: contextlib.ExitStack,
) -> tuple[_Trainer, TrainState]:
    """Restores the newest state, or makes the first; ``opened`` closes what is opened here."""
    run, skipped = schedule.run, list[str]()
    state = checkpoints.restore_whole(schedule.abstract_state(), skipped.append)
    resumed = state is not None
    if state is None:
        state = initial_state(schedule, train_data)
    done = int(state.step)
    speaks = hosts.is_primary()
    metrics = Metrics(workdir, done, speaks)
    opened.callback(metrics.close)
    bar = Bar(schedule.stage_ends[-1], done, speaks)
    opened.callback(bar.stop)
    for line in skipped:
        bar.say(f"warning: {line}")
    if run.steps_per_dispatch > 1 and devices[0].platform == "cpu":
        bar.say(
            f"warning: config.steps_per_dispatch = {run.steps_per_dispatch} is slow on CPU, where "
            "XLA runs the body of a loop without its fast convolutions; set it to 1"
        )
    if resumed:
        bar.say(f"going on from step {done} of {schedule.stage_ends[-1]}")
    trainer = _Trainer(schedule, workdir, train_data, test_data, devices, checkpoints, metrics, bar)
    opened.callback(trainer.feed.close)
    return trainer, state


class _Signals:
    """Notes SIGTERM and SIGINT instead of dying, so that the loop can save first."""

    received = 0

    def __enter__(self) -> _Signals:
        def note(number: int, frame: Any) -> None:
            self.received = number

        self._old = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, note)
            except ValueError:  # not the main thread: signals go elsewhere
                break
        return self

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)


@dataclasses.dataclass
class _Trainer:
    """What the loop holds on to while stages come and go."""

    schedule: TrainSchedule
    workdir: pathlib.Path
    train_data: Dataset | StreamingDataset
    test_data: Dataset | StreamingDataset
    devices: list[jax.Device]
    checkpoints: Checkpoints
    metrics: Metrics
    bar: Bar

    def __post_init__(self) -> None:
        run = self.schedule.run
        self.teacher, self.teacher_variables = None, None
        if _has_teacher(run):
            self.teacher, variables = load_weights(run.teacher, self.schedule.model)
            self.teacher_variables = replicate(variables, self.devices)
        self.evaluators: dict[int, Evaluator] = {}
        self.saved_at = time.monotonic()
        self.read_back = bool(self.checkpoints.steps)
        self.feed = make_feed(self.schedule, self.train_data, self.devices)

    def enter(self, stage: int, state: TrainState) -> TrainState:
        """The hand-over: fresh optimiser state, and for layer-wise widths every pair filled."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        if self.schedule.run.stages[stage].widths == "layer":
            variables = fill_uncalibrated_pairs(variables, self.schedule.model.layers)
        return self.schedule.state(
            variables["params"], variables["batch_stats"], stage, int(state.step)
        )

    def step_function(self, stage: int) -> ParallelStep:
        """The compiled step of a stage."""
        schedule, run, data = self.schedule, self.schedule.run, self.train_data
        start = schedule.start(stage)
        settings = StepSettings(
            seed=run.seed,
            start=start,
            steps=schedule.stage_ends[stage] - start,
            batch_size=run.batch_size,
            mean=tuple(float(x) for x in data.mean),
            std=tuple(float(x) for x in data.std),
            pad=run.pad,
            flip=run.flip,
            label_smoothing=run.label_smoothing,
            groups=schedule.model.groups(run.selection),  # type: ignore[arg-type]
            ema=run.optimizer.ema,
            sync_bn=run.sync_bn,
        )
        teacher = self.teacher if run.stages[stage].distill == "teacher" else None
        step = make_train_step(
            schedule.model, run.stages[stage], schedule.optimizer(stage), settings, teacher
        )
        return ParallelStep(step, self.devices, run.steps_per_dispatch, self.feed.streamed)

    def run_stage(self, number: int, state: TrainState, signals: _Signals) -> TrainState:
        """Trains to the end of a stage and saves there."""
        schedule, run, stage = self.schedule, self.schedule.run, self.schedule.run.stages[number]
        if int(state.step) == schedule.start(number):
            state = self.enter(number, state)
        state = replicate(state, self.devices)
        step_function = self.step_function(number)
        teacher = self.teacher_variables if stage.distill == "teacher" else None
        step, clock = int(state.step), _Clock(run.batch_size)
        pending: list[Any] = []
        every = max(1, round(run.evaluate_every * schedule.steps_per_epoch))
        evaluated = step // every
        self.bar.say(f"stage {stage.name}: steps {step} to {schedule.stage_ends[number]}")
        self.bar.show(step, stage.name, "compiling the step")
        while step < schedule.stage_ends[number]:
            if run.evaluate_every and step // every > evaluated:
                evaluated = step // every
                pending = self.log(pending, step, number, clock)
                self.evaluate(state, number)
                clock.restart()
            stop = signals.received
            # The first checkpoint comes soon: a run whose checkpoints cannot be read ends there.
            soon = math.inf if self.read_back else _FIRST_CHECKPOINT_SECONDS
            due = int(time.monotonic() - self.saved_at > min(run.checkpoint_seconds, soon))
            if jax.process_count() > 1:
                # All stop and save at one step; asking waits for the devices, so not at each.
                ask = (step - schedule.start(number)) // run.steps_per_dispatch % _ASK_EVERY == 0
                stop, due = map(int, hosts.all_reduce_max(stop, due)) if ask else (0, 0)
            if due or stop:
                # This raises where a loss is not finite, before such a state is saved.
                pending = self.log(pending, step, number, clock)
                self.save(state, number)
                clock.restart()
            if stop:
                self.checkpoints.wait()
                self.bar.say(f"signal {stop}: saved at step {step}")
                raise Interrupted(stop)
            take = min(run.steps_per_dispatch, schedule.stage_ends[number] - step)
            try:
                data, rows = self.feed(step, take)
            except UserError:  # whoever stops a job may stop the workers with it: save first
                if not signals.received or jax.process_count() > 1:
                    raise
                continue
            state, metrics = step_function(state, data, rows, teacher)
            pending.append((step, metrics))
            before, step = step, step + take
            if step // run.log_every > before // run.log_every or before == schedule.start(number):
                pending = self.log(pending, step, number, clock)
        self.log(pending, step, number, clock)
        if step_function.traces > 1:
            self.bar.say(
                f"warning: the step of stage {stage.name} was compiled {step_function.traces} "
                "times; once is enough, so something in its arguments changes shape or type"
            )
        if number < len(run.stages) - 1:
            self.evaluate(state, number)  # first: what is saved is not evaluated again
        self.save(state, number)
        return state

    def save(self, state: TrainState, stage: int) -> None:
        """Saves the state; the first checkpoint of a run is read back.

        Raises:
          UserError: a value of the state is not finite, or what was saved cannot be read back.
        """
        name, step = self.schedule.run.stages[stage].name, int(state.step)
        if not _all_finite((state.params, state.batch_stats)):
            raise self.not_finite(name, step, "the weights are not finite")
        self.checkpoints.save(state, {"stage": name})
        if not self.read_back:
            self.checkpoints.wait()
            try:
                self.checkpoints.restore(self.schedule.abstract_state(), step, on_host=True)
            except UserError as error:
                raise UserError(
                    f"{self.checkpoints.folder}: the first checkpoint was saved but cannot be read "
                    f"back ({error}); train in another --workdir"
                ) from None
            self.read_back = True
        self.saved_at = time.monotonic()

    def not_finite(self, stage: str, step: int, what: str) -> UserError:
        """Returns the error of a training that diverged at ``step``.

        A checkpoint of that step or a later one holds the diverged state. It is moved aside, so
        that a new start resumes from the last finite checkpoint.
        """
        self.checkpoints.wait()
        bad = [saved for saved in self.checkpoints.steps if saved >= step]
        aside = self.checkpoints.set_aside(bad)
        steps = self.checkpoints.steps
        kept = f"the checkpoint of step {steps[-1]} is good" if steps else "no good state was saved"
        if aside:
            kept += f"; the checkpoint of step {bad[-1]} was moved to {aside[-1]}"
        return UserError(
            f"stage {stage}, step {step}: {what}; {kept}. Lower the learning rate or set "
            "config.optimizer.clip_norm, in another --workdir"
        )

    def log(self, pending: list[Any], step: int, stage: int, clock: _Clock) -> list[Any]:
        """Fetches and records the metrics since the last call. Returns an empty list.

        Raises:
          UserError: the loss or the gradient is not finite.
        """
        if not pending:
            return []
        name = self.schedule.run.stages[stage].name
        fetched = [jax.device_get(m) for _, m in pending]
        values = {key: np.concatenate([m[key] for m in fetched]) for key in fetched[0]}
        bad = ~(np.isfinite(values["loss"]) & np.isfinite(values["grad_norm"]))
        if bad.any():
            loss, norm = (values[key][bad][0] for key in ("loss", "grad_norm"))
            raise self.not_finite(
                name,
                pending[0][0] + int(np.argmax(bad)),
                f"the loss is not finite (loss {loss}, gradient norm {norm})",
            )
        record = {key: float(v.mean()) for key, v in values.items()}
        record["epoch"] = step / self.schedule.steps_per_epoch
        if self.feed.unreadable():
            record["unreadable_images"] = self.feed.unreadable()
        rate = clock.rate(sum(len(m["loss"]) for m in fetched))
        speed = ""
        if rate is not None:
            record["images_per_second"] = rate
            left = (self.schedule.stage_ends[-1] - step) * self.schedule.run.batch_size / rate
            speed = f", {rate:.0f} images/s, {_duration(left)} left"
        self.metrics.write("train", step, {"stage": name, **record})
        self.bar.show(
            step,
            name,
            f"loss {record['loss']:.3f}, accuracy {100 * record['accuracy']:.1f}%{speed}",
        )
        return []

    def evaluate(self, state: TrainState, stage: int) -> None:
        """Test accuracy of the uniform widths and, if layer-wise, of some random policies."""
        run, layout = self.schedule.run, self.schedule.run.stages[stage]
        if stage not in self.evaluators:
            self.evaluators = {
                stage: Evaluator(
                    as_of(self.schedule.model, layout),
                    self.test_data,
                    self.train_data.mean,
                    self.train_data.std,
                    self.devices,
                    run.evaluate_batch,
                )
            }
        step = int(state.step)
        visited = layout.widths == "layer" and not run.is_baseline
        try:
            result = evaluate_protocols(
                self.evaluators[stage],
                state.variables,
                random=run.evaluate_random if visited else 0,
                seed=run.seed,
                groups=self.schedule.model.groups(run.selection),  # type: ignore[arg-type]
            )
        except UncalibratedPairs as error:  # a short stage may not have met every pair yet
            self.bar.say(f"step {step}: not evaluated: {error}")
            return
        result.get("random", {}).pop("scores", None)
        self.metrics.write("evaluate", step, {"stage": layout.name, **result})
        self.bar.say(f"step {step}: test accuracy: {describe(result)}")


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    """Whether all values of a tree of arrays are finite: a bool scalar."""
    return jax.numpy.stack([jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _has_checkpoints(workdir: pathlib.Path) -> bool:
    """Returns whether a workdir has a checkpoint, so that training goes on from it."""
    return any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))


def _has_teacher(run: Run) -> bool:
    """Returns whether a stage learns from a teacher of its own."""
    return any(stage.distill == "teacher" for stage in run.stages)


def _check_teacher(source: str, classes: Sequence[str]) -> None:
    """Checks that a teacher knows the classes of the data, in their order. Raises UserError."""
    if user_path(source).is_file():  # a state_dict of torchvision names no classes
        return
    folder, _ = parse_source(source)
    info = read_config(folder).get("dataset_info")
    if isinstance(info, Mapping) and isinstance(info.get("classes"), list):
        require_classes(classes, info["classes"], f"config.teacher = {source}: the data")


def describe(result: Mapping[str, Any]) -> str:
    """One line of an evaluation: accuracies in percent."""
    parts = []
    if "float" in result:
        parts.append(f"float {100 * result['float']:.2f}%")
    parts += [f"{w} bits {100 * top1:.2f}%" for w, top1 in result.get("uniform", {}).items()]
    if "random" in result:
        random = result["random"]
        parts.append(
            f"{random['policies']} random policies {100 * random['mean']:.2f}% "
            f"(worst {100 * random['worst']:.2f}%)"
        )
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    """Such as 45 s, 12 min, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


class _Clock:
    """Images per second since the last reading; the first, with its compilation, gives none."""

    def __init__(self, batch_size: int) -> None:
        self._batch = batch_size
        self._last: float | None = None

    def restart(self) -> None:
        """Leaves out the time since the last reading."""
        if self._last is not None:
            self._last = time.monotonic()

    def rate(self, steps: int) -> float | None:
        """Images per second of the ``steps`` since the last reading."""
        now, last = time.monotonic(), self._last
        self._last = now
        return None if last is None else steps * self._batch / max(now - last, 1e-9)
