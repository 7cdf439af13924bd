"""Bit-widths a network may take, policies (one width per layer), samplers, and policy files.

A policy is an int32 vector ``[L]`` of *widths* (2, 3, 4 - never indices), in the order in which
data meets the layers.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax.errors import UserError, shown
from bitmixer_jax.files import read_document, user_path, write_new

POLICY_FORMAT = "bitmixer-policy"
POLICY_VERSION = 1


@dataclasses.dataclass(frozen=True)
class BitSpace:
    """The widths that each layer of a network may take.

    Attributes:
      choices: ascending widths in bits, each from 2 to 8.

    Raises:
      UserError: choices are empty, not ascending, or outside 2..8. One bit needs a sign
        quantiser, which this library does not have.
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
                "start at 2",
                "bad-value",
            )
        object.__setattr__(self, "choices", tuple(int(c) for c in choices))

    @property
    def n(self) -> int:
        """Number of widths."""
        return len(self.choices)

    @property
    def narrowest(self) -> int:
        """Smallest width, in bits."""
        return self.choices[0]

    @property
    def widest(self) -> int:
        """Largest width, in bits: the one at which nested weights are stored."""
        return self.choices[-1]

    def uniform(self, width: int, num_layers: int) -> np.ndarray:
        """The policy that runs all ``num_layers`` layers at ``width`` bits: int32 ``[L]``."""
        return self.check(np.full(num_layers, width), num_layers)

    def check(self, widths: Any, num_layers: int | None = None) -> np.ndarray:
        """Returns ``widths`` as an int32 ``[L]`` array (or ``[M, L]``: M policies), or raises.

        Args:
          widths: whole numbers of Python, numpy, JAX or PyTorch.

        Raises:
          UserError: not whole numbers, the wrong length, or a width outside ``choices``.
        """
        try:
            policy = np.asarray(widths)
        # Rows of different lengths, or tensors that numpy cannot read.
        except (ValueError, RuntimeError, TypeError):
            policy = np.zeros(0)
        if policy.ndim not in (1, 2) or not np.issubdtype(policy.dtype, np.integer):
            raise UserError(
                f"policy: got {shown(widths)}; give one whole number of bits per layer, "
                f"from {self.choices}",
                "policy-form",
            )
        if num_layers is not None and policy.shape[-1] != num_layers:
            raise UserError(
                f"policy: {policy.shape[-1]} widths for a network of {num_layers} layers; "
                "give one width per layer",
                "policy-length",
            )
        unknown = sorted(set(policy.ravel().tolist()) - set(self.choices))
        if unknown:
            layer = int(np.argwhere(~np.isin(policy, self.choices))[0][-1])
            raise UserError(
                f"policy: width {unknown[0]} (layer {layer}) is not one of this network; "
                f"choose from {self.choices}",
                "policy-width",
            )
        return policy.astype(np.int32)

    def index(self, width: Any) -> Any:
        """Position of ``width`` in ``choices``: an int for an int, int32 for (traced) arrays.

        A traced width that is not in ``choices`` cannot raise; it maps to 0, and the model turns
        the logits into NaN (`valid`).
        """
        if isinstance(width, int):
            return self.choices.index(width)
        table = jnp.asarray(self.choices, jnp.int32)
        return jnp.argmax(jnp.asarray(width)[..., None] == table, axis=-1).astype(jnp.int32)

    def valid(self, widths: jax.Array) -> jax.Array:
        """Whether all (traced) ``widths`` are among the choices: a bool scalar."""
        return jnp.isin(widths, jnp.asarray(self.choices, jnp.int32)).all()


def _per_group(values: jax.Array, groups: Sequence[int] | None) -> jax.Array:
    """Gives each layer the value drawn for its group; without groups each layer is its own."""
    return values if groups is None else values[jnp.asarray(groups, jnp.int32)]


def sample_uniform(key: jax.Array, space: BitSpace, num_layers: int) -> jax.Array:
    """Draws one width for the whole network: int32 ``[L]``. Consumes ``key``."""
    choices = jnp.asarray(space.choices, jnp.int32)
    return jnp.full(num_layers, jax.random.choice(key, choices), jnp.int32)


def sample_random(
    key: jax.Array, space: BitSpace, num_layers: int, groups: Sequence[int] | None = None
) -> jax.Array:
    """Draws a width for each layer (or each group of layers): int32 ``[L]``. Consumes ``key``.

    Args:
      groups: ``[L]`` group of each layer, when the layers of a block share one width.
    """
    choices = jnp.asarray(space.choices, jnp.int32)
    return _per_group(jax.random.choice(key, choices, (num_layers,)), groups)


def sample_mixed(
    key: jax.Array,
    space: BitSpace,
    num_layers: int,
    rho: jax.Array | float,
    groups: Sequence[int] | None = None,
    base_width: int | None = None,
) -> jax.Array:
    """Draws one width for the network, then lets each layer draw its own with probability ``rho``.

    Stage 3 of Bit-Mixer (our reading): rho ramps from 0 (network-wide) to 1 (layer-wise).

    Args:
      rho: probability, 0..1; may be traced.
      groups: as in `sample_random`.
      base_width: the network-wide width, instead of a drawn one.

    Returns:
      int32 ``[L]``. Consumes ``key``.
    """
    wide, own, coin = jax.random.split(key, 3)
    departs = _per_group(jax.random.bernoulli(coin, rho, (num_layers,)), groups)
    if base_width is None:
        base = sample_uniform(wide, space, num_layers)
    else:
        base = jnp.full(num_layers, base_width, jnp.int32)
    return jnp.where(departs, sample_random(own, space, num_layers, groups), base)


def sample_average(
    key: jax.Array,
    space: BitSpace,
    num_layers: int,
    average: float,
    groups: Sequence[int] | None = None,
) -> np.ndarray:
    """Draws, with equal probability, one of the policies whose widths average ``average`` bits.

    Runs on the host (it counts the policies of each sum), so it cannot be traced. Consumes ``key``.

    Returns:
      int32 ``[L]``; its sum is ``average * L`` rounded to the nearest whole number.

    Raises:
      UserError: no policy has that average; the message gives the reachable range.
    """
    sizes = np.bincount(np.arange(num_layers) if groups is None else np.asarray(groups))
    total = max(round(average * num_layers), 0)
    # ways[g][s]: in how many ways groups g.. can use s bits in all (exact integers).
    ways: list[list[int]] = [[0] * (total + 1) for _ in range(len(sizes) + 1)]
    ways[-1][0] = 1
    for g in range(len(sizes) - 1, -1, -1):
        for s in range(total + 1):
            used = [s - c * int(sizes[g]) for c in space.choices]
            ways[g][s] = sum(ways[g + 1][u] for u in used if u >= 0)
    if not ways[0][total]:
        raise UserError(
            f"average width {average}: no policy of {num_layers} layers has it; choose a value in "
            f"[{space.narrowest}, {space.widest}] that the layers can reach together",
            "out-of-reach",
        )
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    widths = []
    for g, size in enumerate(sizes):
        options = [total - c * int(size) for c in space.choices]
        counts = [ways[g + 1][o] if o >= 0 else 0 for o in options]
        scale = math.fsum(c / max(counts) for c in counts)
        pick = int(rng.choice(space.n, p=[c / max(counts) / scale for c in counts]))
        widths.append(space.choices[pick])
        total = options[pick]
    order = np.arange(num_layers) if groups is None else np.asarray(groups)
    return np.asarray(widths, np.int32)[order]


def closest(name: str, known: Sequence[str]) -> str:
    """A hint "; did you mean ...?" for a misspelt ``name``; empty when nothing is near."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def save_policy(
    path: str | pathlib.Path,
    policy: Any,
    names: Sequence[str],
    space: BitSpace,
    *,
    overwrite: bool = False,
    **notes: Any,
) -> None:
    """Writes a policy file (JSON), with the width of each named layer.

    Args:
      policy: ``[L]`` widths.
      names: ``[L]`` layer names, from ``model.layers``.
      notes: further JSON values to keep beside the widths (accuracy, budget, ...).

    Raises:
      UserError: the policy does not fit, or the file exists with other content and
        ``overwrite`` is false.
    """
    widths = space.check(policy, len(names))
    taken = {"format", "version", "choices", "layers", "sha256"} & set(notes)
    if taken:
        raise UserError(
            f"policy file: the note {taken.pop()!r} is a field of the format; rename it"
        )
    content = {
        "format": POLICY_FORMAT,
        "version": POLICY_VERSION,
        "choices": list(space.choices),
        "layers": {name: int(width) for name, width in zip(names, widths, strict=True)},
        **notes,
    }
    content["sha256"] = _policy_digest(content)
    write_new(path, json.dumps(content, indent=2) + "\n", overwrite=overwrite)


def _policy_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a policy file says of widths."""
    said = json.dumps([content.get("choices"), content.get("layers")], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def load_policy(path: str | pathlib.Path, names: Sequence[str], space: BitSpace) -> np.ndarray:
    """Reads a policy file for the network whose layers are called ``names``: int32 ``[L]``.

    Raises:
      UserError: the file is missing, not a policy file, damaged, or made for other layers or
        choices.
    """
    path, content = read_document(path, "policy", POLICY_FORMAT, POLICY_VERSION)
    if content.get("choices") != list(space.choices):
        raise UserError(
            f"{path}: made for widths {shown(content.get('choices'))}; "
            f"this network has {list(space.choices)}",
            "other-network",
        )
    layers = content.get("layers")
    if not isinstance(layers, Mapping):
        raise UserError(f'{path}: "layers" must map each layer name to its width', "damaged")
    for name in layers:
        if name not in names:
            raise UserError(
                f"{path}: unknown layer {shown(name)}{closest(name, names)}", "unknown-name"
            )
    missing = [name for name in names if name not in layers]
    if missing:
        raise UserError(
            f"{path}: no width for layer {missing[0]!r} ({len(missing)} missing)", "other-network"
        )
    widths = [layers[name] for name in names]
    if not all(isinstance(w, int) and not isinstance(w, bool) for w in widths):
        raise UserError(f"{path}: widths must be whole numbers from {space.choices}", "damaged")
    try:
        policy = space.check(widths, len(names))
    except UserError as error:
        raise UserError(f"{path}: {error}", error.code) from None
    # Last, as what is wrong with an edited file is best said in its own words. A file written by
    # hand has no checksum; a damaged one may have a damaged name of it.
    summed = difflib.get_close_matches("sha256", content, n=1, cutoff=0.65)
    if summed and content.get("sha256") != _policy_digest(content):
        raise UserError(
            f'{path}: widths and checksum differ; if you edited it, remove its line "sha256"',
            "damaged",
        )
    return policy


def with_widths(
    policy: Any, changes: Mapping[str, int], names: Sequence[str], space: BitSpace
) -> np.ndarray:
    """The policy with the widths of some layers changed: int32 ``[L]``.

    Args:
      policy: ``[L]`` widths.
      changes: width by layer name; a name may hold wildcards (``*``, ``?``, ``[12]``), as in
        ``{"stage2.*.conv1": 2}``. Later entries override earlier ones.
      names: ``[L]`` layer names, from ``model.layers``.

    Raises:
      UserError: a name or pattern that no layer has, or a width that is not among the choices.
    """
    widths = space.check(policy, len(names)).copy()
    for pattern, width in changes.items():
        places = [i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)]
        if not places:
            hint = closest(pattern, _patterns(names)) or f" (they are {names[0]}, ..., {names[-1]})"
            raise UserError(f"policy: no layer is called {pattern!r}{hint}", "unknown-name")
        if type(width) is not int or width not in space.choices:
            raise UserError(
                f"policy: {pattern}={width!r}; choose a width from {space.choices}", "policy-width"
            )
        widths[places] = width
    return widths


def _patterns(names: Sequence[str]) -> list[str]:
    """The names, and "stage2.*" or "*.conv1" of each of their parts: what a person may mean."""
    found = dict.fromkeys(names)
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            found[".".join([*parts[:i], "*"])] = None
            found[".".join(["*", *parts[i:]])] = None
    return list(found)


def parse_changes(texts: Sequence[str]) -> dict[str, int]:
    """Reads what a person types to change widths, ``["stage2.*=2", "last=4"]``, for `with_widths`.

    Raises:
      UserError: not LAYER=WIDTH.
    """
    changes: dict[str, int] = {}
    for text in texts:
        name, equals, width = text.rpartition("=")
        if not (name and equals and width.isdecimal() and len(width) < 10):
            raise UserError(f"set {text}: write LAYER=WIDTH, such as stage2.block1.conv1=2")
        changes.pop(name, None)  # of two for one name, the later counts, in its place
        changes[name] = int(width)
    return changes


def check_policy(policy: Any, space: BitSpace, num_layers: int) -> np.ndarray:
    """Returns one policy as int32 ``[L]``.

    Args:
      policy: ``[L]`` widths, or one width for all layers; whole numbers of any kind.

    Raises:
      UserError: it is no such thing, or several policies, or does not fit the network.
    """
    try:
        given = np.asarray(policy)
    except (ValueError, RuntimeError, TypeError):  # `BitSpace.check` says what is wrong
        given = np.zeros(0)
    if given.ndim == 0 and np.issubdtype(given.dtype, np.integer):
        policy = np.full(num_layers, given)
    checked = space.check(policy, num_layers)
    if checked.ndim != 1:
        raise UserError(
            f"policy: got {len(checked)} policies; give one, a width for each layer", "policy-form"
        )
    return checked


def as_policy(
    policy: Any, names: Sequence[str], space: BitSpace, changes: Mapping[str, int] | None = None
) -> np.ndarray:
    """Returns what a person gives for a policy as int32 ``[L]``.

        as_policy(3, model.names, model.space)
        as_policy("policy.json", model.names, model.space, {"stage2.*": 2})

    Args:
      policy: ``[L]`` widths; one width for all layers; or text: "3", "4,3,2,..." or the path of a
        policy file.
      names: ``[L]`` layer names.
      changes: widths of some layers, as `with_widths` takes them.

    Raises:
      UserError: it is none of these, or does not fit the network.
    """
    if isinstance(policy, str | pathlib.PurePath):
        policy = parse_policy(str(policy), names, space)
    checked = check_policy(policy, space, len(names))
    return with_widths(checked, changes, names, space) if changes else checked


def parse_policy(text: str, names: Sequence[str], space: BitSpace) -> np.ndarray:
    """Reads what a person types for a policy: ``3``, ``4,3,2,...`` or the path of a policy file.

    Returns:
      int32 ``[L]``.

    Raises:
      UserError: it is none of these, or does not fit the network.
    """
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() and len(part) < 10 for part in parts):
        widths = [int(part) for part in parts]
        if len(widths) == 1:
            widths *= len(names)
        return space.check(widths, len(names))
    try:
        found = user_path(text).exists()
    except (OSError, UserError):  # too long for a path, or none
        found = False
    if not found:
        raise UserError(
            f"policy {text[:80]!r}: not a width, not a comma-separated list of widths, "
            "and no such file",
            "policy-form",
        )
    return load_policy(text, names, space)
