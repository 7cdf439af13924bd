"""Optimisers from optax, with weight decay on kernels only and updates of selected entries only."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bitmixer_jax.errors import UserError
from bitmixer_jax.training.stages import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimiser of a run; all its stages use it.

    Attributes:
      name: "sgd", "adam" or "adamw".
      momentum: of SGD, 0 <= momentum < 1.
      nesterov: whether the momentum of SGD is Nesterov's.
      weight_decay: of kernels only, never of BN, biases and step sizes; coupled (L2) for "sgd",
        decoupled for "adamw", not allowed for "adam".
      clip_norm: largest global norm of the gradient; 0 is off.
      ema: decay of an exponential moving average of the parameters, which evaluation then uses,
        0 <= ema < 1; 0 is off.

    Raises:
      UserError: a value is not allowed.

        >>> OptimizerSettings(momentum=0.8).weight_decay
        0.0001
    """

    name: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    clip_norm: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adam", "adamw"):
            raise UserError(f"optimizer: name = {self.name!r}; choose from sgd, adam, adamw")
        if self.name == "adam" and self.weight_decay:
            raise UserError(
                "optimizer: adam takes no weight_decay; set it to 0, or use adamw", "conflict"
            )
        for field in ("momentum", "ema"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(
                    f"optimizer: {field} = {getattr(self, field)}; give 0 <= {field} < 1"
                )
        for field in ("weight_decay", "clip_norm"):
            if getattr(self, field) < 0:
                raise UserError(f"optimizer: {field} = {getattr(self, field)}; give 0 or more")


def schedule(stage: Stage, steps: int) -> optax.Schedule:
    """Returns the learning rate of a stage as a function of the step within it.

    It rises linearly from 0 to ``stage.learning_rate`` over the first ``stage.warmup`` of the
    steps, and then follows ``stage.schedule`` over the rest of them.

    Args:
      stage: its learning_rate, warmup and schedule are used.
      steps: length of the stage.

        >>> rate = schedule(Stage(name="s", epochs=1, learning_rate=1.0, warmup=0.1), steps=100)
        >>> [round(float(rate(step)), 2) for step in (0, 5, 10, 55, 100)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    peak, rise = stage.learning_rate, round(stage.warmup * steps)
    rest = max(steps - rise, 1)  # optax refuses a schedule over no steps
    if stage.schedule == "cosine":
        after: optax.Schedule = optax.cosine_decay_schedule(peak, rest)
    elif stage.schedule == "step":
        after = optax.piecewise_constant_schedule(peak, {rest // 2: 0.1, rest * 3 // 4: 0.1})
    else:
        after = optax.constant_schedule(peak)
    if not rise:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), after], [rise])


def kernels_only(params: Any) -> Any:
    """Returns a tree of bools: True for kernels, False for BN, biases and step sizes.

    >>> kernels_only({"conv": {"kernel": 1.0, "step": 1.0}})
    {'conv': {'kernel': True, 'step': False}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def limit_step_sizes(fraction: float = 0.1) -> optax.GradientTransformation:
    r"""Limits the update of each step size s to a fraction of its value, so it stays positive.

    .. math::
        \Delta s \leftarrow \mathrm{clip}(\Delta s, -f |s|, f |s|)

    A step size near zero makes the sums of a layer so small that the epsilon of its BN dominates.
    Then its gradient explodes, and one large update can leave a layer with two levels. No error
    would tell.

    Args:
      fraction: f, 0 < f < 1.
    """

    def limit(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        if path[-1].key != "step":
            return update
        most = fraction * jnp.abs(param)
        return jnp.clip(update, -most, most)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(limit, updates, params)
    )


def make_optimizer(
    settings: OptimizerSettings, stage: Stage, steps: int
) -> optax.GradientTransformation:
    """Builds the optimiser of one stage.

    It clips the gradient, decays kernels, follows the learning rate of `schedule`, and limits the
    updates of step sizes to 10%. Its state has the same structure in every stage of a run, so
    checkpoints do. Use it through `apply_masked`.

    Args:
      settings: of the run.
      stage: gives the learning rate.
      steps: length of the stage.

        >>> tx = make_optimizer(OptimizerSettings(), Stage(name="s", epochs=1), steps=10)
        >>> params = {"conv": {"kernel": jnp.ones(3), "step": jnp.ones(1)}}
        >>> grads = {"conv": {"kernel": jnp.zeros(3), "step": jnp.full(1, 99.0)}}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> updates["conv"]["step"].round(3)
        Array([-0.1], dtype=float32)
    """
    rate = schedule(stage, steps)
    parts = []
    # Clipping comes first: it is of the gradient of the loss, without weight decay.
    if settings.clip_norm:
        parts.append(optax.clip_by_global_norm(settings.clip_norm))
    # Decay pulls a parameter to zero. For a kernel that is a regulariser; for a step size it would
    # make the quantiser finer, and for BN scales it would change the size of activations.
    if settings.name == "sgd":
        parts += [
            # Before the momentum: this is L2 regularisation, as most SGD recipes mean it.
            optax.add_decayed_weights(settings.weight_decay, kernels_only),
            optax.sgd(rate, settings.momentum, settings.nesterov),
        ]
    elif settings.name == "adam":
        parts.append(optax.adam(rate))
    else:
        parts.append(optax.adamw(rate, weight_decay=settings.weight_decay, mask=kernels_only))
    # It comes last, because it limits what is added to the parameters.
    return optax.chain(*parts, limit_step_sizes())


def apply_masked(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, masks: Any
) -> tuple[Any, Any]:
    """Makes one update of the selected entries; all others stay as they are, bit for bit.

    So do the entries of the optimiser state that belong to them, such as their momentum. Otherwise
    momentum and weight decay would move parameters whose gradient is zero.

    Adam's bias correction counts steps, not visits: the moments of a rarely selected entry are
    young for their count, so its first updates are up to ``(1 - b1) / sqrt(1 - b2)`` = 3.2 times
    the learning rate.

    Args:
      tx: the optimiser.
      grads: a tree like ``params``.
      opt_state: of ``tx``.
      params: tree of arrays.
      masks: bool arrays that broadcast to the leaves of ``params``, as `update_mask` returns them.

    Returns:
      (params, opt_state), new.
    """
    # The update is computed for all entries, and then undone where the mask is False. Masked
    # gradients would not do: momentum from earlier steps moves entries with a gradient of zero.
    updates, new_state = tx.update(grads, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    selected = jax.tree.map(jnp.where, masks, new_params, params)
    # Momentum has the masks of its parameters; step counters and the like are always updated.
    state_masks = optax.tree.map_params(
        tx, lambda _, mask: mask, opt_state, masks, transform_non_params=lambda _: True
    )
    return selected, jax.tree.map(jnp.where, state_masks, new_state, opt_state)
