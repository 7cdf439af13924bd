"""One training step as a pure function of a state and a batch, and how devices share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bitmixer_jax.data import augment, normalize
from bitmixer_jax.distributed import AXIS, local_batch_indices, local_devices
from bitmixer_jax.models import Network
from bitmixer_jax.training.losses import cross_entropy, distillation
from bitmixer_jax.training.optimizer import apply_masked
from bitmixer_jax.training.stages import Stage, update_mask


@flax.struct.dataclass
class TrainState:
    """All that changes while a network trains: a pytree, and the content of a checkpoint.

    Attributes:
      step: int32 scalar, number of steps since the run began.
      params: parameters of the network: kernels, step sizes, scales and biases.
      batch_stats: its running statistics, and visit counts of pairs of widths.
      opt_state: of the optimiser; fresh at the start of each stage.
      ema: exponential moving average of ``params``, or None.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """Variables for evaluation, with the averaged parameters if there are any."""
        params = self.params if self.ema is None else self.ema
        return {"params": params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of a step, beside those of its stage.

    Attributes:
      seed: of all randomness; step s uses ``fold_in(key(seed), s)``.
      start: number of steps at which the stage begins.
      steps: length of the stage.
      batch_size: B, over all devices.
      mean: ``[C]`` of the training images, in units of 0..255.
      std: likewise.
      pad: pixels around an image before it is cropped at random.
      flip: whether images are mirrored at random.
      label_smoothing: see `cross_entropy`.
      groups: ``[L]``, see `Stage.draw`.
      ema: decay of the moving average of the parameters; 0: there is none.
      sync_bn: average BN statistics over devices in the forward pass.
    """

    seed: int
    start: int
    steps: int
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    flip: bool = False
    label_smoothing: float = 0.0
    groups: tuple[int, ...] | None = None
    ema: float = 0.0
    sync_bn: bool = True


def make_train_step(
    model: Network,
    stage: Stage,
    tx: optax.GradientTransformation,
    settings: StepSettings,
    teacher: Network | None = None,
) -> Callable[[TrainState, Any, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    r"""Builds the training step of one device, a pure function for `ParallelStep`.

    A step draws M policies, and minimises the mean over them of

    .. math::
        (1 - a) \, \mathrm{CE}(z_m, y) + a \, T^2 \, \mathrm{KL}(t / T \Vert z_m / T)

    where a is ``stage.distill_weight``, or 0 without distillation, and t are the logits of the
    teacher or of the widest policy, which then has no distillation loss. It updates only what the
    policies select (`update_mask`).

    Args:
      model: the network; ``stage`` says what of it is quantised.
      stage: what to quantise, which policies to draw, what to distil from.
      tx: optimiser of the stage, of `make_optimizer`.
      settings: of the step.
      teacher: a full-precision network for stage.distill = "teacher".

    Returns:
      ``step(state, data, rows, teacher_variables) -> (state, metrics)``:

      state: a `TrainState`; all randomness comes from ``settings.seed`` and ``state.step``.
      data: ``{"image": uint8 [N, H, W, C], "label": int32 [N]}`` on the device.
      rows: int32 ``[B / devices]``, the examples of ``data`` that this device trains on; None if
        ``data`` are these examples, streamed, cropped and mirrored.
      teacher_variables: of ``teacher``, or None.
      metrics: float32 scalars "loss" (nats), "accuracy" (0..1), "grad_norm" and "rho"; loss and
        accuracy are means over devices and policies.
    """
    quant = dataclasses.replace(
        stage.quant_config(model.quant), axis_name=AXIS if settings.sync_bn else None
    )
    # Statistics of the whole batch, not of a device's part of it, if sync_bn names the axis.
    network = model.clone(quant=quant)

    def draw(key: jax.Array, progress: jax.Array) -> jax.Array:
        if quant.space is None:
            return jnp.zeros((1, model.num_layers), jnp.int32)
        return stage.draw(key, quant.space, model.num_layers, progress, settings.groups)

    def loss_function(
        params: Any, stats: Any, images: Any, labels: Any, policies: Any, teacher_logits: Any
    ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        losses, accuracies = [], []
        for m in range(policies.shape[0]):
            logits, updated = network.apply(
                {"params": params, "batch_stats": stats},
                images,
                bits=policies[m],
                train=True,
                mutable=["batch_stats"],
            )
            # The next policy continues from these statistics: it may use the same pairs.
            stats = updated["batch_stats"]
            loss = cross_entropy(logits, labels, settings.label_smoothing)
            if stage.distill == "teacher" or (stage.distill == "widest" and m > 0):
                share = stage.distill_weight
                loss = (1 - share) * loss + share * distillation(
                    logits, teacher_logits, stage.temperature
                )
            elif stage.distill == "widest":  # the first policy is the widest one
                teacher_logits = logits
            losses.append(loss)
            accuracies.append(jnp.mean(jnp.argmax(logits, -1) == labels))
        # With the mean, a learning rate means the same for any number of policies.
        return jnp.mean(jnp.stack(losses)), (stats, jnp.mean(jnp.stack(accuracies)))

    def step(
        state: TrainState, data: Any, rows: jax.Array | None, teacher_variables: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        # Random numbers are a function of (seed, step), so a resumed run draws the same. The keys
        # are the same on all devices. So all devices draw the same widths and update the same
        # pairs: a mean over devices that used different pairs would mix unrelated statistics.
        widths_key, crops_key = jax.random.split(
            jax.random.fold_in(jax.random.key(settings.seed), state.step)
        )
        progress = (state.step - settings.start) / settings.steps
        policies = draw(widths_key, progress)
        images, labels = data["image"], data["label"]
        if rows is not None:
            images, labels = images[rows], labels[rows]
            # Crops are drawn for the whole batch, and each device uses those of its images: the
            # result does not depend on the number of devices.
            images = augment(
                crops_key,
                images,
                pad=settings.pad,
                flip=settings.flip,
                offset=lax.axis_index(AXIS) * rows.shape[0],
                total=settings.batch_size,
            )
        # Images stay uint8 up to here: a quarter of the memory and of the transfers of float32.
        images = normalize(images, jnp.asarray(settings.mean), jnp.asarray(settings.std))
        teacher_logits = None
        if teacher is not None:  # once for all policies, and outside of the gradient
            teacher_logits = teacher.apply(teacher_variables, images, train=False)
        (loss, (stats, accuracy)), grads = jax.value_and_grad(loss_function, has_aux=True)(
            state.params, state.batch_stats, images, labels, policies, teacher_logits
        )
        # Each device has the mean over its part of the batch; parts are equally large.
        loss, accuracy, grads = lax.pmean((loss, accuracy, grads), AXIS)
        # Without sync_bn each device has its own running statistics: they are averaged. Visit
        # counts are integers and equal on all devices: a mean would make them floats.
        stats = jax.tree.map(lambda s: lax.pmean(s, AXIS) if s.dtype == jnp.float32 else s, stats)
        # Masks reach the momentum too: it would move parameters that no policy of this step uses.
        params, opt_state = apply_masked(
            tx, grads, state.opt_state, state.params, update_mask(model, state.params, policies)
        )
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1 - settings.ema)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": optax.tree.norm(grads),
            "rho": stage.rho(progress),
        }
        return TrainState(state.step + 1, params, stats, opt_state, ema), metrics

    return step


class ParallelStep:
    """Runs a training step on several devices. No other code knows about `jax.pmap`.

    A call makes K steps, 1 <= K <= ``most``, and donates the state that it gets. Another K does not
    compile anew.

        step = ParallelStep(make_train_step(model, stage, tx, settings), devices)
        state, metrics = step(state, data, rows)

    Attributes:
      most: steps per dispatch. More than 1 runs a loop inside the program: fewer dispatches on an
        accelerator; slow on CPU, where XLA runs loop bodies on one thread.
      traces: how often the step was traced, and so compiled.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        devices: Sequence[jax.Device],
        most: int = 1,
        streamed: bool = False,
    ):
        """Compiles nothing yet.

        Args:
          step: of `make_train_step`.
          devices: all devices, of all processes.
          most: steps per dispatch; 1 with ``streamed``.
          streamed: whether calls get the batch of one step instead of all data.
        """
        assert not streamed or most == 1
        self.most = most
        self.traces = 0
        self._devices = list(devices)

        def counted(state: TrainState, data: Any, rows: Any, number: Any, teacher: Any) -> Any:
            self.traces += 1  # Python runs this while JAX traces, not when the step runs
            if most == 1:
                state, metrics = step(state, data, None if streamed else rows[0], teacher)
                return state, jax.tree.map(lambda m: m[None], metrics)
            # The carry of a loop has fixed shapes, so metrics are written into arrays of length
            # ``most``; steps beyond ``number`` leave zeros, which `__call__` cuts off.
            shapes = jax.eval_shape(lambda: step(state, data, rows[0], teacher)[1])
            empty = jax.tree.map(lambda s: jnp.zeros((most, *s.shape), s.dtype), shapes)

            def body(i: Any, carry: Any) -> Any:
                state, log = carry
                state, metrics = step(state, data, rows[i], teacher)
                return state, jax.tree.map(lambda a, m: a.at[i].set(m), log, metrics)

            return lax.fori_loop(0, number, body, (state, empty))

        # pmap with in_axes and out_axes None takes and returns a replicated state as it is, not
        # stacked over devices. The state is donated: else each step would need its memory twice.
        self._step: Any = jax.pmap(
            counted,
            axis_name=AXIS,
            in_axes=(None, 0, None, None, None) if streamed else (None, None, 0, None, None),
            out_axes=(None, None),
            donate_argnums=(0,),
            devices=self._devices,
        )

    def __call__(
        self, state: TrainState, data: Any, rows: np.ndarray | None, teacher: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one step for each of ``rows``.

        Args:
          state: on all devices (`distributed.replicate`); it cannot be used afterwards.
          data: all data on every device, or with ``streamed`` one batch of arrays
            ``[devices, B / devices, ...]``, of `distributed.shard`.
          rows: int32 ``[K, B]``, the examples of each step; None with ``streamed``.
          teacher: variables of the teacher, on all devices.

        Returns:
          the state, and metrics ``[K]``.
        """
        if rows is None:
            return self._step(state, data, None, np.int32(1), teacher)
        number = len(rows)
        state, metrics = self._step(state, data, self._shards(rows), np.int32(number), teacher)
        return state, {name: values[:number] for name, values in metrics.items()}

    def memory(self, state: TrainState, data: Any, rows: np.ndarray, teacher: Any = None) -> int:
        """Returns the bytes that a call needs on a device: arguments and temporaries, as XLA plans.

        This compiles, unless there was a call with arguments of these shapes.
        """
        lowered = self._step.lower(state, data, self._shards(rows), np.int32(len(rows)), teacher)
        plan = lowered.compile().memory_analysis()
        return int(plan.argument_size_in_bytes + plan.temp_size_in_bytes)

    def _shards(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of each local device: int32 ``[D, most, B / devices]``, padded.

        The padding gives all K the same shape; the loop inside the program ends before it.
        """
        number, batch = rows.shape
        padded = np.zeros((self.most, batch), np.int32)
        padded[:number] = rows
        local = padded[:, local_batch_indices(self._devices, batch)]
        return local.reshape(self.most, len(local_devices(self._devices)), -1).swapaxes(0, 1)
