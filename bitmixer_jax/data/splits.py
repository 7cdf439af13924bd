"""Splits of a data set and slices of them, in the notation of tensorflow-datasets.

A split is a sum of parts, such as ``train[:20%]+train[50%:]``. Its examples are those of the parts,
one part after the other.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bitmixer_jax.errors import UserError, shown

ALL = "all"  # the sum of all splits
_MAX_LENGTH = 2000  # characters
_NUMBER = r"-?\d(?:_?\d){0,17}"  # 18 digits: no data set has more images
_POSITION = rf"(?:{_NUMBER}(?:\.\d{{1,17}})?%|{_NUMBER})"
_PART = re.compile(
    rf"(?P<name>[\w-]+)(\[(?P<start>{_POSITION})?:(?P<stop>{_POSITION})?\])?", re.ASCII
)


class EmptySplit(UserError):
    """A split without examples."""

    default_code = "no-data"


class Part(NamedTuple):
    """The examples ``start .. stop - 1`` of the split ``name``."""

    name: str
    start: int
    stop: int


def parse_split(split: str, counts: Mapping[str, int]) -> tuple[Part, ...]:
    """Returns the parts of a split, in order, without the empty ones.

    Args:
      split: such as `train`, `train[:90%]`, `train[45000:]`, `train[-10:]`, `train[:20%]+test`.
      counts: number of examples of each split of the data set.

    Raises:
      EmptySplit: the split has no examples.
      UserError: it is unknown or malformed, or reaches beyond the examples.

    Example:
      >>> from bitmixer_jax.data.splits import parse_split
      >>> parse_split("train[:90%]+test", {"train": 50, "test": 10})
      (Part(name='train', start=0, stop=45), Part(name='test', start=0, stop=10))
    """
    found = []
    for name, first, last in _matches(split, counts):
        count = counts[name]
        start, stop = _position(first, 0, count), _position(last, count, count)
        if max(abs(start), abs(stop)) > count:
            raise UserError(
                f"split {shown(split)} reaches beyond the {count} examples of {name}; "
                f"give positions from -{count} to {count}, or -100% to 100%"
            )
        start, stop = (end + count if end < 0 else end for end in (start, stop))
        if start > stop:
            raise EmptySplit(
                f"split {shown(split)} is empty: {name} has {count} examples, and the slice "
                f"starts at {start} and ends at {stop}"
            )
        found.append(Part(name, start, stop))
    parts = tuple(part for part in found if part.start < part.stop)
    if not parts:
        names = " and ".join(f"{name} has {counts[name]} examples" for name, *_ in found)
        raise EmptySplit(f"split {shown(split)} is empty: {names}")
    return parts


def split_names(split: str, known: Iterable[str] | None = None) -> tuple[str, ...]:
    """Returns the names in a split, each once: ``("train", "test")`` of ``train[:9]+test+train``.

    Args:
      split: as `parse_split` takes it.
      known: names of the splits of the data set. With None every name is allowed, and ``all``
        stays a name.

    Raises:
      UserError: the split is unknown or malformed.
    """
    names = None if known is None else dict.fromkeys(known, 0)
    return tuple(dict.fromkeys(name for name, *_ in _matches(split, names)))


def overlap(one: Sequence[Part], other: Sequence[Part]) -> bool:
    """Returns whether two splits have an example in common."""
    return any(
        a.name == b.name and a.start < b.stop and b.start < a.stop for a in one for b in other
    )


def complement(split: str, counts: Mapping[str, int]) -> str:
    """Returns the split of all other examples of the splits that a split names; "" if none.

    Args and exceptions are those of `parse_split`.

    Example:
      >>> from bitmixer_jax.data.splits import complement
      >>> complement("train[:10]+train[20:30]", {"train": 50, "test": 10})
      'train[10:20]+train[30:]'
    """
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


def left_out(split: str) -> str | None:
    """Returns the complement of a slice in the units of the slice; None of other splits.

    Unlike `complement` it needs no counts. So the result may be an empty split, as it is for
    ``train[:100%]``.

    Example:
      >>> from bitmixer_jax.data.splits import left_out
      >>> left_out("train[:90%]"), left_out("train[10:20]"), left_out("train")
      ('train[90%:]', 'train[:10]+train[20:]', None)
    """
    match = _PART.fullmatch(split)
    if not match or not (match["start"] or match["stop"]):
        return None
    name, start, stop = match.group("name", "start", "stop")
    rest = [f"{name}[:{start}]"] * bool(start) + [f"{name}[{stop}:]"] * bool(stop)
    return "+".join(rest)


def _matches(
    split: str, known: Mapping[str, int] | None
) -> list[tuple[str, str | None, str | None]]:
    """Returns name, start and stop of each part, as the split writes them."""
    allowed = "the splits of the data set" if known is None else " or ".join(known)
    wrong = UserError(
        f"unknown split {shown(split)}: give {allowed}, optionally with a slice by count or per "
        "cent such as train[:90%], train[45000:], train[-10:], or a sum such as "
        "train[:20%]+train[50%:]",
        "unknown-name",
    )
    if len(split) > _MAX_LENGTH:
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
