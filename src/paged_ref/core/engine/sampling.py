"""What a caller asks for, and how a token is drawn from logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate. The defaults are greedy; names and meanings are vLLM's.

    Sample i of a request with seed s draws exactly as a single request with seed s + i would, whatever else runs in
    the batch. The values are taken as right; those of `paged_ref.SamplingParams` are checked.
    """

    max_tokens: int | None = 16  # None: as many as there is room for
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int | None = None  # draw among the k likeliest
    top_p: float | None = None  # draw among the likeliest that together reach probability p
    n: int = 1  # samples of the same prompt
    seed: int | None = None  # None: fresh entropy
    stop: SequenceOf[str] = ()  # text that ends the output, and is not part of it
    stop_token_ids: SequenceOf[int] = ()
    ignore_eos: bool = False
    # Called with the tokens so far and their logits [vocab_size] (its own copy); returns the logits to use.
    logits_hook: Callable[[SequenceOf[int], np.ndarray], np.ndarray] | None = None


class RequestError(Exception):
    """This request ends, and the others go on. Its cause, if there is one, is what the request's own hook raised."""


def apply_logits_hook(logits: np.ndarray, seq: Sequence, params: SamplingParams) -> np.ndarray:
    """`logits [vocab_size]` of `seq` after the caller's hook, if there is one. Raises RequestError."""
    if params.logits_hook is None:
        return logits
    try:
        changed = np.asarray(params.logits_hook(tuple(seq.tokens), logits.copy()))
        if changed.shape != logits.shape:
            raise ValueError(f"logits_hook returned shape {list(changed.shape)}; {list(logits.shape)} is needed")
        if changed.dtype.kind not in "fiu":
            raise ValueError(f"logits_hook returned {changed.dtype}; real numbers are needed")
    except Exception as error:
        raise RequestError from error
    if not math.isfinite(changed.max()):
        raise no_likeliest_token(seq, changed.max(), "logits_hook")
    return changed.astype(np.float64)


def no_likeliest_token(seq: Sequence, largest: float, after: str) -> RequestError:
    """The error of a sequence whose largest logit is no finite number: with NaN or +inf among its logits, or with
    nothing but -inf, any token would be wrong."""
    return RequestError(f"sequence {seq.seq_id} cannot go on: its largest logit is {largest} after {after}")


def random_generator(params: SamplingParams, sample: int) -> np.random.Generator:
    """The random numbers of one sample: a stream of its own, so that no other request can shift it."""
    return np.random.default_rng(None if params.seed is None else params.seed + sample)


def draw(logits: np.ndarray, params: SamplingParams, rng: np.random.Generator) -> int:
    """The next token id from `logits [vocab_size]`. Uses one random number, or none when greedy."""
    if params.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: params.top_k]  # the likeliest first
    below = logits[order].astype(np.float64) - logits[order[0]]  # 0 for the likeliest, less for the others
    with np.errstate(over="ignore"):  # at a temperature near 0, -inf is right: all but the likeliest have probability 0
        probability = np.exp(below / params.temperature)
    probability /= probability.sum()
    cumulative = probability.cumsum()
    if params.top_p is not None:
        # Keep the tokens up to and including the one that reaches top_p: at least one.
        kept = int(np.searchsorted(cumulative, params.top_p)) + 1
        order, cumulative = order[:kept], cumulative[:kept]
    place = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(order[min(int(place), len(order) - 1)])
