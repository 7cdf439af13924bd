"""Names of files and classes in messages: short lists, on one line."""

from collections.abc import Sequence

from bitmixer_jax.errors import UserError, one_line

_NAMED = 10  # names in a message: enough to see what they have in common


def listed(names: Sequence[str]) -> str:
    """Returns names for a message: the first ten, and how many more there are."""
    more = len(names) - _NAMED
    return one_line(", ".join(names[:_NAMED])) + f", and {more} more" * (more > 0)


def reason_of(error: Exception) -> str:
    """Returns why an image cannot be read, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines() or [type(error).__name__]
    if lines[0].startswith("cannot identify image file"):  # it goes on with an address in memory
        return "none of JPEG, PNG, WebP, BMP, GIF, TIFF, PPM, or its header is damaged"
    return one_line(lines[0])[:200]


def require_classes(found: Sequence[str], expected: Sequence[str], where: str) -> None:
    """Checks that a data set has the classes that a network was trained on, in their order.

    Args:
      found: names of the classes of the data.
      expected: names of the classes of the network.
      where: what to call the data in the message.

    Raises:
      UserError: classes were added, renamed, removed, or are in another order.
    """
    if list(found) == list(expected):
        return
    here, wanted = set(found), set(expected)
    new = [name for name in found if name not in wanted]
    gone = [name for name in expected if name not in here]
    if new or gone:
        told = [f"{len(new)} that it does not know ({listed(new)})"] * bool(new)
        told += [f"{len(gone)} are missing ({listed(gone)})"] * bool(gone)
        what = f"has other classes than the network: {'; '.join(told)}"
    elif len(found) != len(expected):
        what = f"has {len(found)} classes, some of them twice; the network has {len(expected)}"
    else:
        pairs = list(zip(found, expected, strict=True))
        place = next(i for i, (one, other) in enumerate(pairs) if one != other)
        what = (
            f"has the classes of the network in another order: class {place} is "
            f"{one_line(found[place])}, in the network {one_line(expected[place])}"
        )
    raise UserError(f"{where}: {what}; give the data of the training, or train again")
