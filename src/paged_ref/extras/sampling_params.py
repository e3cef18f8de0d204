"""`paged_ref.SamplingParams`: the core's parameters and the others of vLLM, checked when they are made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import update_wrapper
from typing import Any, Self

from ..core.checks import require
from ..core.engine import sampling
from .arguments import finite_number, items, refuse_unknown, require_characters, require_flag, shown, whole_number

LEAST = {
    "max_tokens": 1, "n": 1, "seed": -1, "beam_width": 1, "top_k": -1, "min_tokens": 0, "logprobs": -1,
    "prompt_logprobs": -1,
}  # of the whole numbers  # fmt: skip
RANGES = {  # beyond that of length_penalty, the power of a length is no number
    "min_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "length_penalty": (-10, 10),
}  # fmt: skip
NUMBERS = ("temperature", "top_p", "repetition_penalty", *RANGES)
# What makes a request more than the core's, and what a search over beams, which draws nothing, has no place for.
SHAPING = (
    "min_p", "min_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "allowed_token_ids", "bad_words", "logprobs", "prompt_logprobs", "include_stop_str_in_output",
)  # fmt: skip
INSTEAD = {  # of vLLM's words that are not here
    "best_of": "give n, or beam_width for the best of a search", "use_beam_search": "give beam_width",
    "logits_processors": "give logits_hook", "guided_decoding": "give logits_hook or allowed_token_ids",
    "structured_outputs": "give logits_hook or allowed_token_ids", "truncate_prompt_tokens": "cut the prompt itself",
}  # fmt: skip
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

    def __new__(cls, *args: Any, **given: Any) -> Self:
        refuse_unknown("SamplingParams", given, [field.name for field in fields(cls)], INSTEAD)
        return object.__new__(cls)

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
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; a number above 0 is needed")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; at most max_tokens = {self.max_tokens} is allowed")
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


update_wrapper(SamplingParams.__new__, SamplingParams.__init__, (), ())  # help() shows the parameters


def _checked(name: str, value: Any) -> Any:
    """`value` in the type of the parameter `name`."""
    if name in ("logprobs", "prompt_logprobs") and isinstance(value, bool):
        return 1 if value else None  # as in vLLM
    if name in LEAST:
        number = whole_number(name, value)
        require(**{name: (number, LEAST[name])})
        # "off" in vLLM's words
        return None if (name == "top_k" and number <= 0) or (name == "seed" and number < 0) else number
    if name in NUMBERS:
        return _number(name, value)
    if name in ("stop", "bad_words"):
        return _texts(name, value)
    if name in ("stop_token_ids", "allowed_token_ids"):
        return tuple(whole_number(f"a token id in {name}", i) for i in items(name, value, "token ids"))
    if name == "logit_bias":
        return _bias(value)
    if name == "logits_hook" and not callable(value):
        raise ValueError(f"logits_hook is {shown(value)}; a function is needed")
    if name != "logits_hook":
        require_flag(name, value)
    return value


def _number(name: str, value: Any) -> float:
    number = finite_number(name, value)
    low, high = RANGES.get(name, (number, number))
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}; {low} to {high} is needed")
    return number


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else items(name, value, "a text, or several,")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} holds {shown(text)}; texts are needed")
        if not text:
            what = "every output would end before its first token" if name == "stop" else "it forbids nothing"
            raise ValueError(f"{name} holds an empty string; {what}")
        require_characters(name, text)
    return texts


def _bias(value: Any) -> dict[int, float] | None:
    """Token id -> bias; OpenAI's JSON has the ids as text."""
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias is {shown(value)}; a dict from token id to bias is needed")
    biases = {}
    for key, bias in value.items():
        number = int(key) if isinstance(key, str) and key.isdecimal() else key
        biases[whole_number("a token id in logit_bias", number)] = finite_number(f"logit_bias of {key}", bias)
    return biases or None
