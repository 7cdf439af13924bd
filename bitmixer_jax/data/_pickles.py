"""Reads CIFAR-10's pickled batches with a minimal unpickler that runs no code.

Python's own unpickler would run code of the file, and a damaged pickle makes it take gigabytes.
This one knows numbers, texts, lists, dictionaries and arrays; its work is bounded by the size of
the file.
"""

import pickletools
from typing import Any

import numpy as np

from bitmixer_jax.data._names import one_line
from bitmixer_jax.errors import UserError

_MOST_STEPS = 200_000  # a batch of 10,000 images takes some 40,000
_GLOBALS = ("numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype")
_VALUES = {
    *("BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE"),
    *("SHORT_BINBYTES", "BINBYTES"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Array:
    """Stands in for `numpy.ndarray`: keeps what the pickle says of it."""

    state: Any = ()

    def rows(self, count: int, size: int) -> np.ndarray:
        """The array, uint8 ``[count, size]``. Raises ValueError or TypeError if it is another."""
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _Dtype) or dtype.code not in (b"u1", "u1"):
            raise ValueError("the array is not of unsigned bytes")
        if shape != (count, size) or type(raw) is not bytes or len(raw) != count * size:
            raise ValueError(f"expected {count} images of {size} bytes")
        return np.frombuffer(raw, np.uint8).reshape(count, size, order="F" if fortran else "C")


class _Dtype:
    """Stands in for `numpy.dtype`."""

    def __init__(self, code: Any) -> None:
        self.code = code


class _Global:
    """Stands in for what a pickle names."""

    def __init__(self, name: str) -> None:
        self.name = name


_MARK = object()


def read_batch(data: bytes, where: str) -> Any:
    """Reads a pickled batch: dictionaries, lists, numbers, texts and `Array`.

    Args:
      data: the file, of protocol 2 or 3; the texts of Python 2 become bytes.
      where: names it in messages.

    Raises:
      UserError: it is damaged, or holds what no batch of CIFAR-10 needs.
    """
    try:
        return _run(data)
    except Exception as error:  # a damaged pickle may raise nearly anything
        reason = one_line(error)[:200] or type(error).__name__
        raise UserError(f"{where} is damaged or not a batch of CIFAR-10: {reason}") from None


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for step, (code, argument, _) in enumerate(pickletools.genops(data)):
        if step >= _MOST_STEPS:
            raise ValueError(f"it takes more than {_MOST_STEPS:,} steps")
        name = code.name
        if name in _VALUES:
            # `pickletools` gives the bytes of Python 2's texts as characters.
            text = name in ("SHORT_BINSTRING", "BINSTRING")
            stack.append(argument.encode("latin-1") if text else argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in _TUPLES:
            number = _TUPLES[name]
            if number > len(stack):
                raise ValueError("its stack is empty")
            stack[len(stack) - number :] = [tuple(stack[len(stack) - number :])]
        elif name == "TUPLE":
            stack.append(tuple(_marked(stack)))
        elif name in ("APPEND", "APPENDS"):
            items = _marked(stack) if name == "APPENDS" else [stack.pop()]
            _last(stack, list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = _marked(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if not all(type(key) in (bytes, str) for key in items[::2]):
                raise ValueError("the keys of a dictionary are not texts")
            _last(stack, dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            if argument not in _GLOBALS:
                wanted = argument.replace(" ", ".")
                raise ValueError(f"it wants {wanted}, which no batch of CIFAR-10 needs")
            stack.append(_Global(argument))
        elif name == "REDUCE":
            arguments, function = stack.pop(), _last(stack, _Global)
            if function.name == "numpy dtype":
                stack[-1] = _Dtype(arguments[0])
            elif function.name == "numpy.core.multiarray _reconstruct":
                stack[-1] = Array()
            else:
                raise ValueError(f"it calls {function.name}")
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Array):
                stack[-1].state = state
            elif not isinstance(stack[-1], _Dtype):  # whose byte order bytes do not need
                raise ValueError("it sets the state of an object that is no array")
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"it holds {name}, which no batch of CIFAR-10 needs")
    raise ValueError("it does not end")


def _marked(stack: list[Any]) -> list[Any]:
    """Takes what lies above the last mark, and the mark."""
    place = len(stack) - 1
    while place >= 0 and stack[place] is not _MARK:
        place -= 1
    if place < 0:
        raise ValueError("a mark is missing")
    items = stack[place + 1 :]
    del stack[place:]
    return items


def _last(stack: list[Any], kind: type) -> Any:
    if not stack or type(stack[-1]) is not kind:
        raise ValueError(f"there is no {kind.__name__.strip('_').lower()} where it needs one")
    return stack[-1]
