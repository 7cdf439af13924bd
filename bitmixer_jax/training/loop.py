"""Training: `train` opens data and workdir, runs the stages in their order, evaluates and saves."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax

from bitmixer_jax import distributed
from bitmixer_jax.data import Dataset, StreamingDataset
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Evaluator
from bitmixer_jax.files import cannot_write, hold, user_path
from bitmixer_jax.pairs import fill_uncalibrated_pairs
from bitmixer_jax.trained import Trained
from bitmixer_jax.training import config as configuration
from bitmixer_jax.training.checkpoints import Checkpoints, check_path, has_checkpoints
from bitmixer_jax.training.defaults import FREE, default_config
from bitmixer_jax.training.feed import check_streamed, make_feed
from bitmixer_jax.training.initial import check_teacher, initial_state, load_weights
from bitmixer_jax.training.recorder import Recorder
from bitmixer_jax.training.schedule import TrainSchedule, as_of, make_schedule
from bitmixer_jax.training.step import ParallelStep, StepSettings, TrainState, make_train_step
from bitmixer_jax.training.workdir import (
    LOCK_FILE,
    create_or_check_workdir,
    describe_dataset,
    read_config,
)

_ASK_EVERY = 8  # dispatches between two questions to the other processes
_FIRST_CHECKPOINT_SECONDS = 30.0


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state has been saved. ``args[0]`` is the signal's number."""


def train(
    config: Any, workdir: str | pathlib.Path, devices: Sequence[jax.Device] | None = None
) -> Trained:
    """Trains a network through all stages of a configuration, or resumes a run that stopped.

    The same call starts and resumes. A resumed run ends with the same weights as one that was
    never stopped, bit for bit on CPU: order of examples, widths and augmentation are functions of
    ``config.seed`` and the step, not of random states.

        config = default_config()
        config.stages.mixed.epochs = 20.0
        trained = train(config, "runs/digits")

    Args:
      config: as `default_config` makes it, with the settings of this run changed.
      workdir: folder of the run; it is created if need be. It belongs to one configuration.
      devices: to train on, of all processes; None takes all. ``config.batch_size`` is a multiple of
        their number.

    Returns:
      the network after its last stage.

    Raises:
      UserError: something in the configuration, the data or the workdir is wrong, or the loss is
        no longer finite.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
      distributed.ProcessAborted: with several processes, this one or another one failed.
    """
    # What can be wrong with settings and data fails here, before the workdir is touched.
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
    if run.has_teacher:
        check_teacher(run.teacher, train_data.classes)
    schedule = make_schedule(run, run.network(train_data), len(train_data))
    if not has_checkpoints(workdir):
        # A workdir belongs to one configuration, so a wrong source must fail before it is created.
        if run.has_teacher:
            load_weights(run.teacher, schedule.model)
        if run.init_from:
            initial_state(schedule, train_data)
    run = dataclasses.replace(run, dataset_info=describe_dataset(train_data))
    # The stack closes in reverse order; the lock of the workdir is the last to go.
    with contextlib.ExitStack() as stack:
        _take_workdir(workdir, config, run, stack)
        checkpoints = stack.enter_context(_open_checkpoints(workdir, schedule))
        # Resume from the newest checkpoint that is not damaged; without one, start from step 0.
        skipped: list[str] = []
        state = checkpoints.restore_whole(schedule.abstract_state(), skipped.append)
        resumed = state is not None
        if not resumed:
            state = initial_state(schedule, train_data)
        recorder = Recorder(workdir, schedule, checkpoints, int(state.step))
        stack.callback(recorder.close)
        for line in skipped:
            recorder.say(f"warning: {line}")
        if resumed:
            recorder.say(f"going on from step {int(state.step)} of {schedule.stage_ends[-1]}")
        loop = _Loop(schedule, train_data, test_data, devices, recorder)
        stack.callback(loop.feed.close)
        # From here on a signal ends the run between two steps, with a checkpoint.
        loop.signals = stack.enter_context(_Signals())
        last = len(run.stages) - 1
        for stage in range(len(run.stages)):
            if int(state.step) < schedule.stage_ends[stage]:  # a resumed run is past some stages
                state = loop.run_stage(stage, state)
        loop.evaluate(state, last)
        recorder.save(state, last)
        checkpoints.wait()
    return Trained(
        source=str(workdir),
        folder=workdir,
        config=read_config(workdir),
        run=run,
        model=as_of(schedule.model, run.stages[last]),
        variables=jax.device_get(state.variables),
    )


def _take_workdir(
    workdir: pathlib.Path, config: Any, run: configuration.Run, stack: contextlib.ExitStack
) -> None:
    """Locks the workdir for this run until ``stack`` closes, and checks or writes its config."""
    saved = configuration.to_json(config)
    # All settings of streams are stored: a file that lacks one was written before it existed.
    saved |= {"stream": dataclasses.asdict(run.stream), "dataset_info": run.dataset_info}
    # Defaults fill what an older config.json lacks. Stages and models are as the user names them.
    defaults = configuration.to_json(default_config())
    del defaults["stages"], defaults["model"]
    check = partial(create_or_check_workdir, workdir, saved, free=FREE, defaults=defaults)

    def take() -> None:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(workdir, error, "workdir") from None
        stack.enter_context(hold(workdir / LOCK_FILE, f"workdir {workdir}"))
        check()

    distributed.on_primary(take, partial(check, write=False))


@contextlib.contextmanager
def _open_checkpoints(workdir: pathlib.Path, schedule: TrainSchedule) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run, and closes them when training ends, however it ends."""
    checkpoints = Checkpoints(
        workdir, keep=schedule.run.keep_checkpoints, keep_steps=schedule.stage_ends
    )
    try:
        yield checkpoints
    except (Interrupted, KeyboardInterrupt):
        checkpoints.close()
        raise
    except Exception as error:
        # To close would wait for the other processes, which may never answer.
        if aborted := distributed.as_aborted(error):
            raise aborted from error
        with contextlib.suppress(UserError):  # of the disk; ``error`` says what went wrong
            checkpoints.close()
        raise
    checkpoints.close()


class _Signals:
    """Records SIGTERM and SIGINT, so that the loop can save before the process ends."""

    received = 0  # number of the last signal

    def __enter__(self) -> _Signals:
        def record(number: int, frame: Any) -> None:
            self.received = number

        self._old = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, record)
            except ValueError:  # only the main thread of Python may handle signals
                break
        return self

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)


@dataclasses.dataclass
class _Loop:
    """Runs stages, and keeps what they share. Stages are given by their index."""

    schedule: TrainSchedule
    train_data: Dataset | StreamingDataset
    test_data: Dataset | StreamingDataset
    devices: list[jax.Device]
    recorder: Recorder

    def __post_init__(self) -> None:
        self.run = self.schedule.run
        if self.run.steps_per_dispatch > 1 and self.devices[0].platform == "cpu":
            self.recorder.say(
                f"warning: config.steps_per_dispatch = {self.run.steps_per_dispatch} is slow on "
                "CPU, where XLA runs the body of a loop without its fast convolutions; set it to 1"
            )
        self.signals = _Signals()
        self.teacher, self.teacher_variables = None, None
        if self.run.has_teacher:
            self.teacher, variables = load_weights(self.run.teacher, self.schedule.model)
            self.teacher_variables = distributed.replicate(variables, self.devices)
        self.feed = make_feed(self.schedule, self.train_data, self.devices)
        self.evaluators: dict[int, Evaluator] = {}

    def run_stage(self, index: int, state: TrainState) -> TrainState:
        """Trains from ``state`` to the end of a stage, evaluates, and saves."""
        run, stage, recorder = self.run, self.run.stages[index], self.recorder
        step, end = int(state.step), self.schedule.stage_ends[index]
        # The checkpoint of a stage end is saved before the hand-over to the next stage, so a run
        # that resumes there does the hand-over again, with the same result.
        if step == self.schedule.start(index):
            state = self._hand_over(index, state)
        # The pmap seam: the loop holds one array tree, replicated and not stacked over devices.
        # Placed as the step returns it, it is traced once; only `ParallelStep` knows of pmap.
        state = distributed.replicate(state, self.devices)
        train_step = self._make_step(index)
        teacher = self.teacher_variables if stage.distill == "teacher" else None
        evaluate_steps = max(1, round(run.evaluate_every * self.schedule.steps_per_epoch))
        evaluations = step // evaluate_steps
        recorder.start_clock()
        recorder.say(f"stage {stage.name}: steps {step} to {end}")
        recorder.show(step, index, "compiling the step")
        while step < end:
            if run.evaluate_every and step // evaluate_steps > evaluations:
                evaluations = step // evaluate_steps
                self.evaluate(state, index)
            self._save_if_due(step, index, state)
            count = min(run.steps_per_dispatch, end - step)
            try:
                data, rows = self.feed(step, count)
            except UserError:
                # Whoever stops a job may also stop the processes that decode images: save first.
                if not self.signals.received or jax.process_count() > 1:
                    raise
                continue
            state, metrics = train_step(state, data, rows, teacher)
            recorder.add(step, metrics, self.feed.unreadable())
            is_first = step == self.schedule.start(index)
            step += count
            if is_first or step // run.log_every > (step - count) // run.log_every:
                recorder.log(step, index)
        recorder.log(step, index)
        if train_step.traces > 1:
            recorder.say(
                f"warning: the step of stage {stage.name} was compiled {train_step.traces} "
                "times; once is enough, so something in its arguments changes shape or type"
            )
        # Evaluation comes before the checkpoint: a run that resumes from it does not repeat it.
        # `train` evaluates the last stage, also when a finished run is started again.
        if index < len(run.stages) - 1:
            self.evaluate(state, index)
        recorder.save(state, index)
        return state

    def _hand_over(self, index: int, state: TrainState) -> TrainState:
        """Hands the variables of the stage before over to a stage, with fresh optimiser state.

        Momentum of the stage before belongs to other gradients, those of real-valued weights or of
        other widths.

        A network-wide stage visits only the pairs [c, c] of TBN. A layer-wise stage fills all other
        pairs from them. So no pair starts from untrained scales and statistics, and with rho = 0
        the network computes what it did before.
        """
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        if self.run.stages[index].widths == "layer":
            variables = fill_uncalibrated_pairs(variables, self.schedule.model.layers)
        params, batch_stats = variables["params"], variables["batch_stats"]
        return self.schedule.state(params, batch_stats, index, int(state.step))

    def _make_step(self, index: int) -> ParallelStep:
        """Returns the step of a stage; its first call compiles it."""
        run, stage, data = self.run, self.run.stages[index], self.train_data
        start = self.schedule.start(index)
        settings = StepSettings(
            seed=run.seed,
            start=start,
            steps=self.schedule.stage_ends[index] - start,
            batch_size=run.batch_size,
            mean=tuple(float(x) for x in data.mean),
            std=tuple(float(x) for x in data.std),
            pad=run.pad,
            flip=run.flip,
            label_smoothing=run.label_smoothing,
            groups=self.schedule.model.groups(run.selection),  # type: ignore[arg-type]
            ema=run.optimizer.ema,
            sync_bn=run.sync_bn,
        )
        teacher = self.teacher if stage.distill == "teacher" else None
        optimizer = self.schedule.optimizer(index)
        step = make_train_step(self.schedule.model, stage, optimizer, settings, teacher)
        return ParallelStep(step, self.devices, run.steps_per_dispatch, self.feed.streamed)

    def _save_if_due(self, step: int, index: int, state: TrainState) -> None:
        """Saves if the last checkpoint is old or a signal came. A signal raises Interrupted."""
        recorder, stop = self.recorder, self.signals.received
        # The first checkpoint comes soon: a run whose checkpoints cannot be read ends there.
        soon = math.inf if recorder.is_read_back else _FIRST_CHECKPOINT_SECONDS
        seconds = time.monotonic() - recorder.saved_at
        due = int(seconds > min(self.run.checkpoint_seconds, soon))
        if jax.process_count() > 1:
            # All processes save and stop at one step. Asking waits for the devices, so it is rare.
            dispatches = (step - self.schedule.start(index)) // self.run.steps_per_dispatch
            asking = dispatches % _ASK_EVERY == 0
            stop, due = map(int, distributed.all_reduce_max(stop, due)) if asking else (0, 0)
        if due or stop:
            recorder.save(state, index)
        if stop:
            recorder.wait()
            recorder.say(f"signal {stop}: saved at step {step}")
            raise Interrupted(stop)

    def evaluate(self, state: TrainState, index: int) -> None:
        """Evaluates on the test data, normalised with the statistics of the training data."""
        if index not in self.evaluators:  # each stage quantises something else
            self.evaluators = {
                index: Evaluator(
                    as_of(self.schedule.model, self.run.stages[index]),
                    self.test_data,
                    self.train_data.mean,
                    self.train_data.std,
                    self.devices,
                    self.run.evaluate_batch,
                )
            }
        self.recorder.evaluate(self.evaluators[index], state, index)
