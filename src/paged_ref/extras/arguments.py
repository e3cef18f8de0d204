"""What callers hand in, whatever library it is from: read in one form, or refused in one sentence that names it."""

from __future__ import annotations

import math
import operator
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np

_LIMITED = reprlib.Repr()
_LIMITED.maxother = _LIMITED.maxstring = 80


def shown(value: Any) -> str:
    """`value` as it stands in a sentence: in one line, and not all of it where it is long."""
    return re.sub(r"\s*\n\s*", " ", _LIMITED.repr(value))


def whole_number(name: str, value: Any) -> int:
    """`value` as an int. Raises ValueError for what is no whole number, True and False among them."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {shown(value)}; a whole number is needed") from None


def finite_number(name: str, value: Any) -> float:
    """`value` as a float. Raises ValueError for what is no finite number."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {shown(value)}; a finite number is needed")
    return float(value)


def require_flag(name: str, value: object) -> None:
    """Raise ValueError for what is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {shown(value)}; True or False is needed")


def require_characters(name: str, text: str) -> None:
    """Raise ValueError for a text with halves of characters: Python has them for bytes that are no UTF-8, and no
    tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise ValueError(f"{name} holds {bad!r} at place {error.start}, which is no character") from None


def items(name: str, value: Any, needed: str) -> tuple[Any, ...]:
    """What `value` holds, read once. Raises ValueError for one thing in the place of several."""
    one = isinstance(value, (str, bytes, bytearray, Mapping)) or getattr(value, "ndim", 1) == 0
    if one or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {shown(value)}; {needed} are needed")
    return tuple(value)


def refuse_unknown(owner: str, given: Iterable[str], known: Collection[str], elsewhere: Mapping[str, str]) -> None:
    """Raise ValueError for the first argument that `owner` does not have. `elsewhere` says, of another library's words,
    what to do instead."""
    for name in given:
        if name not in known:
            instead = elsewhere.get(name, f"known are {', '.join(known)}")
            raise ValueError(f"{owner} has no argument {name}; {instead}")
