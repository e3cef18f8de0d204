"""A request inside the engine: its sequences, and the text and random numbers that belong to them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...extras.beam import BeamSearch
from ..model.tokenizer import TextStream
from .outputs import RequestOutput, SequenceOutput
from .sampling import SamplingParams
from .sequence import Group, Sequence


@dataclass(eq=False, slots=True)
class Sample:
    """A sequence, its output so far, and what its next tokens need."""

    seq: Sequence
    output: SequenceOutput
    rng: np.random.Generator
    text: TextStream
    held_back: str = ""  # the end of the text, while it might be the beginning of a stop string

    def release_text(self, fresh: str, stops: tuple[str, ...], last: bool) -> tuple[str, bool]:
        """Add `fresh` text. Returns what can be shown now, and whether a stop string ended it."""
        text = self.held_back + fresh
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], True
        keep = 0 if last else max((_overlap(text, stop) for stop in stops), default=0)
        self.held_back = text[len(text) - keep :]
        return text[: len(text) - keep], False


@dataclass(eq=False, slots=True)
class Request:
    """An unfinished request. Its samples are sequences of one group where the manager can fork, else each
    is a group of its own."""

    output: RequestOutput
    params: SamplingParams
    groups: list[Group]
    samples: dict[int, Sample]  # by seq_id, unfinished; empty for beam search
    to_fork: list[Sample] = field(default_factory=list)  # begin when the leader's prompt is computed
    beams: BeamSearch | None = None
    beam_logits: dict[int, np.ndarray] = field(default_factory=dict)  # by seq_id, until all beams have theirs


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
