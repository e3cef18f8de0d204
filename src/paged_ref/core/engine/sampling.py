"""What a caller asks for, and how a token is drawn from logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..checks import require


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate. The defaults are greedy; names and meanings are vLLM's.

    Sample i of a request with seed s draws exactly as a single request with seed s + i would, whatever else runs in
    the batch. Raises ValueError for a value outside its bounds.
    """

    max_tokens: int = 16
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int | None = None  # draw among the k likeliest
    top_p: float | None = None  # draw among the likeliest that together reach probability p
    n: int = 1  # samples of the same prompt
    seed: int | None = None  # None: fresh entropy
    stop: Sequence[str] = ()  # text that ends the output, and is not part of it
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    # Called with the tokens so far and their logits [vocab_size] (its own copy); returns the logits to use.
    logits_hook: Callable[[Sequence[int], np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        require(max_tokens=(self.max_tokens, 1), temperature=(self.temperature, 0), n=(self.n, 1))
        if self.top_k is not None:
            require(top_k=(self.top_k, 1))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; above 0 and at most 1 is needed")
        if self.seed is not None:
            require(seed=(self.seed, 0))
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty string; every output would end before its first token")


class RequestError(Exception):
    """Its cause is what a request's own hook raised: this request ends, and the others go on."""


def apply_logits_hook(logits: np.ndarray, tokens: Sequence[int], params: SamplingParams) -> np.ndarray:
    """`logits [vocab_size]` after the caller's hook, if there is one. Raises RequestError."""
    if params.logits_hook is None:
        return logits
    try:
        changed = np.asarray(params.logits_hook(tuple(tokens), logits.copy()))
        if changed.shape != logits.shape:
            raise ValueError(f"logits_hook returned shape {list(changed.shape)}; {list(logits.shape)} is needed")
        return changed
    except Exception as error:
        raise RequestError from error


def random_generator(params: SamplingParams, sample: int) -> np.random.Generator:
    """The random numbers of one sample: a stream of its own, so that no other request can shift it."""
    return np.random.default_rng(None if params.seed is None else params.seed + sample)


def draw(logits: np.ndarray, params: SamplingParams, rng: np.random.Generator) -> int:
    """The next token id from `logits [vocab_size]`. Uses one random number, or none when greedy."""
    if params.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: params.top_k]  # the likeliest first
    scaled = logits[order].astype(np.float64) / params.temperature
    probability = np.exp(scaled - scaled[0])
    probability /= probability.sum()
    cumulative = probability.cumsum()
    if params.top_p is not None:
        # Keep the tokens up to and including the one that reaches top_p: at least one.
        kept = int(np.searchsorted(cumulative, params.top_p)) + 1
        order, cumulative = order[:kept], cumulative[:kept]
    place = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(order[min(int(place), len(order) - 1)])
