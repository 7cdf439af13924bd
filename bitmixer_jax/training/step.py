"""One training step as a pure function of (state, data, batch), and how it spreads over devices."""

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
from bitmixer_jax.devices import AXIS, local_batch_indices, local_devices
from bitmixer_jax.models import Network
from bitmixer_jax.training.losses import cross_entropy, distillation
from bitmixer_jax.training.optimizer import apply_masked
from bitmixer_jax.training.stages import Stage, update_mask


@flax.struct.dataclass
class TrainState:
    """All that changes while a network trains.

    Attributes:
      step: int32 scalar, steps taken since the run began.
      params, batch_stats: variables of the network.
      opt_state: of the optimiser; fresh at the start of each stage.
      ema: moving average of params, or None.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What evaluation uses: the averaged params if there are any."""
        params = self.params if self.ema is None else self.ema
        return {"params": params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step needs to know beside its stage.

    Attributes:
      seed: of all randomness; step s uses ``fold_in(key(seed), s)``.
      start, steps: first step of the stage, and its length.
      batch_size: over all devices.
      mean, std: ``[C]`` for normalisation, in units of 0..255.
      pad, flip: augmentation.
      label_smoothing: 0..1.
      groups: ``[L]`` layers that share a width.
      ema: decay, or 0.
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
    """Builds ``step(state, data, rows, teacher_variables) -> (state, metrics)`` of one device.

    ``data`` is ``{"image": uint8 [N, H, W, C], "label": int32 [N]}``, resident on the device;
    ``rows`` int32 ``[B / devices]`` says which examples this device takes: None where data are
    those examples, streamed, with crops and mirroring done. Widths are drawn from a
    key that is the same on all devices, so all use the same pairs. Augmentation draws for
    the global batch, so the result does not depend on the number of devices.

    Metrics (float32 scalars, averaged over devices and policies): loss (nats), accuracy (0..1),
    grad_norm and rho.
    """
    quant = dataclasses.replace(
        stage.quant_config(model.quant), axis_name=AXIS if settings.sync_bn else None
    )
    network = model.clone(quant=quant)

    def draw(key: jax.Array, progress: jax.Array) -> jax.Array:
        if quant.space is None:
            return jnp.zeros((1, model.num_layers), jnp.int32)
        return stage.draw(key, quant.space, model.num_layers, progress, settings.groups)

    def loss_function(
        params: Any, stats: Any, images: Any, labels: Any, policies: Any, teacher_logits: Any
    ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        losses, hits = [], []
        for m in range(policies.shape[0]):
            logits, updated = network.apply(
                {"params": params, "batch_stats": stats},
                images,
                bits=policies[m],
                train=True,
                mutable=["batch_stats"],
            )
            stats = updated["batch_stats"]
            loss = cross_entropy(logits, labels, settings.label_smoothing)
            if stage.distill == "teacher" or (stage.distill == "widest" and m > 0):
                share = stage.distill_weight
                loss = (1 - share) * loss + share * distillation(
                    logits, teacher_logits, stage.temperature
                )
            elif stage.distill == "widest":
                teacher_logits = logits
            losses.append(loss)
            hits.append(jnp.mean(jnp.argmax(logits, -1) == labels))
        # The mean, not the sum: the learning rate means the same for any number of policies.
        return jnp.mean(jnp.stack(losses)), (stats, jnp.mean(jnp.stack(hits)))

    def step(
        state: TrainState, data: Any, rows: jax.Array | None, teacher_variables: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        widths, crops = jax.random.split(
            jax.random.fold_in(jax.random.key(settings.seed), state.step)
        )
        progress = (state.step - settings.start) / settings.steps
        policies = draw(widths, progress)
        images, labels = data["image"], data["label"]
        if rows is not None:
            images, labels = images[rows], labels[rows]
            images = augment(
                crops,
                images,
                pad=settings.pad,
                flip=settings.flip,
                offset=lax.axis_index(AXIS) * rows.shape[0],
                total=settings.batch_size,
            )
        images = normalize(images, jnp.asarray(settings.mean), jnp.asarray(settings.std))
        teacher_logits = None
        if teacher is not None:
            teacher_logits = teacher.apply(teacher_variables, images, train=False)
        (loss, (stats, accuracy)), grads = jax.value_and_grad(loss_function, has_aux=True)(
            state.params, state.batch_stats, images, labels, policies, teacher_logits
        )
        loss, accuracy, grads = lax.pmean((loss, accuracy, grads), AXIS)
        # Visit counts are integers, and equal on all devices.
        stats = jax.tree.map(lambda s: lax.pmean(s, AXIS) if s.dtype == jnp.float32 else s, stats)
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
    """A step spread over devices: the one place that knows about pmap.

    Call it with (state, data, rows ``[K, B]`` int32, teacher_variables): it takes K steps and
    returns (state, metrics, each ``[K]``). K may change up to ``most`` without a new compilation.
    The state is donated. ``traces`` counts compilations. With ``streamed``, data are the batch of
    one step, ``[devices, B / devices, ...]`` as they lie on the devices, and rows are None.

    Attributes:
      most: steps per dispatch. More than 1 runs a loop inside the program: fewer dispatches on an
        accelerator; slow on CPU, where XLA runs loop bodies on one thread.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        devices: Sequence[jax.Device],
        most: int = 1,
        streamed: bool = False,
    ):
        assert not streamed or most == 1
        self.most = most
        self.traces = 0
        self._devices = list(devices)

        def counted(state: TrainState, data: Any, rows: Any, number: Any, teacher: Any) -> Any:
            self.traces += 1
            if most == 1:
                state, metrics = step(state, data, None if streamed else rows[0], teacher)
                return state, jax.tree.map(lambda m: m[None], metrics)
            shapes = jax.eval_shape(lambda: step(state, data, rows[0], teacher)[1])
            empty = jax.tree.map(lambda s: jnp.zeros((most, *s.shape), s.dtype), shapes)

            def body(i: Any, carry: Any) -> Any:
                state, log = carry
                state, metrics = step(state, data, rows[i], teacher)
                return state, jax.tree.map(lambda a, m: a.at[i].set(m), log, metrics)

            return lax.fori_loop(0, number, body, (state, empty))

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
        if rows is None:
            return self._step(state, data, None, np.int32(1), teacher)
        number = len(rows)
        state, metrics = self._step(state, data, self._shards(rows), np.int32(number), teacher)
        return state, {name: values[:number] for name, values in metrics.items()}

    def memory(self, state: TrainState, data: Any, rows: np.ndarray, teacher: Any = None) -> int:
        """Bytes that a call takes on a device, as XLA plans them: arguments and temporaries.

        Costs nothing after a call with arguments of these shapes, else a compilation.
        """
        lowered = self._step.lower(state, data, self._shards(rows), np.int32(len(rows)), teacher)
        plan = lowered.compile().memory_analysis()
        return int(plan.argument_size_in_bytes + plan.temp_size_in_bytes)

    def _shards(self, rows: np.ndarray) -> np.ndarray:
        """Rows int32 ``[D, most, B / D]``, padded, of the D devices of this process."""
        number, batch = rows.shape
        padded = np.zeros((self.most, batch), np.int32)
        padded[:number] = rows
        own = padded[:, local_batch_indices(self._devices, batch)]
        return own.reshape(self.most, len(local_devices(self._devices)), -1).swapaxes(0, 1)
