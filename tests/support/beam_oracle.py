"""Beam search as transformers states it (early_stopping=False), looking at every continuation of every beam."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

Tokens = tuple[int, ...]


class Found(NamedTuple):
    """A finished sequence."""

    score: float
    tokens: Tokens  # generated


def exhaustive(
    log_probabilities: Callable[[list[Tokens]], list[list[float]]],
    width: int,
    max_tokens: int,
    penalty: float,
    ends: Collection[int],
) -> list[Found]:
    """The best first. `log_probabilities` gives, for each sequence of generated tokens, those of every next token."""
    running: list[tuple[float, Tokens]] = [(0.0, ())]
    finished: list[Found] = []
    for length in range(1, max_tokens + 1):
        steps = log_probabilities([tokens for _, tokens in running])
        candidates = [
            (so_far + step, (*tokens, token))
            for (so_far, tokens), each in zip(running, steps, strict=True)
            for token, step in enumerate(each)
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        candidates = candidates[: (len(ends) + 1) * width]
        for so_far, tokens in candidates[:width]:
            if length == max_tokens or tokens[-1] in ends:
                finished.append(Found(so_far / length**penalty, tokens))
        finished = sorted(finished, key=lambda found: -found.score)[:width]
        running = [candidate for candidate in candidates if candidate[1][-1] not in ends][:width]
        if len(finished) == width and running[0][0] / length**penalty <= finished[-1].score:
            break
    return finished
