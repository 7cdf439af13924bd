"""The training loop: evaluate when due, checkpoint, next batch, step, log."""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax import data as datasets
from bitmixer_jax.data import Dataset, normalize
from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import Evaluator, evaluate
from bitmixer_jax.models import Network
from bitmixer_jax.training import config as configuration
from bitmixer_jax.training.checkpoints import Checkpoints, claim, read_config
from bitmixer_jax.training.config import Run
from bitmixer_jax.training.metrics import Bar, Metrics
from bitmixer_jax.training.optimizer import make_optimizer
from bitmixer_jax.training.stages import Stage, fill_unvisited_pairs, start_from
from bitmixer_jax.training.step import (
    Spread,
    StepSettings,
    TrainState,
    make_train_step,
    replicate,
)


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state has been saved. ``args[0]`` is the signal's number."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run laid out in steps.

    Attributes:
      run: the configuration.
      model: the network, as after the last stage.
      steps_per_epoch: whole batches in the training data.
      ends: step at which each stage ends.
    """

    run: Run
    model: Network
    steps_per_epoch: int
    ends: tuple[int, ...]

    def start(self, stage: int) -> int:
        """First step of a stage."""
        return self.ends[stage - 1] if stage else 0

    def optimizer(self, stage: int) -> Any:
        """The optimiser of a stage."""
        steps = self.ends[stage] - self.start(stage)
        return make_optimizer(self.run.optimizer, self.run.stages[stage], steps)

    def rows(self, step: int) -> np.ndarray:
        """Which examples step ``step`` takes: int32 ``[B]``, a function of (seed, epoch) alone."""
        epoch, within = divmod(step, self.steps_per_epoch)
        size = self.steps_per_epoch * self.run.batch_size
        order = _permutation(self.run.seed, epoch, size)
        return order[within * self.run.batch_size :][: self.run.batch_size]

    def state(self, params: Any, batch_stats: Any, stage: int, step: int) -> TrainState:
        """A state with fresh optimiser state."""
        ema = jax.tree.map(jnp.array, params) if self.run.optimizer.ema else None
        opt_state = self.optimizer(stage).init(params)
        return TrainState(jnp.int32(step), params, batch_stats, opt_state, ema)

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state, the same in all stages."""

        def build() -> TrainState:
            images = jnp.zeros((1, *self.model.image_shape))
            variables = init(self.model, jax.random.key(0), images)
            return self.state(variables["params"], variables["batch_stats"], 0, 0)

        return jax.eval_shape(build)


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch, kept until the next is asked for."""
    if (seed, epoch, size) not in _orders:
        _orders.clear()
        order = np.random.default_rng((seed, epoch)).permutation(size)
        _orders[seed, epoch, size] = order.astype(np.int32)
    return _orders[seed, epoch, size]


def init(model: Network, key: jax.Array, images: jax.Array) -> dict[str, Any]:
    """Variables of a network; step sizes are set from ``images`` float32 ``[N, H, W, C]``.

    Consumes ``key``.
    """
    bits = None
    if model.quant.space is not None:
        bits = (model.space.widest,) * model.num_layers
    return model.init(key, images, bits=bits, train=False)


def make_plan(run: Run, model: Network, examples: int) -> Plan:
    """Lays out a run for a training set of ``examples`` images.

    Raises:
      UserError: the batch does not fit the data or the devices.
    """
    devices = jax.device_count()
    if run.batch_size % devices:
        raise UserError(
            f"config.batch_size = {run.batch_size}: not a multiple of the {devices} devices"
        )
    if run.batch_size > examples:
        raise UserError(f"config.batch_size = {run.batch_size}: more than the {examples} images")
    per_epoch = examples // run.batch_size
    lengths = [max(1, round(stage.epochs * per_epoch)) for stage in run.stages]
    return Plan(run, model, per_epoch, tuple(int(end) for end in np.cumsum(lengths)))


def _initial_state(plan: Plan, train: Dataset) -> TrainState:
    """Fresh variables; those of another workdir where the configuration says so."""
    run, model = plan.run, plan.model
    batch = normalize(jnp.asarray(train.images[plan.rows(0)]), train.mean, train.std)
    key = jax.random.key(run.seed)
    make = jax.jit(lambda key, images: init(model, key, images))
    variables = make(key, batch)
    if run.init_from:
        _, _, source = load_trained(run.init_from)
        started = start_from(source, variables)
        if run.is_float or "step" in source["params"][model.names[0]]["conv"]:
            variables = started
        else:  # from a float twin: step sizes from its own activations and kernels
            variables = _with_new_steps(model, started, key, batch)
    return plan.state(variables["params"], variables["batch_stats"], 0, 0)


def _with_new_steps(
    model: Network, variables: Mapping[str, Any], key: jax.Array, images: jax.Array
) -> dict[str, Any]:
    """The variables with the step sizes that `init` would set for these kernels and images."""
    without = jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if path[-1].key == "step" else leaf, dict(variables["params"])
    )

    def prune(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        return {k: p for k, v in tree.items() if (p := prune(v)) is not None and p != {}}

    bits = (model.space.widest,) * model.num_layers
    _, made = model.apply(
        {"params": prune(without), "batch_stats": variables["batch_stats"]},
        images,
        bits=bits,
        train=True,
        rngs={"params": key},
        mutable=["params", "batch_stats"],
    )
    return {"params": made["params"], "batch_stats": variables["batch_stats"]}


def load_trained(source: str | pathlib.Path) -> tuple[Run, Network, dict[str, Any]]:
    """Loads a network from a workdir: its run, the network as of that stage, its variables.

    Args:
      source: WORKDIR (its newest checkpoint), or WORKDIR@STAGE (the end of that stage).

    Raises:
      UserError: no run there, no checkpoint yet, no such stage, or a damaged checkpoint.
    """
    folder, _, name = str(source).partition("@")
    saved = read_config(pathlib.Path(folder))
    about = saved.pop("made_for", None)
    if not about:
        raise UserError(f"{folder}: config.json does not say what the network was made for")
    run = configuration.read(saved)
    plan = make_plan_for(run, about)
    checkpoints = Checkpoints(pathlib.Path(folder), keep_steps=plan.ends, read_only=True)
    step = None
    if name:
        names = [stage.name for stage in run.stages]
        if name not in names:
            raise UserError(f"{source}: no stage {name!r}; its stages are {', '.join(names)}")
        step = plan.ends[names.index(name)]
    state = checkpoints.restore(plan.abstract_state(), step)
    checkpoints.close()
    if state is None:
        raise UserError(f"{folder}: no checkpoint yet; train it first")
    stage = run.stages[_stage_of(plan, int(state.step))]
    return run, _as_of(plan.model, stage), state.variables


def make_plan_for(run: Run, about: Mapping[str, Any]) -> Plan:
    """The plan of a saved run, without its data: ``about`` is "made_for" in config.json."""
    model = run.build(len(about["classes"]), tuple(about["image_shape"]))
    per_epoch = about["examples"] // run.batch_size
    lengths = [max(1, round(stage.epochs * per_epoch)) for stage in run.stages]
    return Plan(run, model, per_epoch, tuple(int(end) for end in np.cumsum(lengths)))


def _stage_of(plan: Plan, step: int) -> int:
    """The stage in which a state of ``step`` steps was made."""
    return next((i for i, end in enumerate(plan.ends) if step <= end), len(plan.ends) - 1)


def _as_of(model: Network, stage: Stage) -> Network:
    return model.clone(quant=stage.quantization(model.quant))


def train(config: Any, workdir: str | pathlib.Path, devices: Sequence[jax.Device] | None = None) -> Run:
    """Trains a network through all stages of a configuration, or goes on where a run stopped.

    Args:
      config: see `config.default_config`.
      workdir: folder of the run; made if need be.
      devices: to train on; None takes all.

    Returns:
      the checked configuration.

    Raises:
      UserError: something in the configuration, the data or the workdir is wrong, or the loss is
        no longer finite.
      Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    workdir = pathlib.Path(workdir)
    run = configuration.read(config)
    data_dir = run.data_dir or None
    train_data = datasets.load(run.dataset, run.train_split, data_dir)
    test_data = datasets.load(run.dataset, run.test_split, data_dir)
    plan = make_plan(run, run.network(train_data), len(train_data))
    about = {
        "classes": list(train_data.classes),
        "image_shape": list(train_data.image_shape),
        "examples": len(train_data),
        "mean": [float(x) for x in train_data.mean],
        "std": [float(x) for x in train_data.std],
    }
    claim(
        workdir,
        {**configuration.to_json(config), "made_for": about},
        free=configuration.FREE,
    )
    devices = list(devices or jax.devices())
    checkpoints = Checkpoints(workdir, keep=run.keep_checkpoints, keep_steps=plan.ends)
    state = checkpoints.restore(plan.abstract_state())
    resumed = state is not None
    if state is None:
        state = _initial_state(plan, train_data)
    done = int(state.step)
    metrics, bar = Metrics(workdir, done), Bar(plan.ends[-1], done)
    if resumed:
        bar.say(f"going on from step {done} of {plan.ends[-1]}")
    trainer = _Trainer(plan, workdir, train_data, test_data, devices, checkpoints, metrics, bar)
    try:
        with _Signals() as signals:
            for stage in range(len(run.stages)):
                if int(state.step) < plan.ends[stage]:
                    state = trainer.run_stage(stage, state, signals)
            trainer.evaluate(state, len(run.stages) - 1)
            checkpoints.save(state, {"stage": run.stages[-1].name})
            checkpoints.wait()
    finally:
        bar.stop()
        metrics.close()
        checkpoints.close()
    return run


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

    plan: Plan
    workdir: pathlib.Path
    train_data: Dataset
    test_data: Dataset
    devices: list[jax.Device]
    checkpoints: Checkpoints
    metrics: Metrics
    bar: Bar

    def __post_init__(self) -> None:
        run = self.plan.run
        self.data = replicate(
            {"image": self.train_data.images, "label": self.train_data.labels}, self.devices
        )
        self.teacher, self.teacher_variables = None, None
        if any(stage.distill == "teacher" for stage in run.stages):
            _, self.teacher, variables = load_trained(run.teacher)
            self.teacher_variables = replicate(variables, self.devices)
        self.evaluators: dict[int, Evaluator] = {}
        self.saved_at = time.monotonic()

    def enter(self, stage: int, state: TrainState) -> TrainState:
        """The hand-over: fresh optimiser state, and for layer-wise widths every pair filled."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        if self.plan.run.stages[stage].widths == "layer":
            variables = fill_unvisited_pairs(variables, self.plan.model.layers)
        return self.plan.state(
            variables["params"], variables["batch_stats"], stage, int(state.step)
        )

    def step_function(self, stage: int) -> Spread:
        """The compiled step of a stage."""
        plan, run, data = self.plan, self.plan.run, self.train_data
        start = plan.start(stage)
        settings = StepSettings(
            seed=run.seed,
            start=start,
            steps=plan.ends[stage] - start,
            batch_size=run.batch_size,
            mean=tuple(float(x) for x in data.mean),
            std=tuple(float(x) for x in data.std),
            pad=run.pad,
            flip=run.flip,
            label_smoothing=run.label_smoothing,
            groups=plan.model.groups(run.selection),  # type: ignore[arg-type]
            ema=run.optimizer.ema,
            sync_bn=run.sync_bn,
        )
        teacher = self.teacher if run.stages[stage].distill == "teacher" else None
        step = make_train_step(
            plan.model, run.stages[stage], plan.optimizer(stage), settings, teacher
        )
        return Spread(step, self.devices, run.steps_per_dispatch)

    def run_stage(self, number: int, state: TrainState, signals: _Signals) -> TrainState:
        """Trains to the end of a stage and saves there."""
        plan, run, stage = self.plan, self.plan.run, self.plan.run.stages[number]
        if int(state.step) == plan.start(number):
            state = self.enter(number, state)
        state = replicate(state, self.devices)
        step_function = self.step_function(number)
        teacher = self.teacher_variables if stage.distill == "teacher" else None
        step, pending, clock = int(state.step), [], _Clock(run.batch_size)
        every = max(1, round(run.evaluate_every * plan.steps_per_epoch))
        self.bar.say(f"stage {stage.name}: steps {step} to {plan.ends[number]}")
        while step < plan.ends[number]:
            if run.evaluate_every and step % every == 0 and step > plan.start(number):
                self.evaluate(state, number)
                clock.restart()
            if time.monotonic() - self.saved_at > run.checkpoint_seconds or signals.received:
                pending = self.log(pending, step, number, clock)  # raises where a loss is not finite
                self.save(state, number)
                clock.restart()
            if signals.received:
                self.checkpoints.wait()
                self.bar.say(f"signal {signals.received}: saved at step {step}")
                raise Interrupted(signals.received)
            take = min(run.steps_per_dispatch, plan.ends[number] - step)
            rows = np.stack([plan.rows(s) for s in range(step, step + take)])
            state, metrics = step_function(state, self.data, rows, teacher)
            pending.append((step, metrics))
            before, step = step, step + take
            if step // run.log_every > before // run.log_every or before == plan.start(number):
                pending = self.log(pending, step, number, clock)
        self.log(pending, step, number, clock)
        if step_function.traces > 1:
            self.bar.say(
                f"warning: the step of stage {stage.name} was compiled {step_function.traces} times; "
                "once is enough, so something in its arguments changes shape or type"
            )
        self.save(state, number)
        if number < len(run.stages) - 1:
            self.evaluate(state, number)
        return state

    def save(self, state: TrainState, stage: int) -> None:
        self.checkpoints.save(state, {"stage": self.plan.run.stages[stage].name})
        self.saved_at = time.monotonic()

    def log(
        self, pending: list[Any], step: int, stage: int, clock: _Clock
    ) -> list[Any]:
        """Fetches and records the metrics since the last call. Returns an empty list.

        Raises:
          UserError: the loss or the gradient is not finite.
        """
        if not pending:
            return []
        name = self.plan.run.stages[stage].name
        fetched = [jax.device_get(m) for _, m in pending]
        values = {key: np.concatenate([m[key] for m in fetched]) for key in fetched[0]}
        bad = ~(np.isfinite(values["loss"]) & np.isfinite(values["grad_norm"]))
        if bad.any():
            at = pending[0][0] + int(np.argmax(bad))
            steps = self.checkpoints.steps
            kept = f"the checkpoint of step {steps[-1]} is good" if steps else "none was saved yet"
            raise UserError(
                f"stage {name}, step {at}: the loss is not finite (loss {values['loss'][bad][0]}, "
                f"gradient norm {values['grad_norm'][bad][0]}); {kept}. Lower the learning rate, or "
                "set config.optimizer.clip_norm, in another --workdir"
            )
        record = {key: float(v.mean()) for key, v in values.items()}
        record["epoch"] = step / self.plan.steps_per_epoch
        record["images_per_second"] = clock.rate(sum(len(m["loss"]) for m in fetched))
        self.metrics.write("train", step, {"stage": name, **record})
        self.bar.show(
            step,
            name,
            f"loss {record['loss']:.3f}, accuracy {100 * record['accuracy']:.1f}%, "
            f"{record['images_per_second']:.0f} images/s",
        )
        return []

    def evaluate(self, state: TrainState, stage: int) -> None:
        """Test accuracy of the uniform widths and, in a layer-wise stage, of some random policies."""
        run, layout = self.plan.run, self.plan.run.stages[stage]
        if stage not in self.evaluators:
            self.evaluators = {
                stage: Evaluator(
                    _as_of(self.plan.model, layout),
                    self.test_data,
                    self.train_data.mean,
                    self.train_data.std,
                    self.devices,
                    run.evaluate_batch,
                )
            }
        step = int(state.step)
        visited = layout.widths == "layer" and not run.is_float
        try:
            result = evaluate(
                self.evaluators[stage],
                state.variables,
                random=run.evaluate_random if visited else 0,
                seed=run.seed,
                groups=self.plan.model.groups(run.selection),  # type: ignore[arg-type]
            )
        except UserError as error:  # a short stage may not have met every pair yet
            self.bar.say(f"step {step}: not evaluated: {error}")
            return
        result.get("random", {}).pop("scores", None)
        self.metrics.write("evaluate", step, {"stage": layout.name, **result})
        self.bar.say(f"step {step}: test accuracy: {describe(result)}")


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


class _Clock:
    """Images per second since the last reading; the compilation before the first does not count."""

    def __init__(self, batch_size: int) -> None:
        self._batch = batch_size
        self.restart()

    def restart(self) -> None:
        self._last = time.monotonic()

    def rate(self, steps: int) -> float:
        now = time.monotonic()
        rate = steps * self._batch / max(now - self._last, 1e-9)
        self._last = now
        return rate
