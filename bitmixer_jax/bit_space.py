"""The widths that the layers of a network may take, and random policies.

A policy holds one width for each of L layers: an int32 vector ``[L]``, in the order in which the
data pass through the layers. It holds widths in bits, such as 2, 3, 4; it never holds indices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class BitSpace:
    """The widths that each layer of a network may take.

    With n choices and L layers, the network has n^L policies.

    Attributes:
      choices: the widths in bits, in ascending order; each is from 2 to 8.

    Raises:
      UserError: ``choices`` is empty, is not in ascending order, or has a width outside 2..8.
        A width of 1 bit needs a sign quantiser, which this library does not have.

    Examples:
      >>> space = BitSpace((2, 3, 4))
      >>> space.n, space.narrowest, space.widest
      (3, 2, 4)
      >>> space.uniform(3, num_layers=5)
      array([3, 3, 3, 3, 3], dtype=int32)
    """

    choices: tuple[int, ...] = (2, 3, 4)

    def __post_init__(self) -> None:
        given: Any = self.choices
        choices = tuple(given) if isinstance(given, Sequence) else ()
        if not choices or not all(
            isinstance(c, int | np.integer) and not isinstance(c, bool) for c in choices
        ):
            raise UserError(
                f"bit-widths: got {self.choices!r}; give whole numbers such as (2, 3, 4)"
            )
        if list(choices) != sorted(set(choices)):
            raise UserError(f"bit-widths: got {choices}; give each once, in ascending order")
        if choices[0] < 1 or choices[-1] > 8:
            raise UserError(f"bit-widths: got {choices}; each must lie in 2..8")
        if choices[0] == 1:
            raise UserError(
                f"bit-widths: got {choices}; 1 bit needs a sign quantiser, which is not built yet: "
                "start at 2"
            )
        object.__setattr__(self, "choices", tuple(int(c) for c in choices))

    @property
    def n(self) -> int:
        """Number of choices."""
        return len(self.choices)

    @property
    def narrowest(self) -> int:
        """Smallest width, in bits."""
        return self.choices[0]

    @property
    def widest(self) -> int:
        """Largest width, in bits. Nested weights are stored at this width."""
        return self.choices[-1]

    def uniform(self, width: int, num_layers: int) -> np.ndarray:
        """Returns the policy with the same width in all layers.

        Args:
          width: bits, one of ``choices``.
          num_layers: L.

        Returns:
          int32 ``[L]``.

        Raises:
          UserError: ``width`` is not one of ``choices``.
        """
        return self.check(np.full(num_layers, width), num_layers)

    def check(self, widths: Any, num_layers: int | None = None) -> np.ndarray:
        """Checks one policy or several, and returns them as an array.

        Args:
          widths: ``[L]`` or ``[M, L]`` whole numbers of Python, numpy, JAX or PyTorch, in bits.
          num_layers: L; None accepts any number of layers.

        Returns:
          int32, of the shape of ``widths``.

        Raises:
          UserError: ``widths`` are not whole numbers, have another shape, or have a width that is
            not one of ``choices``.

        Examples:
          >>> BitSpace((2, 3, 4)).check([4, 3, 2], num_layers=3)
          array([4, 3, 2], dtype=int32)
        """
        policies = _as_array(widths)
        if policies.ndim not in (1, 2) or not np.issubdtype(policies.dtype, np.integer):
            raise UserError(
                f"policy: got {shown(widths)}; give one whole number of bits per layer, "
                f"from {self.choices}",
                "policy-form",
            )
        if num_layers is not None and policies.shape[-1] != num_layers:
            raise UserError(
                f"policy: {policies.shape[-1]} widths for a network of {num_layers} layers; "
                "give one width per layer",
                "policy-length",
            )
        unknown = sorted(set(policies.ravel().tolist()) - set(self.choices))
        if unknown:
            layer = int(np.argwhere(~np.isin(policies, self.choices))[0][-1])
            raise UserError(
                f"policy: width {unknown[0]} (layer {layer}) is not a width of this network; "
                f"choose from {self.choices}",
                "policy-width",
            )
        return policies.astype(np.int32)

    def index(self, width: Any) -> Any:
        """Returns the position of each width in ``choices``.

        A traced width that is not one of ``choices`` cannot raise an error. Its index is 0, and
        the network then returns NaN instead of logits (see `valid`).

        Args:
          width: an int, or an array of any shape, traced or not; in bits.

        Returns:
          an int for an int, else an int32 array of the same shape.

        Raises:
          ValueError: ``width`` is an int and not one of ``choices``.

        Examples:
          >>> space = BitSpace((2, 4, 8))
          >>> space.index(8)
          2
          >>> space.index(jnp.asarray([8, 2])).tolist()
          [2, 0]
        """
        if isinstance(width, int):
            return self.choices.index(width)
        table = jnp.asarray(self.choices, jnp.int32)
        return jnp.argmax(jnp.asarray(width)[..., None] == table, axis=-1).astype(jnp.int32)

    def valid(self, widths: jax.Array) -> jax.Array:
        """Returns whether all widths are among ``choices``.

        Args:
          widths: an array of any shape, traced or not; in bits.

        Returns:
          a bool scalar.

        Examples:
          >>> bool(BitSpace((2, 3, 4)).valid(jnp.asarray([4, 5, 2])))
          False
        """
        return jnp.isin(widths, jnp.asarray(self.choices, jnp.int32)).all()


def check_policy(policy: Any, space: BitSpace, num_layers: int) -> np.ndarray:
    """Checks one policy, and returns it as an array.

    Args:
      policy: ``[L]`` widths in bits, or one width for all layers; whole numbers of Python, numpy,
        JAX or PyTorch.
      space: the widths of the network.
      num_layers: L.

    Returns:
      int32 ``[L]``.

    Raises:
      UserError: ``policy`` is several policies, or does not fit the network (`BitSpace.check`).

    Examples:
      >>> check_policy(3, BitSpace((2, 3, 4)), num_layers=4)
      array([3, 3, 3, 3], dtype=int32)
    """
    array = _as_array(policy)
    if array.ndim == 0 and np.issubdtype(array.dtype, np.integer):
        policy = np.full(num_layers, array)
    checked = space.check(policy, num_layers)
    if checked.ndim != 1:
        raise UserError(
            f"policy: got {len(checked)} policies; give one, a width for each layer", "policy-form"
        )
    return checked


def _as_array(widths: Any) -> np.ndarray:
    """Returns widths as an array; an array of floats, which is no policy, if numpy fails."""
    try:
        return np.asarray(widths)
    except (ValueError, RuntimeError, TypeError):  # uneven lists; tensors on another device
        return np.zeros(0)


def _per_layer(values: jax.Array, groups: Sequence[int] | None) -> jax.Array:
    """Returns the value of each layer's group: ``[L]``. Without groups, each layer is a group."""
    return values if groups is None else values[jnp.asarray(groups, jnp.int32)]


def sample_uniform(key: jax.Array, space: BitSpace, num_layers: int) -> jax.Array:
    """Draws one width for all layers, each choice with probability 1/n.

    Bit-Mixer switches the width of the whole network in stages 1 and 2 (reported). That it draws
    the width at each step is our reading.

    Args:
      key: a random key; consumed. May be traced.
      space: the n choices.
      num_layers: L.

    Returns:
      int32 ``[L]``, in bits.

    Examples:
      >>> policy = sample_uniform(jax.random.key(0), BitSpace((2, 3, 4)), num_layers=5)
      >>> policy.shape, len(set(policy.tolist()))
      ((5,), 1)

    Reference: Bulat and Tzimiropoulos, Bit-Mixer, ICCV 2021.
    """
    choices = jnp.asarray(space.choices, jnp.int32)
    return jnp.full(num_layers, jax.random.choice(key, choices), jnp.int32)


def sample_random(
    key: jax.Array, space: BitSpace, num_layers: int, groups: Sequence[int] | None = None
) -> jax.Array:
    """Draws a width for each layer, or for each group of layers.

    Draws are independent; each choice has probability 1/n.

    Args:
      key: a random key; consumed. May be traced.
      space: the n choices.
      num_layers: L.
      groups: ``[L]`` group of each layer, from 0. The layers of a group share a width. None: each
        layer is a group. `Network.groups` returns the layers or the blocks of a network.

    Returns:
      int32 ``[L]``, in bits.

    Examples:
      >>> space = BitSpace((2, 3, 4))
      >>> policy = sample_random(jax.random.key(0), space, num_layers=4, groups=(0, 0, 1, 1))
      >>> bool(policy[0] == policy[1]), bool(policy[2] == policy[3])
      (True, True)
    """
    choices = jnp.asarray(space.choices, jnp.int32)
    return _per_layer(jax.random.choice(key, choices, (num_layers,)), groups)


def sample_mixed(
    key: jax.Array,
    space: BitSpace,
    num_layers: int,
    rho: jax.Array | float,
    groups: Sequence[int] | None = None,
    base_width: int | None = None,
) -> jax.Array:
    """Draws one width for the network, and another for each layer with probability ``rho``.

      b[l] = r[l] with probability rho, else u

    where u is the width of the network, and r[l] is the random width of layer l. All are drawn
    from the choices with equal probability. In our reading, stage 3 of Bit-Mixer raises rho from
    0 (one width for the network) to 1 (a random width for each layer).

    Args:
      key: a random key; consumed. May be traced.
      space: the n choices.
      num_layers: L.
      rho: probability, from 0 to 1. May be traced.
      groups: ``[L]`` group of each layer, as in `sample_random`. A group draws once.
      base_width: u in bits; None draws it.

    Returns:
      int32 ``[L]``, in bits.

    Examples:
      >>> key, space = jax.random.key(0), BitSpace((2, 3, 4))
      >>> sample_mixed(key, space, num_layers=4, rho=0.0, base_width=3).tolist()
      [3, 3, 3, 3]

    Reference: Bulat and Tzimiropoulos, Bit-Mixer, ICCV 2021.
    """
    uniform_key, random_key, rho_key = jax.random.split(key, 3)
    is_random = _per_layer(jax.random.bernoulli(rho_key, rho, (num_layers,)), groups)
    if base_width is None:
        base = sample_uniform(uniform_key, space, num_layers)
    else:
        base = jnp.full(num_layers, base_width, jnp.int32)
    return jnp.where(is_random, sample_random(random_key, space, num_layers, groups), base)


def sample_average(
    key: jax.Array,
    space: BitSpace,
    num_layers: int,
    average: float,
    groups: Sequence[int] | None = None,
) -> np.ndarray:
    """Draws a policy of a given average width.

    All policies whose sum over layers is ``round(average * L)`` have the same probability. The
    function counts policies with Python's integers, so it cannot be traced.

    Args:
      key: a random key; consumed.
      space: the n choices.
      num_layers: L.
      average: mean width of the layers in bits, from the narrowest to the widest choice.
      groups: ``[L]`` group of each layer, as in `sample_random`.

    Returns:
      int32 ``[L]``, in bits.

    Raises:
      UserError: no policy has this average.

    Examples:
      >>> policy = sample_average(jax.random.key(0), BitSpace((2, 3, 4)), num_layers=6, average=2.5)
      >>> int(policy.sum())
      15
    """
    layer_groups = np.arange(num_layers) if groups is None else np.asarray(groups)
    sizes = np.bincount(layer_groups).tolist()
    total = max(round(average * num_layers), 0)
    # ways[g][s]: how many policies of the groups g, g+1, ... have the sum s. These are exact
    # integers: with 51 layers and three choices there are 3^51, more than a float64 can count.
    ways: list[list[int]] = [[0] * (total + 1) for _ in range(len(sizes) + 1)]
    ways[-1][0] = 1
    for g in range(len(sizes) - 1, -1, -1):
        for s in range(total + 1):
            remaining = [s - c * sizes[g] for c in space.choices]
            ways[g][s] = sum(ways[g + 1][r] for r in remaining if r >= 0)
    if not ways[0][total]:
        raise UserError(
            f"average width {average}: no policy of {num_layers} layers has it; give a value in "
            f"[{space.narrowest}, {space.widest}] that the groups of layers can reach",
            "out-of-reach",
        )
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    widths = []
    # A group takes a width in proportion to how many policies of the later groups complete it.
    for g, size in enumerate(sizes):
        remaining = [total - c * size for c in space.choices]
        counts = [ways[g + 1][r] if r >= 0 else 0 for r in remaining]
        # Dividing by the largest count keeps counts beyond the range of float64 finite.
        ratios = [c / max(counts) for c in counts]
        scale = math.fsum(ratios)
        choice = int(rng.choice(space.n, p=[ratio / scale for ratio in ratios]))
        widths.append(space.choices[choice])
        total = remaining[choice]
    return np.asarray(widths, np.int32)[layer_groups]
