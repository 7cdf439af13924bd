"""Reads the pickled batches of CIFAR-10 with a minimal unpickler that runs no code.

The unpickler of Python would run code from the file, and a damaged pickle makes it take gigabytes.
This one knows numbers, texts, lists, dictionaries and arrays. The size of the file bounds its work.
"""

import pickletools
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError, reason

_MAX_STEPS = 200_000  # a batch of 10,000 images takes some 40,000
_GLOBALS = ("numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype")
_VALUES = {
    *("BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE"),
    *("SHORT_BINBYTES", "BINBYTES"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Array:
    """Stands for a `numpy.ndarray`: keeps its pickled state."""

    state: Any = ()

    def rows(self, count: int, size: int) -> np.ndarray:
        """Returns the array if it is uint8 ``[count, size]``; else ValueError or TypeError."""
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _Dtype) or dtype.code not in (b"u1", "u1"):
            raise ValueError("the array is not of unsigned bytes")
        if shape != (count, size) or type(raw) is not bytes or len(raw) != count * size:
            raise ValueError(f"expected {count} images of {size} bytes")
        return np.frombuffer(raw, np.uint8).reshape(count, size, order="F" if fortran else "C")


class _Dtype:
    """Stands for a `numpy.dtype`."""

    def __init__(self, code: Any) -> None:
        self.code = code


class _Global:
    """Stands for a function or class that the pickle names."""

    def __init__(self, name: str) -> None:
        self.name = name


_MARK = object()


def read_batch(data: bytes, where: str) -> Any:
    """Reads a pickled batch, of protocol 2 or 3. The texts of Python 2 become bytes.

    Raises:
      UserError: the file is damaged, or holds something that no batch of CIFAR-10 needs.
    """
    try:
        return _run(data)
    except Exception as error:  # a damaged pickle may raise nearly anything
        message = f"{where} is damaged or not a batch of CIFAR-10: {reason(error)}"
        raise UserError(message, "damaged") from None


def _run(data: bytes) -> Any:
    """Carries out the operations of a pickle on a stack, as `pickletools` documents them."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for step, (code, argument, _) in enumerate(pickletools.genops(data)):
        if step >= _MAX_STEPS:
            raise ValueError(f"it takes more than {_MAX_STEPS:,} steps")
        name = code.name
        if name in _VALUES:
            # `pickletools` gives the bytes of Python 2 texts as characters.
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
            elif not isinstance(stack[-1], _Dtype):  # its state is the byte order: bytes need none
                raise ValueError("it sets the state of an object that is no array")
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"it holds {name}, which no batch of CIFAR-10 needs")
    raise ValueError("it does not end")


def _marked(stack: list[Any]) -> list[Any]:
    """Removes the items above the last mark and the mark itself; returns the items."""
    mark = len(stack) - 1
    while mark >= 0 and stack[mark] is not _MARK:
        mark -= 1
    if mark < 0:
        raise ValueError("a mark is missing")
    items = stack[mark + 1 :]
    del stack[mark:]
    return items


def _last(stack: list[Any], kind: type) -> Any:
    """Returns the last item, which must be of a type."""
    if not stack or type(stack[-1]) is not kind:
        raise ValueError(f"there is no {kind.__name__.strip('_').lower()} where it needs one")
    return stack[-1]
