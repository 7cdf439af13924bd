"""Optimisers from optax, with weight decay on kernels only and updates of selected slices only."""

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
    """Which optimiser, for all stages of a run.

    Attributes:
      name: "sgd", "adam" or "adamw".
      momentum: of SGD.
      nesterov: of SGD.
      weight_decay: of kernels only, never of BN, biases and step sizes; coupled (L2) for "sgd",
        decoupled for "adamw", not allowed for "adam".
      clip_norm: largest global norm of the gradient; 0 is off.
      ema: decay of an exponential moving average of the parameters, which evaluation then uses;
        0 is off.

    Raises:
      UserError: a value is not allowed.
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
            raise UserError("optimizer: adam takes no weight_decay; set it to 0, or use adamw")
        for field in ("momentum", "ema"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(
                    f"optimizer: {field} = {getattr(self, field)}; give 0 <= {field} < 1"
                )
        for field in ("weight_decay", "clip_norm"):
            if getattr(self, field) < 0:
                raise UserError(f"optimizer: {field} = {getattr(self, field)}; give 0 or more")


def schedule(stage: Stage, steps: int) -> optax.Schedule:
    """Learning rate of a stage of ``steps`` steps, as a function of the step within it."""
    peak, rise = stage.learning_rate, round(stage.warmup * steps)
    rest = max(steps - rise, 1)
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
    """True for each kernel among params, False for BN, biases and step sizes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def limit_step_sizes(fraction: float = 0.1) -> optax.GradientTransformation:
    """Caps the update of each step size at ``fraction`` of its value: it stays positive.

    A step near zero scales the sums down to where BN's epsilon rules, and its gradient explodes:
    one overshoot would silently leave a layer with two levels.
    """

    def cap(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        if path[-1].key != "step":
            return update
        most = fraction * jnp.abs(param)
        return jnp.clip(update, -most, most)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(cap, updates, params)
    )


def make_optimizer(
    settings: OptimizerSettings, stage: Stage, steps: int
) -> optax.GradientTransformation:
    """The optimiser of one stage. Its state has the same structure in every stage of a run."""
    rate = schedule(stage, steps)
    parts = []
    if settings.clip_norm:
        parts.append(optax.clip_by_global_norm(settings.clip_norm))
    if settings.name == "sgd":
        parts += [
            optax.add_decayed_weights(settings.weight_decay, kernels_only),
            optax.sgd(rate, settings.momentum, settings.nesterov),
        ]
    elif settings.name == "adam":
        parts.append(optax.adam(rate))
    else:
        parts.append(optax.adamw(rate, weight_decay=settings.weight_decay, mask=kernels_only))
    return optax.chain(*parts, limit_step_sizes())


def apply_masked(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, masks: Any
) -> tuple[Any, Any]:
    """One update that leaves unselected entries, of params and of optimiser state, bit for bit.

    Adam's bias correction counts steps, not visits: the moments of a rarely selected slice are
    young for their count, so its first updates are up to ``(1 - b1) / sqrt(1 - b2)`` = 3.2 times
    the learning rate.

    Args:
      masks: bool arrays that broadcast to the leaves of params (`stages.update_mask`).

    Returns:
      (params, opt_state).
    """
    updates, new_state = tx.update(grads, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    kept = jax.tree.map(jnp.where, masks, new_params, params)
    state_masks = optax.tree.map_params(
        tx, lambda _, mask: mask, opt_state, masks, transform_non_params=lambda _: True
    )
    return kept, jax.tree.map(jnp.where, state_masks, new_state, opt_state)
