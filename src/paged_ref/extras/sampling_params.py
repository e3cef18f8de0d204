"""`paged_ref.SamplingParams`: the core's parameters and those of beam search, checked when they are made."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np

from ..core.checks import require
from ..core.engine import sampling

LEAST = {"max_tokens": 1, "n": 1, "seed": 0, "beam_width": 1}  # of the whole numbers


@dataclass(frozen=True, slots=True)
class SamplingParams(sampling.SamplingParams):
    """The core's parameters, and those of beam search, which excludes sampling.

    As in vLLM, `max_tokens=None` generates as long as the context and the KV cache have room, `top_k` 0 or -1 stands
    for no bound, and None elsewhere for the default. Raises ValueError with the argument, the value and the bound.
    """

    beam_width: int | None = None  # search with so many beams, and give the best so many
    length_penalty: float = 1.0  # a beam's score is its log-probability / length ** length_penalty

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value = _checked(field.name, value)
            elif field.name != "max_tokens":
                value = field.default
            object.__setattr__(self, field.name, value)
        require(temperature=(self.temperature, 0))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; above 0 and at most 1 is needed")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty string; every output would end before its first token")
        if self.beam_width is not None:
            for name, default in (("n", 1), ("temperature", 0), ("top_k", None), ("top_p", None), ("stop", ())):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} is {getattr(self, name)!r}; beam search takes no {name}")


def _checked(name: str, value: Any) -> Any:
    """`value` in the type of the parameter `name`."""
    if name in LEAST:
        number = whole_number(name, value)
        require(**{name: (number, LEAST[name])})
        return number
    if name == "top_k":
        number = whole_number(name, value)
        require(top_k=(number, -1))
        return number if number > 0 else None
    if name in ("temperature", "top_p", "length_penalty"):
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}; a finite number is needed")
        return float(value)
    if name == "stop":
        texts = (value,) if isinstance(value, str) else items(name, value, "a text, or several,")
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"stop holds {text!r}; texts are needed")
            require_characters("stop", text)
        return texts
    if name == "stop_token_ids":
        return tuple(whole_number("a token id in stop_token_ids", i) for i in items(name, value, "token ids"))
    if name == "ignore_eos" and not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"ignore_eos is {value!r}; True or False is needed")
    if name == "logits_hook" and not callable(value):
        raise ValueError(f"logits_hook is {value!r}; a function is needed")
    return value


def whole_number(name: str, value: Any) -> int:
    """`value` as an int, whatever library it is from. Raises ValueError for what is no whole number, True and False
    among them."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; a whole number is needed") from None


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
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {value!r}; {needed} are needed")
    return tuple(value)
