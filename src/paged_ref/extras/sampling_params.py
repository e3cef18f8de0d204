"""`paged_ref.SamplingParams`: the core's parameters and the others of vLLM, checked when they are made."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np

from ..core.checks import require
from ..core.engine import sampling

LEAST = {
    "max_tokens": 1, "n": 1, "seed": -1, "beam_width": 1, "top_k": -1, "min_tokens": 0, "logprobs": -1,
    "prompt_logprobs": -1,
}  # of the whole numbers  # fmt: skip
RANGES = {"min_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
NUMBERS = ("temperature", "top_p", "length_penalty", "repetition_penalty", *RANGES)
FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
# What makes a request more than the core's, and what a search over beams, which draws nothing, has no place for.
SHAPING = (
    "min_p", "min_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "allowed_token_ids", "bad_words", "logprobs", "prompt_logprobs", "include_stop_str_in_output",
)  # fmt: skip
NOT_WITH_BEAMS = ("n", "temperature", "top_k", "top_p", "stop", *SHAPING)


@dataclass(frozen=True, slots=True)
class SamplingParams(sampling.SamplingParams):
    """The core's parameters, the others of vLLM, and those of beam search, which excludes sampling.

    As in vLLM, `max_tokens=None` generates as long as the context and the KV cache have room, `top_k` 0 or -1 stands
    for no bound, `seed` -1 for no seed, and None elsewhere for the default. The logits of a token are changed in this
    order: `allowed_token_ids`, `bad_words`, `min_tokens`, `logit_bias`, the penalties for repetition, frequency and
    presence, then `logits_hook`; a draw divides by the temperature, and applies `min_p`, `top_k` and `top_p`. Raises
    ValueError with the argument, the value and the bound.
    """

    beam_width: int | None = None  # search with so many beams, and give the best so many
    length_penalty: float = 1.0  # a beam's score is its log-probability / length ** length_penalty
    min_p: float = 0.0  # draw among tokens with at least this share of the likeliest one's probability
    min_tokens: int = 0  # before them, neither EOS nor a stop token is drawn, and no stop text counts
    repetition_penalty: float = 1.0  # divides the logits above 0 of tokens in prompt or output, multiplies the others
    presence_penalty: float = 0.0  # less for the logit of a token in the output
    frequency_penalty: float = 0.0  # the same, for each time that the token is there
    logit_bias: Mapping[int, float] | None = None  # token id -> what is added to its logit
    allowed_token_ids: Sequence[int] | None = None  # no other tokens are drawn
    bad_words: Sequence[str] = ()  # the token that would complete such a text in the output is not drawn
    # So many likeliest tokens for each token of the output (of the prompt), and that token: a dict from token id to
    # Logprob, from the logits as the model gave them. -1: the whole vocabulary. The prompt's first token has None.
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True  # in the text
    include_stop_str_in_output: bool = False  # the text ends with the stop text, or with that of the stop token

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value = _checked(field.name, value)
            elif field.name != "max_tokens":
                value = field.default
            object.__setattr__(self, field.name, value)
        require(temperature=(self.temperature, 0))
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; {low} to {high} is needed")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; above 0 and at most 1 is needed")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; a number above 0 is needed")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; at most max_tokens = {self.max_tokens} is allowed")
        for name in ("stop", "bad_words"):
            if any(not text for text in getattr(self, name)):
                what = "every output would end before its first token" if name == "stop" else "it forbids nothing"
                raise ValueError(f"{name} holds an empty string; {what}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty; at least one token id is needed, or None for all")
        if self.beam_width is not None:
            self._refuse_with_beams()
        elif self.n > 1 and self.temperature == 0 and self.logits_hook is None:
            warnings.warn(f"n is {self.n}, and at temperature 0 all samples are the same", stacklevel=3)

    def _refuse_with_beams(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in NOT_WITH_BEAMS and value != field.default:
                raise ValueError(f"{field.name} is {value!r}; beam search takes no {field.name}")

    @property
    def shapes(self) -> bool:
        """Is more asked for than what the core's requests do?"""
        return any(getattr(self, each.name) != each.default for each in fields(self) if each.name in SHAPING)


def _checked(name: str, value: Any) -> Any:
    """`value` in the type of the parameter `name`."""
    if name in LEAST:
        if name in ("logprobs", "prompt_logprobs") and isinstance(value, bool):
            return 1 if value else None  # as in vLLM
        number = whole_number(name, value)
        require(**{name: (number, LEAST[name])})
        # "off" in vLLM's words
        return None if (name == "top_k" and number <= 0) or (name == "seed" and number < 0) else number
    if name in NUMBERS:
        return finite_number(name, value)
    if name in ("stop", "bad_words"):
        texts = (value,) if isinstance(value, str) else items(name, value, "a text, or several,")
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"{name} holds {text!r}; texts are needed")
            require_characters(name, text)
        return texts
    if name in ("stop_token_ids", "allowed_token_ids"):
        return tuple(whole_number(f"a token id in {name}", i) for i in items(name, value, "token ids"))
    if name == "logit_bias":
        return _bias(value)
    if name in FLAGS:
        require_flag(name, value)
    if name == "logits_hook" and not callable(value):
        raise ValueError(f"logits_hook is {value!r}; a function is needed")
    return value


def _bias(value: Any) -> dict[int, float] | None:
    """Token id -> bias; OpenAI's JSON has the ids as text."""
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias is {value!r}; a dict from token id to bias is needed")
    biases = {}
    for key, bias in value.items():
        number = int(key) if isinstance(key, str) and key.isdecimal() else key
        biases[whole_number("a token id in logit_bias", number)] = finite_number(f"logit_bias of {key}", bias)
    return biases or None


def finite_number(name: str, value: Any) -> float:
    """`value` as a float. Raises ValueError for what is no finite number."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; a finite number is needed")
    return float(value)


def require_flag(name: str, value: object) -> None:
    """Raise ValueError for what is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {value!r}; True or False is needed")


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
