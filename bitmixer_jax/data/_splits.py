"""Splits and slices of them, as tensorflow-datasets writes them.

A split is a sum of parts, such as ``train[:20%]+train[50%:]``. Its examples are those of the parts,
one part after the other.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bitmixer_jax.errors import UserError

ALL = "all"  # the sum of all splits
_LONGEST = 2000  # characters
_NUMBER = r"-?\d(?:_?\d){0,17}"  # 18 digits: more than there are images
_POSITION = rf"(?:{_NUMBER}(?:\.\d{{1,17}})?%|{_NUMBER})"
_PART = re.compile(
    rf"(?P<name>[\w-]+)(\[(?P<start>{_POSITION})?:(?P<stop>{_POSITION})?\])?", re.ASCII
)


class EmptySplit(UserError):
    """A split without examples."""


class Part(NamedTuple):
    """The examples ``start .. stop - 1`` of the split ``name``."""

    name: str
    start: int
    stop: int


def parse_split(split: str, counts: Mapping[str, int]) -> tuple[Part, ...]:
    """Returns the parts of a split, in order, none of them empty.

    Args:
      split: such as `train`, `train[:90%]`, `train[45000:]`, `train[-10:]`, `train[:20%]+test`.
      counts: number of examples of each split there is.

    Raises:
      EmptySplit: it has no examples.
      UserError: unknown or malformed, or beyond the examples there are.
    """
    found = []
    for name, first, last in _matches(split, counts):
        count = counts[name]
        start, stop = _position(first, 0, count), _position(last, count, count)
        if max(abs(start), abs(stop)) > count:
            raise UserError(
                f"split {_shown(split)} reaches beyond the {count} examples of {name}; "
                f"give positions from -{count} to {count}, or -100% to 100%"
            )
        start, stop = (place + count if place < 0 else place for place in (start, stop))
        if start > stop:
            raise EmptySplit(
                f"split {_shown(split)} is empty: {name} has {count} examples, and the slice "
                f"starts at {start} and ends at {stop}"
            )
        found.append(Part(name, start, stop))
    parts = tuple(part for part in found if part.start < part.stop)
    if not parts:
        names = " and ".join(f"{name} has {counts[name]} examples" for name, *_ in found)
        raise EmptySplit(f"split {_shown(split)} is empty: {names}")
    return parts


def split_names(split: str, known: Iterable[str] | None = None) -> tuple[str, ...]:
    """Returns the names of the splits that a split has parts of, each once, without their counts.

    Args:
      known: the names there are; None: any name will do, and ``all`` stays what it is.

    Raises:
      UserError: unknown or malformed.
    """
    names = None if known is None else dict.fromkeys(known, 0)
    return tuple(dict.fromkeys(name for name, *_ in _matches(split, names)))


def overlap(one: Sequence[Part], other: Sequence[Part]) -> bool:
    """Whether two splits have an example in common."""
    return any(
        a.name == b.name and a.start < b.stop and b.start < a.stop for a in one for b in other
    )


def complement(split: str, counts: Mapping[str, int]) -> str:
    """Returns what a split leaves of the splits it has parts of; "" where that is nothing."""
    parts = parse_split(split, counts)
    rest = []
    for name in dict.fromkeys(part.name for part in parts):
        end = 0
        for _, start, stop in sorted(part for part in parts if part.name == name):
            if start > end:
                rest.append(f"{name}[{end}:{start}]")
            end = max(end, stop)
        if end < counts[name]:
            rest.append(f"{name}[{end}:]")
    return "+".join(rest)


def _matches(
    split: str, known: Mapping[str, int] | None
) -> list[tuple[str, str | None, str | None]]:
    """Name, start and stop of each part, as they are written."""
    there = "the splits of the data set" if known is None else " or ".join(known)
    wrong = UserError(
        f"unknown split {_shown(split)}: give {there}, optionally with a slice by count or per "
        "cent such as train[:90%], train[45000:], train[-10:], or a sum such as "
        "train[:20%]+train[50%:]"
    )
    if len(split) > _LONGEST:
        raise wrong
    found: list[tuple[str, str | None, str | None]] = []
    for text in re.split(r" *\+ *", split):
        match = _PART.fullmatch(text)
        if match is None:
            raise wrong
        name = match["name"]
        if known is not None and name == ALL and ALL not in known and text == ALL:
            found += [(each, None, None) for each in known]
        elif known is not None and name not in known:
            raise wrong
        else:
            found.append((name, match["start"], match["stop"]))
    return found


def _position(text: str | None, default: int, count: int) -> int:
    if text is None:
        return default
    if not text.endswith("%"):
        return int(text)
    share = float(text[:-1])
    # `round` is what tensorflow-datasets does by default ("closest").
    return round(share * count / 100) if abs(share) <= 100 else count + 1


def _shown(split: str) -> str:
    return repr(split) if len(split) <= 80 else f"{split[:60]!r}... ({len(split)} characters)"
