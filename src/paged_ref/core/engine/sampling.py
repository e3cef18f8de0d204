"""What a caller asks for, and how a token is drawn from logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate. The defaults are greedy; names and meanings are vLLM's.

    Sample i of a request with seed s draws exactly as a single request with seed s + i would, whatever
    else runs in the batch. Raises ValueError for a value outside its bounds.
    """

    max_tokens: int = 16
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int | None = None  # draw among the k likeliest
    top_p: float | None = None  # draw among the likeliest that together reach probability p
    n: int = 1  # samples of the same prompt
    seed: int | None = None  # None: fresh entropy
    stop: Sequence[str] = field(default=())  # text that ends the output, and is not part of it
    stop_token_ids: Sequence[int] = field(default=())
    ignore_eos: bool = False
    beam_width: int | None = None  # search with so many beams, and give the best so many; excludes sampling
    length_penalty: float = 1.0  # a beam's score is its log-probability / length ** length_penalty
    # Called with the tokens so far and their logits [vocab_size] (its own copy); returns the logits to use.
    logits_hook: Callable[[Sequence[int], np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; at least 1 is needed")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; at least 0 is needed")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; at least 1 is needed")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; above 0 and at most 1 is needed")
        if self.n < 1:
            raise ValueError(f"n is {self.n}; at least 1 is needed")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed is {self.seed}; at least 0 is needed")
        if self.beam_width is not None:
            if self.beam_width < 1:
                raise ValueError(f"beam_width is {self.beam_width}; at least 1 is needed")
            for name, default in (("n", 1), ("temperature", 0), ("top_k", None), ("top_p", None), ("stop", ())):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} is {getattr(self, name)!r}; beam search takes no {name}")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty string; it would end every output at once")


def hooked(logits: np.ndarray, tokens: Sequence[int], params: SamplingParams) -> np.ndarray:
    """`logits [vocab_size]` after the caller's hook, if there is one."""
    if params.logits_hook is None:
        return logits
    changed = np.asarray(params.logits_hook(tokens, logits.copy()))
    if changed.shape != logits.shape:
        raise ValueError(f"logits_hook returned shape {list(changed.shape)}; {list(logits.shape)} is needed")
    return changed


def generator(params: SamplingParams, sample: int) -> np.random.Generator:
    """The random numbers of one sample: its own stream, so that no other request can shift it."""
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
        # Keep the tokens up to and including the one that reaches top_p: never none.
        kept = int(np.searchsorted(cumulative, params.top_p)) + 1
        order, cumulative = order[:kept], cumulative[:kept]
    place = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(order[min(int(place), len(order) - 1)])
