"""Policies as people give them: widths, text or a file, with changes by layer name.

A policy holds one width for each layer: int32 ``[L]``, in bits, in the order of ``model.layers``.
`BitSpace` and the random policies are defined in `bit_space`; this module exports them too.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitmixer_jax.bit_space import BitSpace as BitSpace
from bitmixer_jax.bit_space import check_policy as check_policy
from bitmixer_jax.bit_space import sample_average as sample_average
from bitmixer_jax.bit_space import sample_mixed as sample_mixed
from bitmixer_jax.bit_space import sample_random as sample_random
from bitmixer_jax.bit_space import sample_uniform as sample_uniform
from bitmixer_jax.errors import UserError, shown
from bitmixer_jax.files import read_document, user_path, write_new

POLICY_FORMAT = "bitmixer-policy"
POLICY_VERSION = 1


def closest(name: str, known: Sequence[str]) -> str:
    """Returns "; did you mean ...?" for a misspelt name, or "" if no known name is similar."""
    similar = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(similar)}?" if similar else ""


def as_policy(
    policy: Any, names: Sequence[str], space: BitSpace, changes: Mapping[str, int] | None = None
) -> np.ndarray:
    """Reads a policy in any form that people give it, and changes the widths of some layers.

    Args:
      policy: ``[L]`` widths in bits; or one width for all layers; or text, as `parse_policy` reads
        it; or the path of a policy file.
      names: ``[L]`` layer names, from ``model.names``.
      space: the widths of the network.
      changes: widths by layer name, as in `with_widths`.

    Returns:
      int32 ``[L]``.

    Raises:
      UserError: ``policy`` is none of these, or it or ``changes`` do not fit the network.

    Examples:
      >>> names, space = ["stage1.conv1", "stage2.conv1", "stage2.conv2"], BitSpace((2, 3, 4))
      >>> as_policy(3, names, space)
      array([3, 3, 3], dtype=int32)
      >>> as_policy("4,4,3", names, space, {"stage2.*": 2})
      array([4, 2, 2], dtype=int32)
    """
    if isinstance(policy, str | pathlib.PurePath):
        policy = parse_policy(str(policy), names, space)
    checked = check_policy(policy, space, len(names))
    return with_widths(checked, changes, names, space) if changes else checked


def parse_policy(text: str, names: Sequence[str], space: BitSpace) -> np.ndarray:
    """Reads a policy from text.

    Args:
      text: one width for all layers, such as "3"; or ``L`` widths, such as "4,3,2"; or the path of
        a policy file.
      names: ``[L]`` layer names, from ``model.names``.
      space: the widths of the network.

    Returns:
      int32 ``[L]``.

    Raises:
      UserError: ``text`` is none of these, or does not fit the network.

    Examples:
      >>> parse_policy("4, 3, 2", ["conv1", "conv2", "conv3"], BitSpace((2, 3, 4)))
      array([4, 3, 2], dtype=int32)
    """
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() and len(part) < 10 for part in parts):
        widths = [int(part) for part in parts]
        if len(widths) == 1:
            widths *= len(names)
        return space.check(widths, len(names))
    try:
        is_path = user_path(text).exists()
    except (OSError, UserError):  # the text is too long for a path, or cannot be one
        is_path = False
    if not is_path:
        raise UserError(
            f"policy {text[:80]!r}: not a width, not a comma-separated list of widths, "
            "and no such file",
            "policy-form",
        )
    return load_policy(text, names, space)


def with_widths(
    policy: Any, changes: Mapping[str, int], names: Sequence[str], space: BitSpace
) -> np.ndarray:
    """Returns a policy with the widths of some layers changed.

    Args:
      policy: ``[L]`` widths in bits. It is not modified.
      changes: new widths in bits by layer name. A name may hold the wildcards ``*``, ``?`` and
        ``[12]``. If two entries match a layer, the later one sets its width.
      names: ``[L]`` layer names, from ``model.names``.
      space: the widths of the network.

    Returns:
      int32 ``[L]``.

    Raises:
      UserError: no layer matches a name, or a width is not one of the choices.

    Examples:
      >>> names = ["stage1.conv1", "stage2.conv1", "stage2.conv2"]
      >>> with_widths([4, 4, 4], {"stage2.*": 2, "*.conv2": 3}, names, BitSpace((2, 3, 4)))
      array([4, 2, 3], dtype=int32)
    """
    changed = space.check(policy, len(names)).copy()
    for pattern, width in changes.items():
        matching = [i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            hint = closest(pattern, _patterns(names)) or f" (they are {names[0]}, ..., {names[-1]})"
            raise UserError(f"policy: no layer is called {pattern!r}{hint}", "unknown-name")
        if type(width) is not int or width not in space.choices:
            raise UserError(
                f"policy: {pattern}={width!r}; choose a width from {space.choices}", "policy-width"
            )
        changed[matching] = width
    return changed


def _patterns(names: Sequence[str]) -> list[str]:
    """Returns the names, and patterns such as "stage2.*" and "*.conv1", to correct spellings."""
    patterns = dict.fromkeys(names)
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            patterns[".".join([*parts[:i], "*"])] = None
            patterns[".".join(["*", *parts[i:]])] = None
    return list(patterns)


def parse_changes(texts: Sequence[str]) -> dict[str, int]:
    """Reads changes of widths from text, for `with_widths`.

    Args:
      texts: each is LAYER=WIDTH. If a layer is named twice, the later text counts.

    Returns:
      widths in bits by layer name.

    Raises:
      UserError: a text is not LAYER=WIDTH.

    Examples:
      >>> parse_changes(["stage2.*=2", "stage2.conv1=4"])
      {'stage2.*': 2, 'stage2.conv1': 4}
    """
    changes: dict[str, int] = {}
    for text in texts:
        name, equals, width = text.rpartition("=")
        if not (name and equals and width.isdecimal() and len(width) < 10):
            raise UserError(
                f"change of widths {text!r}: write LAYER=WIDTH, such as stage2.block1.conv1=2"
            )
        changes.pop(name, None)  # the later text also takes the later place in the order
        changes[name] = int(width)
    return changes


def save_policy(
    path: str | pathlib.Path,
    policy: Any,
    names: Sequence[str],
    space: BitSpace,
    *,
    overwrite: bool = False,
    **notes: Any,
) -> None:
    """Writes a policy file: JSON with the width of each named layer.

    Args:
      path: the file.
      policy: ``[L]`` widths in bits.
      names: ``[L]`` layer names, from ``model.names``.
      space: the widths of the network.
      overwrite: whether to replace a file that has other content.
      notes: more JSON values to store in the file, such as the accuracy or the budget.

    Raises:
      UserError: the policy does not fit the network; a note has the name of a field of the format;
        the file exists with other content and ``overwrite`` is false; or it cannot be written.

    Examples:
      >>> import tempfile
      >>> names, space = ["conv1", "conv2"], BitSpace((2, 3, 4))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_policy(f"{folder}/policy.json", [2, 4], names, space, top1=0.9)
      ...     load_policy(f"{folder}/policy.json", names, space)
      array([2, 4], dtype=int32)
    """
    widths = space.check(policy, len(names))
    reserved = {"format", "version", "choices", "layers", "sha256"} & set(notes)
    if reserved:
        raise UserError(
            f"policy file: the note {reserved.pop()!r} is a field of the format; rename it"
        )
    content = {
        "format": POLICY_FORMAT,
        "version": POLICY_VERSION,
        "choices": list(space.choices),
        "layers": {name: int(width) for name, width in zip(names, widths, strict=True)},
        **notes,
    }
    content["sha256"] = _checksum(content)
    write_new(path, json.dumps(content, indent=2) + "\n", overwrite=overwrite)


def _checksum(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the choices and widths in a policy file."""
    text = json.dumps([content.get("choices"), content.get("layers")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load_policy(path: str | pathlib.Path, names: Sequence[str], space: BitSpace) -> np.ndarray:
    """Reads a policy file that was made for the same layers and choices.

    Args:
      path: the file, as `save_policy` wrote it. A person may write one without a checksum.
      names: ``[L]`` layer names of the network, from ``model.names``.
      space: the widths of the network.

    Returns:
      int32 ``[L]``, in the order of ``names``.

    Raises:
      UserError: the file is missing, is not a policy file, is damaged, or was made for other layers
        or choices.

    See `save_policy` for an example.
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
    # The checksum is compared last, because the messages above say more about a wrong edit.
    # A missing "sha256" is allowed. A similar key is a damaged "sha256", which is refused.
    has_checksum = difflib.get_close_matches("sha256", content, n=1, cutoff=0.65)
    if has_checksum and content.get("sha256") != _checksum(content):
        raise UserError(
            f'{path}: widths and checksum differ; if you edited it, remove its line "sha256"',
            "damaged",
        )
    return policy
