"""Stages of training: what is quantised, how policies are drawn, what a run starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bitmixer_jax.errors import UserError
from bitmixer_jax.layers import QuantConfig
from bitmixer_jax.models import Network
from bitmixer_jax.pairs import pairs_used
from bitmixer_jax.policy import BitSpace, sample_mixed

Variables = Mapping[str, Any]

_ALLOWED = {
    "quantize": ("nothing", "activations", "weights+activations"),
    "widths": ("network", "layer"),
    "policies": ("draw", "sum", "sandwich"),
    "distill": ("none", "teacher", "widest"),
    "schedule": ("cosine", "constant", "step"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Attributes:
      name: for logs and reports.
      epochs: length, in passes over the training data (a fraction is allowed).
      quantize: "nothing" (a float twin), "activations", or "weights+activations".
      widths: "network" draws one width for all layers; "layer" lets each layer draw its own, with
        probability rho.
      rho_start, rho_end, ramp: rho goes linearly from start to end over the first ``ramp``
        (fraction) of the stage, then stays. Only for widths = "layer".
      policies: per step, "draw": ``draws`` policies; "sum": one from each uniform width;
        "sandwich": widest, ``draws`` drawn ones, narrowest. In the last two the first policy is
        the uniform widest.
      draws: number of drawn policies.
      distill: "none"; "teacher": a float network from another workdir; "widest": the widest policy
        of the same step (needs "sum" or "sandwich").
      distill_weight: 0..1, share of the distillation loss; the rest is cross-entropy.
      temperature: of the softened distributions.
      learning_rate: peak.
      schedule: "cosine" to zero, "constant", or "step" (x 0.1 at 1/2 and at 3/4 of the stage).
      warmup: fraction of the stage over which the learning rate rises from zero.

    Raises:
      UserError: a value is not allowed, or two do not go together.
    """

    name: str
    epochs: float
    quantize: str = "weights+activations"
    widths: str = "network"
    rho_start: float = 0.0
    rho_end: float = 1.0
    ramp: float = 0.5
    policies: str = "draw"
    draws: int = 1
    distill: str = "none"
    distill_weight: float = 0.5
    temperature: float = 2.0
    learning_rate: float = 0.1
    schedule: str = "cosine"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        for field, allowed in _ALLOWED.items():
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"{where}: {field} = {getattr(self, field)!r}; choose from {', '.join(allowed)}"
                )
        for field in ("rho_start", "rho_end", "ramp", "warmup", "distill_weight"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"{where}: {field} = {getattr(self, field)}; give a number in 0..1")
        for field in ("epochs", "temperature", "learning_rate"):
            if not getattr(self, field) > 0:
                raise UserError(
                    f"{where}: {field} = {getattr(self, field)}; give a positive number"
                )
        if self.draws < 1:
            raise UserError(f"{where}: draws = {self.draws}; give 1 or more")
        if self.distill == "widest" and self.policies == "draw":
            raise UserError(
                f'{where}: distill = "widest" needs the widest policy in each step: '
                'set policies = "sum" or "sandwich"'
            )

    def quant_config(self, base: QuantConfig) -> QuantConfig:
        """The QuantConfig of this stage, from that of the network."""
        return dataclasses.replace(
            base,
            activations=self.quantize != "nothing",
            weights=self.quantize == "weights+activations",
        )

    def rho(self, progress: jax.Array) -> jax.Array:
        """Probability that a layer draws its own width, at ``progress`` (0..1) of the stage."""
        if self.widths == "network":
            return jnp.float32(0)
        risen = jnp.minimum(progress / self.ramp, 1) if self.ramp else 1.0
        return jnp.asarray(self.rho_start + (self.rho_end - self.rho_start) * risen, jnp.float32)

    def draw(
        self,
        key: jax.Array,
        space: BitSpace,
        num_layers: int,
        progress: jax.Array,
        groups: Sequence[int] | None = None,
    ) -> jax.Array:
        """Draws the policies of one step: int32 ``[M, L]``. Consumes ``key``.

        Args:
          progress: 0..1, share of the stage that is done; rho follows from it.
          groups: ``[L]`` layers that share a width; None: each its own.
        """
        rho = self.rho(progress)
        # None: the network-wide width is drawn; a number: it is that one.
        starts: list[int | None] = [None] * self.draws
        if self.policies == "sum":
            starts = list(reversed(space.choices))
        elif self.policies == "sandwich":
            starts = [space.widest, *starts, space.narrowest]
        keys = jax.random.split(key, len(starts))
        rows = []
        for i, width in enumerate(starts):
            widest = self.policies != "draw" and i == 0
            narrowest = self.policies == "sandwich" and i == len(starts) - 1
            departs = 0.0 if widest or narrowest else rho
            rows.append(sample_mixed(keys[i], space, num_layers, departs, groups, base_width=width))
        return jnp.stack(rows)


def update_mask(model: Network, params: Variables, policies: jax.Array) -> Any:
    """Which entries of ``params`` the policies select: bool arrays that broadcast to each leaf.

    Steps of widths and TBN slices of pairs that no policy uses must not move: momentum and weight
    decay move a parameter whose gradient is zero.
    """
    masks = jax.tree.map(lambda _: jnp.ones((), bool), params)
    if model.quant.space is None:
        return masks
    pairs = pairs_used(model, policies)
    for layer in model.layers:
        used = pairs[layer.name]
        own = jnp.any(used, axis=0)
        masks[layer.name]["input"]["step"] = own
        for kernel in layer.kernels:
            if params[layer.name][kernel.name]["step"].shape == own.shape:
                masks[layer.name][kernel.name]["step"] = own
            norm = masks[layer.name][f"{kernel.name}_norm"]
            norm["scale"] = norm["bias"] = used[..., None]
    return masks


def transfer_variables(source: Variables, target: Variables) -> dict[str, Any]:
    """Variables of ``target``'s network with every value that ``source`` has for them.

    Kernels and the head are copied. BN tables change form where the networks differ in it: a plain
    BN ``[1, 1, C]`` or one per width ``[1, n, C]`` is spread over the pairs, and a transitional one
    ``[n, n, C]`` gives its [c, c] slices to one per width. What the source lacks (step sizes of a
    float twin) stays the target's. ParallelStep pairs count as not visited.

    Raises:
      UserError: any other shape differs, so the networks are not the same.
    """

    def take(path: Any, old: jax.Array) -> jax.Array:
        new: Any = source
        for key in path:
            if not isinstance(new, Mapping) or key.key not in new:
                return old
            new = new[key.key]
        new = jnp.asarray(new)
        if new.shape == old.shape:
            return new
        name = "/".join(key.key for key in path)
        if "_norm/" in name and new.shape[2:] == old.shape[2:]:
            (p, n), (old_p, old_n) = new.shape[:2], old.shape[:2]
            if old_p == 1 and p == n == old_n:
                return new[jnp.arange(n), jnp.arange(n)][None]
            if p == 1 and n in (1, old_n):
                return old if name.endswith("count") else jnp.broadcast_to(new, old.shape)
        raise UserError(
            f"cannot start from that network: {name} is {new.shape} there and {old.shape} here; "
            "use the same model, classes and widths"
        )

    return jax.tree_util.tree_map_with_path(take, dict(target))
