"""Stages of training: what is quantised, how policies are drawn, and what moves in a step."""

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

    Bit-Mixer has three (our reading of the paper): activations alone are quantised; then weights
    as well, both with one width for the network; then each layer draws its own width.

    Attributes:
      name: for logs and reports.
      epochs: length, in passes over the training data (a fraction is allowed).
      quantize: "nothing" (a full-precision baseline), "activations", or "weights+activations".
      widths: "network" draws one width for all layers; "layer" lets each layer draw its own, with
        probability rho.
      rho_start: rho at the start of the stage. rho is for widths = "layer" only.
      rho_end: rho after the ramp, until the end of the stage.
      ramp: fraction of the stage over which rho goes linearly from start to end.
      policies: of one step. "draw": ``draws`` random ones. "sum": one that starts from each
        uniform width. "sandwich": the widest, ``draws`` random ones, the narrowest. The first one
        of "sum" and "sandwich" is the uniform widest policy.
      draws: number of random policies.
      distill: "none"; "teacher": from the network in ``config.teacher``; "widest": from the widest
        policy of the same step, which "sum" and "sandwich" have.
      distill_weight: 0..1, weight of the distillation loss; cross-entropy has the rest.
      temperature: of the softened distributions, positive.
      learning_rate: peak.
      schedule: "cosine" to zero, "constant", or "step" (x 0.1 at 1/2 and at 3/4 of the stage).
      warmup: fraction of the stage over which the learning rate rises from zero.

    Raises:
      UserError: a value is not allowed, or two do not go together.

        >>> stage = Stage(name="mixed", epochs=60, widths="layer", ramp=0.5)
        >>> float(stage.rho(jnp.float32(0.25)))
        0.5

    Reference: Bulat and Tzimiropoulos, Bit-Mixer, ICCV 2021, arXiv 2103.17267; "sum": Jin et al.,
    AdaBits, CVPR 2020; "sandwich": Yu and Huang, Universally Slimmable Networks, ICCV 2019.
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
                'set policies = "sum" or "sandwich"',
                "conflict",
            )

    def quant_config(self, base: QuantConfig) -> QuantConfig:
        """Returns the QuantConfig of this stage, given that of the network."""
        return dataclasses.replace(
            base,
            activations=self.quantize != "nothing",
            weights=self.quantize == "weights+activations",
        )

    def rho(self, progress: jax.Array) -> jax.Array:
        """Returns the probability that a layer draws its own width: a float32 scalar.

        Args:
          progress: scalar 0..1, the part of the stage that is done.
        """
        if self.widths == "network":
            return jnp.float32(0)
        # Without a ramp there is nothing to divide by: rho is at its end from the start.
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
        """Draws the policies of one step. Consumes ``key``.

        Args:
          key: of `jax.random.key`. Devices that train together must use the same key: then all of
            them use, and update, the same pairs of widths.
          space: widths that a layer may take.
          num_layers: L.
          progress: scalar 0..1, the part of the stage that is done; it gives rho.
          groups: ``[L]``, layers with the same number share a width; None: each has its own.

        Returns:
          int32 ``[M, L]`` of widths in bits.

            >>> stage = Stage(name="weights", epochs=1, policies="sandwich", draws=2)
            >>> policies = stage.draw(jax.random.key(0), BitSpace((2, 3, 4)), 6, jnp.float32(0))
            >>> policies.shape, policies[0].tolist(), policies[-1].tolist()
            ((4, 6), [4, 4, 4, 4, 4, 4], [2, 2, 2, 2, 2, 2])
        """
        rho = self.rho(progress)
        # The network-wide width that a policy starts from; None: a random one.
        starts: list[int | None] = [None] * self.draws
        if self.policies == "sum":
            starts = list(reversed(space.choices))  # the widest first: others may learn from it
        elif self.policies == "sandwich":
            starts = [space.widest, *starts, space.narrowest]
        # One key for each policy, also for those that need none: then a policy's widths depend on
        # its place alone.
        keys = jax.random.split(key, len(starts))
        rows = []
        for i, width in enumerate(starts):
            widest = self.policies != "draw" and i == 0
            narrowest = self.policies == "sandwich" and i == len(starts) - 1
            # Both ends of a sandwich stay uniform, and the widest policy, from which others learn.
            own_rho = 0.0 if widest or narrowest else rho
            rows.append(sample_mixed(keys[i], space, num_layers, own_rho, groups, base_width=width))
        return jnp.stack(rows)


def update_mask(model: Network, params: Variables, policies: jax.Array) -> Any:
    """Returns which entries of the parameters the policies of a step select.

    Step sizes of other widths and TBN slices of other pairs must not move. Their gradient is zero,
    but momentum and weight decay move a parameter whose gradient is zero: see `apply_masked`.

    Args:
      model: the network.
      params: its parameters.
      policies: int32 ``[M, L]`` of widths.

    Returns:
      a tree like ``params`` of bool arrays that broadcast to its leaves.
    """
    # Stem, head and kernels are used by every policy. One scalar selects a whole array.
    masks = jax.tree.map(lambda _: jnp.ones((), bool), params)
    if model.quant.space is None:
        return masks
    pairs = pairs_used(model, policies)
    for layer in model.layers:
        used = pairs[layer.name]
        widths_used = jnp.any(used, axis=0)
        masks[layer.name]["input"]["step"] = widths_used
        for kernel in layer.kernels:
            # Nested kernels have one step size for all widths; each policy selects that.
            if params[layer.name][kernel.name]["step"].shape == widths_used.shape:
                masks[layer.name][kernel.name]["step"] = widths_used
            norm = masks[layer.name][f"{kernel.name}_norm"]
            norm["scale"] = norm["bias"] = used[..., None]
    return masks


def transfer_variables(source: Variables, target: Variables) -> dict[str, Any]:
    """Copies the variables of one network into those of another one of the same architecture.

    Kernels and the head are copied. BN tables are converted where the networks differ in them: a
    plain BN ``[1, 1, C]`` or one per width ``[1, n, C]`` is copied to all pairs, and a transitional
    one ``[n, n, C]`` gives its [c, c] slices to one per width. Visit counts are not converted to
    more pairs, so copied pairs count as not visited.

    Args:
      source: variables to copy from.
      target: variables of the network that is to be trained; they stay where the source has none,
        as for the step sizes that a full-precision baseline lacks.

    Returns:
      a tree like ``target``.

    Raises:
      UserError: another shape differs, so the networks are not the same.

        >>> plain = {"params": {"a": {"conv_norm": {"scale": jnp.full((1, 1, 4), 5.0)}}}}
        >>> pairs = {"params": {"a": {"conv_norm": {"scale": jnp.ones((3, 3, 4))}}}}
        >>> transfer_variables(plain, pairs)["params"]["a"]["conv_norm"]["scale"][2, 1].tolist()
        [5.0, 5.0, 5.0, 5.0]
    """

    def transfer(path: Any, old: jax.Array) -> jax.Array:
        new: Any = source
        for key in path:
            if not isinstance(new, Mapping) or key.key not in new:
                return old
            new = new[key.key]
        new = jnp.asarray(new)
        if new.shape == old.shape:
            return new
        name = "/".join(key.key for key in path)
        # BN tables are [predecessor's widths, own widths, channels], counts lack the channels.
        if "_norm/" in name and new.shape[2:] == old.shape[2:]:
            (p, n), (old_p, old_n) = new.shape[:2], old.shape[:2]
            # From pairs to one BN per width: the network-wide slices [c, c].
            if old_p == 1 and p == n == old_n:
                return new[jnp.arange(n), jnp.arange(n)][None]
            # From one BN, or one per width, to pairs: a copy for each.
            if p == 1 and n in (1, old_n):
                return old if name.endswith("count") else jnp.broadcast_to(new, old.shape)
        raise UserError(
            f"cannot start from that network: {name} is {new.shape} there and {old.shape} here; "
            "use the same model, classes and widths",
            "other-network",
        )

    return jax.tree_util.tree_map_with_path(transfer, dict(target))
