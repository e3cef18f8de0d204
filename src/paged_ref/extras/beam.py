"""Beam search: which continuations of which beams go on. Pure functions of log-probabilities.

The rules are those of transformers' generate(num_beams=k, early_stopping=False). The blocks of the KV cache
follow by reference counts: a beam that goes on twice is forked, one that does not is freed (Kwon et al. 2023,
§4.4, Fig. 9).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A beam that came to its end."""

    score: float  # log-probability / length ** length_penalty
    tokens: list[int]  # generated, the end of sequence included
    stopped: bool  # by an end-of-sequence token, not by the length


@dataclass(frozen=True, slots=True)
class Continuation:
    """A beam, by its place among the beams, and the token that it goes on with."""

    beam: int
    token_id: int
    log_probability: float  # of all generated tokens


@dataclass(slots=True)
class BeamSearch:
    """The search of one request. `log_probabilities` has one entry for each running beam."""

    width: int
    length_penalty: float
    log_probabilities: list[float] = field(default_factory=lambda: [0.0])
    finished: list[Hypothesis] = field(default_factory=list)  # the best first, at most `width`

    def step(
        self,
        logits: Sequence[np.ndarray],
        generated: Sequence[list[int]],
        eos: Collection[int],
        is_last: bool,
    ) -> list[Continuation]:
        """Choose the beams that go on, the best first; [] when the search is over.

        `logits` [vocab_size] and `generated` tokens of each running beam; `is_last`: the length ends here.
        """
        scores = np.stack([
            log_softmax(row) + so_far for row, so_far in zip(logits, self.log_probabilities, strict=True)
        ])  # [beams, vocab_size]  # fmt: skip
        # Enough candidates that `width` of them go on even if all the others end.
        best = np.argsort(-scores, axis=None, kind="stable")[: (len(eos) + 1) * self.width]
        going_on: list[Continuation] = []
        length = len(generated[0]) + 1
        for rank, place in enumerate(best):
            beam, token_id = (int(i) for i in np.unravel_index(place, scores.shape))
            score = float(scores[beam, token_id])
            stopped = token_id in eos
            if not (stopped or is_last):
                going_on.append(Continuation(beam, token_id, score))
            elif rank < self.width:
                tokens = [*generated[beam], token_id]
                self.finished.append(Hypothesis(score / length**self.length_penalty, tokens, stopped))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self.width :]
        going_on = going_on[: self.width]
        if not going_on:
            return []
        if len(self.finished) == self.width:
            possible = going_on[0].log_probability / length**self.length_penalty
            if possible <= self.finished[-1].score:
                return []
        self.log_probabilities = [continuation.log_probability for continuation in going_on]
        return going_on


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    log_probabilities: np.ndarray = wide - np.log(np.exp(wide).sum())
    return log_probabilities
